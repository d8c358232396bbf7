"""Inputs that several nodes have."""

from typing import get_args

from comfy.samplers import KSampler
from comfy_api.latest import io

from ..imaging.harmonize import ColorMode, Mode
from ..model_patches.core.joint_attention import LAYERS
from ..model_patches.core.unet_attention import AUTO, GRIDS
from ..weights.engines import TRANSFORMERS, Package


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def cfg_input(default: float = 7.5) -> io.Float.Input:
    return io.Float.Input("cfg", default=default, min=0.0, max=100.0, step=0.1, tooltip="How much the prompt counts.")


def scheduler_input(default: str) -> io.Combo.Input:
    return io.Combo.Input("scheduler", options=KSampler.SCHEDULERS, default=default, tooltip="Spacing of the steps.")


GUIDED_MODELS = (
    "An SD1.5, SD2, SDXL, SD3, Flux, Flux2, Chroma, Qwen-Image, Z-Image, Lumina 2, Krea2, HiDream, Anima, Cosmos Predict2 or Wan "
    "model."
)
"""What attention can be edited in."""


def hole_input() -> io.Mask.Input:
    """For nodes that look for the hole in the latent and the conditioning first."""
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="The hole (white). Only needed where neither the latent nor the conditioning carries the mask; where it is "
        "connected it counts.",
    )


def layers_input() -> io.Combo.Input:
    return io.Combo.Input(
        "layers",
        options=list(LAYERS),
        default="all",
        optional=True,
        advanced=True,
        tooltip="In which blocks of Flux, Qwen-Image, Z-Image and others without a UNet it acts. alternate: the second, the "
        "fourth and so on. SD1.5, SD2 and SDXL don't ask.",
    )


def grid_input(more: str = "") -> io.Combo.Input:
    """`more` follows in the tooltip."""
    return io.Combo.Input(
        "grid",
        options=[AUTO, *GRIDS],
        default=AUTO,
        advanced=True,
        tooltip="At which part of the picture's side the attention is read. auto: the one whose grid is nearest to 16x16, so "
        f"1/32 from 363x363 pixels upwards, and 1/16 below. both: the sum of the two scores.{more}",
    )


def engine_input(package: Package) -> io.Combo.Input:
    return io.Combo.Input(
        "engine",
        options=[TRANSFORMERS, package.name],
        default=TRANSFORMERS,
        optional=True,
        advanced=True,
        tooltip=f"What runs it. {package.name}: its authors' package, where it is installed, for files as they were published. "
        "Both answer the same.",
    )


def start_percent_input() -> io.Float.Input:
    return io.Float.Input(
        "start_percent",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        advanced=True,
        tooltip="Where in sampling it begins: 0 is the first step, 1 the last.",
    )


def end_percent_input(default: float, why: str) -> io.Float.Input:
    return io.Float.Input(
        "end_percent",
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        advanced=True,
        tooltip=f"Where in sampling it ends. {why}",
    )


def check_window(start_percent: float, end_percent: float) -> None:
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent ({start_percent:g}) lies behind end_percent ({end_percent:g}): set start_percent to "
            f"{end_percent:g} or less."
        )


def harmonize_inputs(default: Mode) -> list[io.Input]:
    """The widgets that become a `Harmony`; they come last, so that their order is the same on every node."""
    return [
        io.Combo.Input(
            "harmonize",
            options=list(get_args(Mode)),
            default=default,
            tooltip="color: takes the tone shift out, by comparing both pictures around the hole. poisson: keeps the gradients "
            "of what was made and meets the picture at the edge. both: colors, then poisson. off: only blends.",
        ),
        io.Combo.Input(
            "color",
            options=list(get_args(ColorMode)),
            default="mean",
            advanced=True,
            tooltip="What the colors are matched by: mean shifts them, covariance also matches contrast and tint.",
        ),
        io.Int.Input(
            "band",
            default=32,
            min=1,
            max=1024,
            advanced=True,
            tooltip="Width in pixels of the band around the hole that colors are compared in.",
        ),
        io.Boolean.Input(
            "mixed_gradients",
            default=False,
            advanced=True,
            tooltip="For poisson: keeps the stronger gradient of both pictures, so that a texture under the hole shows through.",
        ),
    ]
