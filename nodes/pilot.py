"""PILOT's nodes: semantic boundary control guides a model, and PILOT samples with it."""

from __future__ import annotations

from typing import Any, Literal, get_args

from comfy_api.latest import io

from ..imaging.masks import log_noise
from ..model_patches.core.diffusion import Diffusion, Sampling
from ..model_patches.core.sampling_run import with_method
from ..model_patches.pilot.inpaint import Under, inpaint
from ..model_patches.pilot.sampler import PILOT, Memory, pilot_sampler
from ..model_patches.pilot.semantic_boundary import SemanticBoundary
from .announce import announcer
from .schema import (
    GUIDED_MODELS,
    cfg_input,
    check_window,
    end_percent_input,
    hole_input,
    layers_input,
    scheduler_input,
    seed_input,
    start_percent_input,
)

Preset = Literal["text", "adapters", "custom"]
_COHERENCE: dict[Preset, float] = {"text": 1.0, "adapters": 0.8}


class TrueFillSemanticBoundary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillSemanticBoundary",
            display_name="SBC: Semantic Boundary (TrueFill)",
            category="TrueFill/4 guide",
            description="Keeps the prompt inside the hole: known pixels do not read its words. PILOT's semantic boundary "
            "control, for SD1.5, SD2 and SDXL, Flux, Qwen-Image, Z-Image, SD3 and others, plain and inpainting; training-free.",
            search_aliases=[
                "pilot",
                "sbc",
                "semantic boundary control",
                "attention mask",
                "regional prompt",
                "inpaint",
            ],
            inputs=[
                io.Model.Input("model", tooltip=GUIDED_MODELS),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="1 is the paper: the words are silent at known pixels. 0 leaves the model as it is.",
                ),
                start_percent_input(),
                end_percent_input(1.0, "The paper's default is all of sampling."),
                hole_input(),
                layers_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the boundary. Works with every sampler, PAIntA and RASG.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        strength: float,
        start_percent: float,
        end_percent: float,
        mask: io.Mask.Type | None = None,
        layers: str = "all",
    ) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        log_noise("SBC", mask=mask)
        settings = SemanticBoundary(
            strength=strength, start_percent=start_percent, end_percent=end_percent, mask=mask, layers=layers
        )
        return io.NodeOutput(with_method(model, settings))


def _pilot_inputs() -> list[io.Input]:
    """The method's own widgets; they become a `PILOT`."""
    return [
        io.Combo.Input(
            "preset",
            options=[*_COHERENCE, "custom"],
            default="text",
            tooltip="The authors' coherence. text: 1, optimized to the end. adapters: 0.8, for ControlNet, T2I-Adapter and "
            "IP-Adapter. custom: as the next widget says.",
        ),
        io.Float.Input(
            "coherence",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="For the preset 'custom': the share of the noise schedule in which the latent is optimized (the paper's "
            "gamma). After that the noised original is put into the known part. Less is faster.",
        ),
        io.Int.Input(
            "interval",
            default=10,
            min=1,
            max=1000,
            tooltip="Optimize every Nth step. More than there are steps: none.",
        ),
        io.Int.Input(
            "iterations", default=10, min=0, max=1000, tooltip="Passes of the optimizer at each of those steps."
        ),
        io.Float.Input(
            "learning_rate",
            default=0.025,
            min=0.0,
            max=10.0,
            step=0.001,
            round=0.0001,
            advanced=True,
            tooltip="Learning rate of the optimizer; it grows towards the end, by 1.002 for each of the 1000 timesteps.",
        ),
        io.Float.Input(
            "first_rate",
            default=0.007,
            min=0.0,
            max=10.0,
            step=0.001,
            round=0.0001,
            advanced=True,
            tooltip="The learning rate at the first step.",
        ),
        io.Float.Input(
            "momentum", default=0.7, min=0.0, max=0.99, step=0.01, advanced=True, tooltip="Momentum of the optimizer."
        ),
        io.Float.Input(
            "coefficient",
            default=150.0,
            min=0.0,
            max=100000.0,
            step=1.0,
            advanced=True,
            tooltip="How much the prompt's attention in the hole counts against the known part that shall stay.",
        ),
        io.Float.Input(
            "boundary",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Strength of semantic boundary control: 1, the paper, keeps the prompt's words out of the known part; 0 is "
            "off. A Semantic Boundary node on the model counts instead.",
        ),
        io.Combo.Input(
            "memory",
            options=list(get_args(Memory)),
            default="auto",
            advanced=True,
            tooltip="record: keeps all that the backward pass needs. recompute: keeps little and computes the rest again, which "
            "is slower. auto: recompute where memory is short.",
        ),
    ]


