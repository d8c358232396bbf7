"""DreamMix's nodes: a hole is filled in its surroundings first and then in the whole picture; prompts lose an attribute."""

from __future__ import annotations

from typing import Any, get_args

import torch
from comfy.samplers import CFGGuider, KSampler, sampler_object
from comfy_api.latest import io

from ..imaging.fill import Fill
from ..imaging.masks import log_noise, resize_mask
from ..imaging.region_plan import LOCAL_SHARE, RegionSettings
from ..imaging.seam import square_ramp
from ..model_patches.dreammix.attribute_substitution import (
    PREFIX,
    attribute_words,
    embed_attributes,
    without_attributes,
)
from ..model_patches.dreammix.two_stage_sampler import Background, Run, TwoStages, restart, sample_in_two_stages
from .announce import announcer
from .schema import cfg_input, scheduler_input, seed_input

_ALIASES = ["dreammix", "local global", "two stage inpaint", "small object", "subject insertion", "inpaint harmonize"]


def _picture_inputs() -> list[io.Input]:
    return [
        io.Vae.Input("vae", tooltip="The model's VAE."),
        io.Image.Input("image", tooltip="The whole picture, at its own size."),
        io.Mask.Input("mask", tooltip="The hole: everything that is not black."),
        seed_input("Seed of the noise. Each picture of a batch has noise of its own, and so has each stage."),
    ]


def _stage_inputs() -> list[io.Input]:
    """The method's own widgets; they become a `TwoStages`."""
    return [
        io.Float.Input(
            "local_share",
            default=0.7,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="The share of the steps that see only the surroundings of the hole (the paper's lambda); the others see the "
            "whole picture. 1: all of them, as Crop Region does. 0: none.",
        ),
        io.Int.Input(
            "native_size",
            default=1024,
            min=64,
            max=4096,
            step=8,
            tooltip="What the model was trained on: 1024 for SDXL, 512 for SD1.5. The surroundings are shown with about this "
            "number squared of pixels.",
        ),
        io.Float.Input(
            "context",
            default=LOCAL_SHARE,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="The surroundings are at least this share of the picture's width and height. 1: all of it.",
        ),
        io.Int.Input(
            "feather",
            default=32,
            min=0,
            max=512,
            tooltip="Width in pixels of a soft edge outside of the hole, in which new and old are mixed.",
        ),
        io.Combo.Input(
            "background",
            options=list(get_args(Background)),
            default="intermediate",
            advanced=True,
            tooltip="What stands around the hole in the second stage. intermediate: the picture at the switch, as in the paper. "
            "original: the original, as in the authors' code.",
        ),
        io.Combo.Input(
            "under_hole",
            options=list(get_args(Fill)),
            default="blurred",
            advanced=True,
            tooltip="What the VAE sees in the hole at first. box blurs: the authors' code, slower and much the same as blurred.",
        ),
        io.Boolean.Input(
            "raw_pooled",
            default=True,
            advanced=True,
            tooltip="After Substitute Attribute: the second stage sees the prompt's pooled output as it was before, as in the "
            "authors' code.",
        ),
        io.Int.Input(
            "multiple",
            default=64,
            min=8,
            max=256,
            step=8,
            advanced=True,
            tooltip="Both sides of what the first stage sees are a multiple of this.",
        ),
    ]


def _two_stages(
    local_share: float,
    native_size: int,
    context: float,
    feather: int,
    background: Background,
    under_hole: Fill,
    raw_pooled: bool,
    multiple: int,
) -> TwoStages:
    return TwoStages(
        local_share=local_share,
        region=RegionSettings.local(native_size, context, multiple),
        feather=feather,
        background=background,
        fill=under_hole,
        raw_pooled=raw_pooled,
    )


def _outputs() -> list[io.Output]:
    return [
        io.Image.Output(
            tooltip="The picture with its hole filled; beyond the soft edge it is the original, bit for bit."
        ),
        io.Image.Output(display_name="AT_SWITCH", tooltip="The picture as it went from the first stage to the second."),
        io.Mask.Output(tooltip="Where the picture may have changed, for Compare: the hole and its soft edge."),
    ]


def _sampled(run: Run, image: torch.Tensor, mask: torch.Tensor, settings: TwoStages, node: str | None) -> io.NodeOutput:
    made, at_switch = sample_in_two_stages(image, mask, run, settings, announcer(node))
    ramp = square_ramp(resize_mask(mask, image.shape[1:3]), settings.feather)[:, 0]
    return io.NodeOutput(made, at_switch, (ramp > 0).float().expand(len(made), -1, -1))


class TrueFillDreamMix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillDreamMix",
            display_name="DreamMix: Inpaint in Two Stages (TrueFill)",
            category="TrueFill/5 sample",
            description="Fills a hole, however small, with all of the model's detail, and so that it belongs: the first steps "
            "see the hole and its surroundings at the model's own size, the last ones the whole picture. In one box: crops, "
            "encodes, samples, decodes, and puts the original's known pixels back, bit for bit.",
            search_aliases=_ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="Any image model, inpainting or plain, with its LoRAs and patches."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What shall be in the hole. Areas, masks and ControlNets are for the whole picture, and are cropped "
                    "along.",
                ),
                io.Conditioning.Input("negative", tooltip="What shall not be in the hole."),
                *_picture_inputs(),
                io.Int.Input("steps", default=30, min=1, max=1000, tooltip="Of both stages together."),
                cfg_input(4.0),
                io.Combo.Input(
                    "sampler_name",
                    options=KSampler.SAMPLERS,
                    default="dpmpp_2m_sde",
                    tooltip="One that remembers its last steps begins anew at the switch.",
                ),
                scheduler_input("karras"),
                *_stage_inputs(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Less than 1 begins with less noise on what is under the hole.",
                ),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        vae: io.Vae.Type,
        image: io.Image.Type,
        mask: io.Mask.Type,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        **method: Any,
    ) -> io.NodeOutput:
        log_noise("DreamMix", mask=mask)
        guider = CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        # The host's rules for some samplers, and for a denoise below 1.
        sigmas = KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options).sigmas
        sampler = sampler_object(sampler_name)
        run = Run(guider=guider, vae=vae, sampler=sampler, sigmas=sigmas, seed=seed)
        return _sampled(run, image, mask, _two_stages(**method), cls.hidden.unique_id)


class TrueFillDreamMixSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillDreamMixSampler",
            display_name="DreamMix Sampler (TrueFill)",
            category="TrueFill/5 sample",
            description="DreamMix with a GUIDER, a SAMPLER and SIGMAS of your own, as SamplerCustomAdvanced has them: the first "
            "steps see the hole and its surroundings at the model's own size, the last ones the whole picture.",
            search_aliases=_ALIASES,
            inputs=[
                io.Guider.Input("guider", tooltip="Model and prompts: CFGGuider, BasicGuider and others."),
                io.Sampler.Input("sampler", tooltip="One that remembers its last steps begins anew at the switch."),
                io.Sigmas.Input("sigmas", tooltip="The steps of both stages together."),
                *_picture_inputs(),
                *_stage_inputs(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        guider: io.Guider.Type,
        sampler: io.Sampler.Type,
        sigmas: io.Sigmas.Type,
        vae: io.Vae.Type,
        image: io.Image.Type,
        mask: io.Mask.Type,
        seed: int,
        **method: Any,
    ) -> io.NodeOutput:
        log_noise("DreamMix Sampler", mask=mask)
        run = Run(guider=guider, vae=vae, sampler=sampler, sigmas=sigmas, seed=seed)
        return _sampled(run, image, mask, _two_stages(**method), cls.hidden.unique_id)


class TrueFillRestart(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillRestart",
            display_name="Restart From Picture (TrueFill)",
            category="TrueFill/5 sample",
            description="Lets a sampler go on from a picture in the middle of its steps: what DreamMix does between its stages, "
            "for graphs of your own. Give LATENT and SIGMAS to SamplerCustom or SamplerCustomAdvanced, which add the noise.",
            search_aliases=["dreammix", "resume sampling", "split sigmas", "img2img", "second pass", "add noise"],
            inputs=[
                io.Image.Input("image", tooltip="What the first steps have made, put back into the whole picture."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Sigmas.Input(
                    "sigmas", tooltip="All steps; the first sampler has run the first of them (Split Sigmas)."
                ),
                io.Float.Input(
                    "done",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the steps that has been done (the paper's lambda).",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The hole: only it is sampled, all that is not black. Without a mask the whole picture is.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The picture, with the hole as its noise mask."),
                io.Sigmas.Output(tooltip="The steps that are left."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: io.Image.Type,
        vae: io.Vae.Type,
        sigmas: io.Sigmas.Type,
        done: float,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        log_noise("Restart From Picture", mask=mask)
        return io.NodeOutput(*restart(image, mask, vae, sigmas, done))


class TrueFillSubstituteAttribute(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillSubstituteAttribute",
            display_name="Substitute Attribute (TrueFill)",
            category="TrueFill/3 condition",
            description="Takes attributes of a subject out of a prompt, so that what the prompt says instead counts: DreamMix's "
            "textual attribute substitution. For SD1.5, SD2 and SDXL; without words the conditioning stays as it is.",
            search_aliases=[
                "dreammix",
                "textual attribute substitution",
                "TAS",
                "concept erasure",
                "orthogonal decomposition",
                "attribute edit",
            ],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="What shall appear, with the new attribute: 'a glass toy'. From Encode Prompt, only the prompt's own "
                    "words are changed.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP that the conditioning was encoded with."),
                io.String.Input(
                    "attributes",
                    default="",
                    dynamic_prompts=True,
                    tooltip="What the subject is, and shall not be any more: 'clay, red'. Empty: nothing is changed.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 is the paper: nothing of them is left. 0 leaves the conditioning as it is.",
                ),
                io.Boolean.Input(
                    "jointly",
                    default=False,
                    advanced=True,
                    tooltip="Takes all words out at once. Off, as in the authors' code: one after another, so that words which "
                    "are alike leave a little of the first.",
                ),
                io.Boolean.Input(
                    "pooled",
                    default=True,
                    advanced=True,
                    tooltip="Takes them out of the pooled output as well, which SDXL reads.",
                ),
                io.String.Input(
                    "prefix",
                    default=PREFIX,
                    advanced=True,
                    tooltip="What stands before the attributes when they are encoded. With a tuned subject, its own word, too: "
                    "'a photo of a sks'.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Goes wherever CONDITIONING goes.")],
        )

    @classmethod
    def execute(
        cls,
        conditioning: io.Conditioning.Type,
        clip: io.Clip.Type,
        attributes: str,
        strength: float,
        jointly: bool,
        pooled: bool,
        prefix: str,
    ) -> io.NodeOutput:
        words = attribute_words(attributes)
        if not words or strength == 0.0:
            return io.NodeOutput(conditioning)
        embedded = embed_attributes(clip, words, prefix)
        return io.NodeOutput(without_attributes(conditioning, embedded, strength, jointly, pooled))


NODES = [TrueFillDreamMix, TrueFillDreamMixSampler, TrueFillRestart, TrueFillSubstituteAttribute]
