"""Fits what was generated into the picture around it: colours, gradients, or both, and then the blend."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .colour import match_colour
from .masks import as_mask_batch
from .poisson import poisson_blend

Mode = Literal["off", "colour", "poisson", "both"]
ColourMode = Literal["mean", "covariance"]


def harmonise(
    source: torch.Tensor,
    destination: torch.Tensor,
    mask: torch.Tensor,
    mode: Mode = "both",
    colour: ColourMode = "mean",
    band: int = 32,
    mixed: bool = False,
) -> torch.Tensor:
    """Puts the hole of `source` into `destination` without a change of tone at its edge.

    `source` (a whole generated picture) and `destination` are [B, C, H, W] in [0, 1]; `mask` is [H, W], [B, H, W] or
    [B, 1, H, W] of the same size; a batch of 1 goes with every picture. All of the mask above 0 is the hole; its grey values
    blend the outcome with the destination, so that a feathered edge stays one. Where the mask is 0 the result is the
    destination, bit for bit.

    mode: "colour" matches the source to the destination by the statistics of a `band` of so many pixels around the hole
        (`match_colour`, which explains `colour`). "poisson" keeps the source's gradients and meets the destination at the
        edge (`poisson_blend`, which explains `mixed`). "both" matches colours and then blends. "off" only blends.

    Returns [B, C, H, W] in the destination's type. Raises ValueError for an unknown mode and as the two functions do.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"There is no way to harmonise '{mode}'; choose one of {', '.join(get_args(Mode))}.")
    weight = as_mask_batch(mask).to(destination.device)
    hole = (weight > 0).float()
    fitted = source.to(destination)
    if mode in ("colour", "both"):
        fitted = match_colour(fitted, destination, hole, band, colour, everywhere=mode == "both")
    if mode in ("poisson", "both"):
        fitted = poisson_blend(fitted, destination, hole, mixed)
    weight = weight.to(destination)
    return torch.where(weight > 0, torch.lerp(destination.expand_as(fitted), fitted, weight), destination)
