"""HD-Painter's nodes: PAIntA and RASG guide a model, and its super-resolution brings a filled hole into the large picture."""

from comfy.samplers import KSampler
from comfy_api.latest import io

from ..imaging.harmonize import ColorMode, Harmony, Mode
from ..imaging.masks import log_noise, resize_mask
from ..imaging.super_resolution import widened
from ..model_patches.core.diffusion import Diffusion
from ..model_patches.core.sampling_run import with_method
from ..model_patches.core.unet_attention import AUTO
from ..model_patches.hd_painter.known_blending import with_known
from ..model_patches.hd_painter.painta import PAIntA
from ..model_patches.hd_painter.rasg import RASG
from ..model_patches.hd_painter.super_resolution import MAX_NOISE_LEVEL, Layout, UpscaleSampling, upscale_hole
from .announce import announcer
from .schema import (
    GUIDED_MODELS,
    cfg_input,
    check_window,
    end_percent_input,
    grid_input,
    harmonize_inputs,
    hole_input,
    layers_input,
    scheduler_input,
    seed_input,
    start_percent_input,
)


class TrueFillPAIntA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillPAIntA",
            display_name="PAIntA: Prompt-Aware Attention (TrueFill)",
            category="TrueFill/4 guide",
            description="Lets the hole look less at known pixels that have nothing to do with the prompt, so that the "
            "background and nearby objects do not take the hole over. HD-Painter's Prompt-Aware Introverted Attention, for "
            "SD1.5, SD2 and SDXL, Flux, Qwen-Image, Z-Image, SD3 and others, inpainting and plain; training-free.",
            search_aliases=[
                "hd-painter",
                "hdpainter",
                "prompt-aware introverted attention",
                "prompt neglect",
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
                    tooltip="1 is the paper; 0 leaves the model as it is.",
                ),
                start_percent_input(),
                end_percent_input(0.5, "The paper's default is the first half of sampling."),
                io.Boolean.Input(
                    "smooth",
                    default=True,
                    advanced=True,
                    tooltip="Smooths the relevance map with a 3x3 kernel, as the authors' code does (the paper does not "
                    "mention it).",
                ),
                hole_input(),
                layers_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with PAIntA. Works with every sampler and with RASG.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        strength: float,
        start_percent: float,
        end_percent: float,
        smooth: bool,
        mask: io.Mask.Type | None = None,
        layers: str = "all",
    ) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        log_noise("PAIntA", mask=mask)
        settings = PAIntA(
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
            smooth=smooth,
            mask=mask,
            layers=layers,
        )
        return io.NodeOutput(with_method(model, settings))


