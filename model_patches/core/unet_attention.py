"""Where the transformer blocks of a Stable Diffusion UNet are, and how coarse the grid is on which each of them works."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    SpatialTransformer,
    SpatialVideoTransformer,
    attention_pytorch,
    optimized_attention,
)
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample

GRIDS = {"1/32": (4,), "1/16": (2,), "both": (2, 4)}
"""Where attention may be read, as a part of the picture's side: latent cells per grid cell."""

AUTO = "auto"
_USUAL_GRID = 16
"""Cells on a side at 1/32 of the 512 pixels that Stable Diffusion 1.5 has learned on."""

Place = tuple[str, int, int]
"""("input" | "middle" | "output", index of the UNet block, index within its SpatialTransformer)."""


@dataclass(frozen=True)
class TransformerPlace:
    """A transformer block of a UNet that reads the text."""

    place: Place
    module: BasicTransformerBlock
    cross: CrossAttention
    """Its cross-attention, `module.attn2`."""
    factor: int
    """How many times coarser than the latent its grid is: 1, 2, 4 or 8."""


def transformer_places(unet: UNetModel) -> list[TransformerPlace]:
    """The UNet's transformer blocks with cross-attention, in the order in which a forward pass reaches them."""
    found: list[TransformerPlace] = []
    factor = 1
    middle = [unet.middle_block] if unet.middle_block is not None else []
    for name, blocks in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for index, block in enumerate(_layers(blocks)):
            for layer in _layers(block):
                if isinstance(layer, SpatialTransformer) and not isinstance(layer, SpatialVideoTransformer):
                    for depth, module in enumerate(layer.transformer_blocks):
                        assert isinstance(module, BasicTransformerBlock)
                        if module.attn2 is not None:
                            found.append(TransformerPlace((name, index, depth), module, module.attn2, factor))
                elif isinstance(layer, Downsample) or (isinstance(layer, ResBlock) and _resamples(layer, Downsample)):
                    factor *= 2
                elif isinstance(layer, Upsample) or (isinstance(layer, ResBlock) and _resamples(layer, Upsample)):
                    factor //= 2
    return found


def chosen_factors(grid: str, size: tuple[int, int]) -> tuple[int, ...]:
    """The levels, in latent cells per grid cell, at which attention is read in a latent of `size` (height, width).

    `grid` is one of GRIDS, or "auto": the one of 1/32 and 1/16 whose grid has the side nearest to 16 cells, as a ratio, the side
    being the geometric mean of height and width. That is 1/32 from 363x363 pixels upwards, so at 512 and 768 with SD1.5 and SD2
    and at 1024 with SDXL, and 1/16 below.
    """
    if grid != AUTO:
        return GRIDS[grid]
    side = math.sqrt(size[0] * size[1])
    return min(((4,), (2,)), key=lambda factors: abs(math.log(side / factors[0] / _USUAL_GRID)))


def require_grids(unet: UNetModel, grid: str, who: str) -> None:
    """Raises ValueError, in one sentence that begins with `who`, for a UNet without cross-attention where `grid` may read it."""
    present = {t.factor for t in transformer_places(unet)}
    needed = {factor for name, factors in GRIDS.items() if grid in (name, AUTO) for factor in factors}
    if missing := sorted(needed - present):
        raise ValueError(
            f"{who} reads the cross-attention at {' and '.join(f'1/{8 * factor}' for factor in missing)} of the picture, and "
            "this UNet has none there; load an SD1.5, SD2 or SDXL checkpoint."
        )


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any], **kwargs: Any
) -> torch.Tensor:
    """The host's attention, as a block calls it: what is used where no pack has replaced it."""
    return optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options["attn_precision"],
        transformer_options=extra_options,
        **kwargs,
    )


def add_patch(transformer_options: dict[str, Any], kind: str, patch: Callable[..., Any]) -> None:
    """Adds an attention patch to a call's own options, behind those that are there."""
    patches = transformer_options.get("patches", {})
    transformer_options["patches"] = {**patches, kind: [*patches.get(kind, []), patch]}


def use_differentiable_attention(transformer_options: dict[str, Any]) -> None:
    """Overrides attention in a call's own options where a graph is recorded: fast kernels may have no backward pass."""
    earlier = transformer_options.get("optimized_attention_override")

    def attend(chosen: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            return attention_pytorch(*args, **kwargs)
        return chosen(*args, **kwargs) if earlier is None else earlier(chosen, *args, **kwargs)

    transformer_options["optimized_attention_override"] = attend


def _layers(block: object) -> Iterable[torch.nn.Module]:
    return block  # type: ignore[return-value]  # ModuleList and Sequential are iterable, torch's stubs type items loosely


def _resamples(block: ResBlock, kind: type) -> bool:
    return isinstance(getattr(block, "h_upd", None), kind)


def require_unet(model: object, who: str) -> UNetModel:
    """Returns the UNet inside a host MODEL.

    Raises ValueError, in one sentence that names the families that work, where `who` (a node's name) has nothing to act on.
    """
    inner = getattr(model, "model", model)
    unet = getattr(inner, "diffusion_model", None)
    families = "SD1.5, SD2 and SDXL checkpoints (inpainting or plain)"
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"{who} works on {families}, which have a UNet with cross-attention; this MODEL is {type(inner).__name__}. "
            "Load one of those checkpoints."
        )
    usable = [t for t in transformer_places(unet) if not t.module.disable_self_attn]
    if not any(t.factor in (2, 4) and t.place[0] != "middle" for t in usable):
        raise ValueError(
            f"{who} works on {families}; this UNet ({type(inner).__name__}) has no self-attention with a text prompt at 1/16 "
            "or 1/32 of the picture. Load one of those checkpoints."
        )
    return unet
