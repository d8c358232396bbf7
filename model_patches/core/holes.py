"""Where the hole of a sampling run is: the one place in which it is looked for."""

from __future__ import annotations

from typing import Any

import torch

from ...imaging.masks import as_mask_batch, coverage
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
    hole = coverage(as_mask_batch(mask).to(noise.device), (noise.shape[-2], noise.shape[-1]))
    return repeat_to_batch(hole, noise.shape[0])
