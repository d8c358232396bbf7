"""Where the hole of a sampling run is: the one place in which it is looked for.

What counts as hole is the whole pack's rule (`imaging.masks`): everything above the noise of soft masks, however gray. A mask
in pixels is put on the latent grid by how much of a cell is hole. One that comes on that grid already, as the host's noise mask
does, has cells of which a part is hole and cells that are gray, and both are values between 0 and 1: a cell is taken for as much
hole as its value is of the largest one next to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...imaging.masks import as_mask_batch, hole_coverage
from .call_rows import repeat_to_batch


def hole_on_latent(
    mask: torch.Tensor | None, guider: Any, noise: torch.Tensor, denoise_mask: torch.Tensor | None, who: str
) -> torch.Tensor:
    """How much of each cell of the latent is hole, [B, 1, h, w], by `mask`, else by what the latent or the conditioning says.

    `who` is named where none of them has a mask, in a ValueError.
    """
    mask = denoise_mask if mask is None else mask
    if mask is None:
        masks = (entry.get("concat_mask") for entries in guider.conds.values() for entry in entries)
        mask = next((found for found in masks if found is not None), None)
    if mask is None:
        raise ValueError(
            f"{who} needs to know where the hole is, and neither the latent nor the conditioning has a mask: use "
            f"InpaintModelConditioning or Set Latent Noise Mask, or connect a MASK to the {who} node."
        )
    if mask.ndim == 5:
        # A model whose latents have frames, of which a picture has one.
        mask = mask[:, :, 0]
    return repeat_to_batch(
        _on_grid(as_mask_batch(mask).to(noise.device), (noise.shape[-2], noise.shape[-1])), len(noise)
    )


def _on_grid(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """How much of each cell is hole, [B, 1, height, width] in [0, 1]."""
    if tuple(mask.shape[-2:]) != size:
        return hole_coverage(mask, size)
    return mask / F.max_pool2d(mask, 3, stride=1, padding=1).clamp(min=torch.finfo(mask.dtype).tiny)