class TrueFillRASG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillRASG",
            display_name="RASG: Attention Score Guidance (TrueFill)",
            category="TrueFill/4 guide",
            description="Replaces the noise that a stochastic sampler adds by a gradient that pulls the prompt into the hole. "
            "HD-Painter's Reweighting Attention Score Guidance. euler, ddim and dpmpp_2m run in their stochastic form; a "
            "sampler that has no such form gives a message that names those which work.",
            search_aliases=[
                "hd-painter",
                "hdpainter",
                "reweighting attention score guidance",
                "prompt neglect",
                "inpaint",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2 or SDXL model."),
                io.Float.Input(
                    "eta",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip="How much of each step's noise level comes from the gradient, as DDIM's eta; it takes the place of "
                    "the sampler's own eta. 0.01 is what the authors' results correspond to: the 0.25 in their paper belongs "
                    "to a sigma some 25 times smaller. More pulls harder, and above 0.02 what appears is wrong more often.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the noise that the gradient replaces; the rest stays random. 0 leaves the model as it "
                    "is.",
                ),
                start_percent_input(),
                end_percent_input(1.0, "The paper's default is all of sampling."),
                io.Combo.Input(
                    "sigma",
                    options=["ddim", "released"],
                    default="ddim",
                    advanced=True,
                    tooltip="ddim: the paper's formula. released: the smaller sigma of the authors' code, to be used with eta "
                    "0.1 to 0.25 and with euler, ddim or euler_ancestral.",
                ),
                hole_input(),
                grid_input(" The paper's is 1/32. 1/16 and both take a little longer."),
            ],
            outputs=[io.Model.Output(tooltip="The model with RASG. About 1.3 to 1.6 times the time of a plain step.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        eta: float,
        strength: float,
        start_percent: float,
        end_percent: float,
        sigma: str,
        mask: io.Mask.Type | None = None,
        grid: str = AUTO,
    ) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        log_noise("RASG", mask=mask)
        settings = RASG(
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
            eta=eta,
            sigma=sigma,
            grid=grid,
            mask=mask,
        )
        return io.NodeOutput(with_method(model, settings))


class TrueFillUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillUpscale",
            display_name="Upscale Inpainted (TrueFill)",
            category="TrueFill/6 finish",
            description="Brings an inpainting that was made on a small picture into the large original: detail in the hole is "
            "made new, next to the original's own, in as many tiles as the hole needs. HD-Painter's inpainting-specialised "
            "super-resolution. Everything outside of the widened hole is the original, bit for bit.",
            search_aliases=[
                "hd-painter",
                "super resolution",
                "2k",
                "4k",
                "x4 upscaler",
                "tiled upscale",
                "hires fix",
                "high resolution inpaint",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The large original, at its own size."),
                io.Image.Input(
                    "inpainted",
                    tooltip="The whole picture after inpainting, smaller or of the same size (Stitch Region's, say).",
                ),
                io.Mask.Input("mask", tooltip="The hole: everything that is not black is made new."),
                seed_input("Seed of the noise. Each picture of a batch has noise of its own."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="How often each tile is sampled."),
                cfg_input(),
                io.Combo.Input(
                    "sampler_name",
                    options=KSampler.SAMPLERS,
                    default="ddim",
                    tooltip="ddim, euler and euler_ancestral take the paper's step exactly.",
                ),
                scheduler_input("normal"),
                io.Int.Input(
                    "noise_level",
                    default=20,
                    min=0,
                    max=MAX_NOISE_LEVEL,
                    tooltip="Only for the x4 upscaler: noise on the small picture. More invents more, less stays closer.",
                ),
                io.Float.Input(
                    "denoise",
                    default=0.35,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Only for other models: how much of the enlarged picture is made new.",
                ),
                io.Int.Input(
                    "tile",
                    default=512,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip="Side in pixels of what the model sees at once; 0 takes all at once. Memory goes by its square, "
                    "not by the picture's size.",
                ),
                io.Int.Input(
                    "overlap",
                    default=128,
                    min=0,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Pixels that neighbouring tiles share at least, and are mixed in.",
                ),
                io.Int.Input(
                    "expand",
                    default=19,
                    min=0,
                    max=512,
                    advanced=True,
                    tooltip="Pixels around the hole that are made new as well, so that the edge lies where both pictures agree.",
                ),
                *harmonize_inputs("poisson"),
                io.Model.Input(
                    "model", optional=True, tooltip="The x4 upscaler, or any other model for img2img in tiles."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What is in the hole, with the model's own CLIP. The authors add 'high resolution professional "
                    "photo'.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="The authors leave it empty."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The model's own VAE; the x4 upscaler has another one than SD1.5."
                ),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip="Enlarges the inpainted picture (ESRGAN and such): by itself, or before img2img.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The original with the new hole."),
                io.Mask.Output(
                    tooltip="Where the picture may have changed, for Compare: the hole widened by 'expand'."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: io.Image.Type,
        inpainted: io.Image.Type,
        mask: io.Mask.Type,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        noise_level: int,
        denoise: float,
        tile: int,
        overlap: int,
        expand: int,
        harmonize: Mode,
        color: ColorMode,
        band: int,
        mixed_gradients: bool,
        model: io.Model.Type | None = None,
        positive: io.Conditioning.Type | None = None,
        negative: io.Conditioning.Type | None = None,
        vae: io.Vae.Type | None = None,
        upscale_model: io.UpscaleModel.Type | None = None,
    ) -> io.NodeOutput:
        diffusion = None
        parts = {"model": model, "positive": positive, "negative": negative, "vae": vae}
        missing = [name for name, part in parts.items() if part is None]
        if not missing:
            diffusion = Diffusion(model=model, positive=positive, negative=negative, vae=vae)
        elif len(missing) < len(parts):
            raise ValueError(
                f"Upscale has no {' and no '.join(missing)}: a model needs all four of model, positive, negative and vae, and "
                "an upscale model none of them."
            )
        if tile and overlap >= tile:
            raise ValueError(f"The overlap of {overlap} pixels must be less than the tile, {tile}.")
        log_noise("Upscale Inpainted", mask=mask)
        result = upscale_hole(
            image,
            inpainted,
            mask,
            diffusion,
            upscale_model,
            UpscaleSampling(
                seed=seed,
                steps=steps,
                cfg=cfg,
                scheduler=scheduler,
                sampler_name=sampler_name,
                noise_level=noise_level,
                denoise=denoise,
            ),
            Layout(tile=tile, overlap=overlap, expand=expand),
            Harmony(mode=harmonize, color=color, band=band, mixed=mixed_gradients),
            announcer(cls.hidden.unique_id),
        )
        changed = widened(resize_mask(mask, image.shape[1:3]), expand).expand(len(result), -1, -1)
        return io.NodeOutput(result, changed)


class TrueFillBlendKnown(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillBlendKnown",
            display_name="Blend Known Latent (TrueFill)",
            category="TrueFill/6 finish",
            description="Keeps what is known while any sampler runs: at every step the predicted clean latent takes the known "
            "one's place outside of the hole, without noise in it. The building block of Upscale Inpainted (HD-Painter, "
            "equation 10), for a sampler of your own.",
            search_aliases=["hd-painter", "x0 blend", "latent blending", "blended diffusion", "inpaint", "noise mask"],
            inputs=[
                io.Model.Input("model", tooltip="Any image model; the x4 upscaler for the paper's method."),
                io.Latent.Input("known", tooltip="The original picture after VAE Encode, at the size that is sampled."),
                io.Mask.Input(
                    "mask", tooltip="The hole (white); gray is mixed. A soft edge of some cells avoids seams."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 is the paper; 0 leaves the model as it is.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, for any KSampler.")],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, known: io.Latent.Type, mask: io.Mask.Type, strength: float) -> io.NodeOutput:
        log_noise("Blend Known Latent", mask=mask)
        return io.NodeOutput(with_known(model, known["samples"], mask, strength))


NODES = [TrueFillPAIntA, TrueFillRASG, TrueFillUpscale, TrueFillBlendKnown]