def _pilot(
    preset: Preset,
    coherence: float,
    interval: int,
    iterations: int,
    learning_rate: float,
    first_rate: float,
    momentum: float,
    coefficient: float,
    boundary: float,
    memory: Memory,
    mask: io.Mask.Type | None = None,
) -> PILOT:
    return PILOT(
        gamma=_COHERENCE.get(preset, coherence),
        interval=interval,
        iterations=iterations,
        learning_rate=learning_rate,
        first_learning_rate=first_rate,
        momentum=momentum,
        coefficient=coefficient,
        boundary=boundary,
        memory=memory,
        mask=mask,
    )


_ALIASES = ["pilot", "latent optimization", "latent optimisation", "inpaint with any model", "blended diffusion"]


class TrueFillPILOTSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillPILOTSampler",
            display_name="PILOT Sampler (TrueFill)",
            category="TrueFill/5 sample",
            description="Makes any SD1.5, SD2 or SDXL text-to-image model an inpainting model, without training: while it "
            "samples, the latent is optimized so that the known part stays and the prompt lands in the hole. For SamplerCustom "
            "and SamplerCustomAdvanced, with a latent that holds the whole picture and its mask (Set Latent Noise Mask).",
            search_aliases=_ALIASES,
            inputs=[
                *_pilot_inputs(),
                hole_input(),
            ],
            outputs=[
                io.Sampler.Output(
                    tooltip="The sampler. It is DDIM with passes in between; the known part of its latent is near the original, "
                    "so put the original's pixels back (Stitch Region, ImageCompositeMasked)."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, mask: io.Mask.Type | None = None, **method: Any) -> io.NodeOutput:
        log_noise("PILOT Sampler", mask=mask)
        return io.NodeOutput(pilot_sampler(_pilot(mask=mask, **method), announcer(cls.hidden.unique_id)))


class TrueFillPILOT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillPILOT",
            display_name="PILOT: Inpaint With Any Model (TrueFill)",
            category="TrueFill/5 sample",
            description="Fills the hole with any SD1.5, SD2 or SDXL text-to-image model, in one box: encodes, samples with "
            "PILOT, decodes, and puts the original's known pixels back, bit for bit.",
            search_aliases=_ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="A text-to-image model, with its LoRAs; not an inpainting one."),
                io.Conditioning.Input(
                    "positive", tooltip="What shall be in the hole; with ControlNet or adapters, if you like."
                ),
                io.Conditioning.Input("negative", tooltip="What shall not be in the hole."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input("image", tooltip="The picture."),
                io.Mask.Input("mask", tooltip="The hole: everything that is not black."),
                seed_input("Seed of the noise."),
                io.Int.Input(
                    "steps", default=100, min=1, max=1000, tooltip="The authors' code takes 100, their paper 200."
                ),
                cfg_input(),
                scheduler_input("ddim_uniform"),
                *_pilot_inputs(),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=512,
                    tooltip="Width in pixels of a soft edge outside of the hole, in which new and old are mixed.",
                ),
                io.Combo.Input(
                    "under_hole",
                    options=list(get_args(Under)),
                    default="blurred",
                    optional=True,
                    advanced=True,
                    tooltip="What the VAE sees in the hole, since it sees across the edge. blurred: the colors around it. "
                    "original: what the picture shows there, as in the authors' code.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The whole picture's latent, before the known pixels are put back."),
                io.Image.Output(tooltip="The picture with its hole filled; the rest is the original, bit for bit."),
            ],
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
        scheduler: str,
        feather: int,
        under_hole: Under = "blurred",
        **method: Any,
    ) -> io.NodeOutput:
        log_noise("PILOT", mask=mask)
        latent, pictures = inpaint(
            image,
            mask,
            Diffusion(model=model, positive=positive, negative=negative, vae=vae),
            Sampling(seed=seed, steps=steps, cfg=cfg, scheduler=scheduler),
            _pilot(**method),
            feather,
            under_hole,
            announcer(cls.hidden.unique_id),
        )
        return io.NodeOutput({"samples": latent}, pictures)


NODES = [TrueFillSemanticBoundary, TrueFillPILOTSampler, TrueFillPILOT]
