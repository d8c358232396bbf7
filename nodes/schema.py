"""Inputs that several nodes have."""

from comfy.samplers import KSampler
from comfy_api.latest import io

from ..weights.engines import TRANSFORMERS, Package


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def cfg_input() -> io.Float.Input:
    return io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="How much the prompt counts.")


def scheduler_input(default: str) -> io.Combo.Input:
    return io.Combo.Input("scheduler", options=KSampler.SCHEDULERS, default=default, tooltip="Spacing of the steps.")


def hole_input() -> io.Mask.Input:
    """For nodes that look for the hole in the latent and the conditioning first."""
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="The hole (white). Only needed where neither the latent nor the conditioning carries the mask; where it is "
        "connected it counts.",
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
