"""Fits what was generated into the picture around it: colors, gradients, or both, and then the blend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .color import match_color
from .masks import as_mask_batch, resize_mask
from .pictures import common_count
from .poisson import poisson_blend

Mode = Literal["off", "color", "poisson", "both"]
ColorMode = Literal["mean", "covariance"]


@dataclass(frozen=True)
class Harmony:
    """What is done about a change of tone at the edge of a hole.

    mode: "color" matches the new picture to the old one by the statistics of a `band` of so many pixels around the hole
        (`match_color`, which explains `color`). "poisson" keeps the new picture's gradients and meets the old one at the
        edge (`poisson_blend`, which explains `mixed`). "both" matches colors and then blends. "off" only blends.

    Raises ValueError for an unknown mode.
    """

    mode: Mode = "both"
    color: ColorMode = "mean"
    band: int = 32
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"There is no way to harmonize '{self.mode}'; choose one of {', '.join(get_args(Mode))}.")


FULL, POISSON, ONLY_BLEND = Harmony(), Harmony("poisson"), Harmony("off")


def harmonize(
    source: torch.Tensor, destination: torch.Tensor, mask: torch.Tensor, harmony: Harmony = FULL
) -> torch.Tensor:
    """Puts the hole of `source` into `destination` without a change of tone at its edge.

    `source` (a whole generated picture) and `destination` are [B, C, H, W] in [0, 1]; `mask` is as for `as_mask_batch`, of the
    same size; a batch of 1 goes with every picture. The hole is all of the mask above its noise; its gray values blend the
    outcome with the destination, so that a feathered edge stays one. Where there is no hole the result is the destination,
    bit for bit.

    Returns [B, C, H, W] in the destination's type. Raises ValueError and RuntimeError as `match_color` and `poisson_blend`.
    """
    weight = as_mask_batch(mask).to(destination.device)
    hole = (weight > 0).float()
    fitted = source.to(destination)
    if harmony.mode in ("color", "both"):
        everywhere = harmony.mode == "both"
        fitted = match_color(fitted, destination, hole, harmony.band, harmony.color, everywhere=everywhere)
    if harmony.mode in ("poisson", "both"):
        fitted = poisson_blend(fitted, destination, hole, harmony.mixed)
    return _blended(fitted, destination, weight)


def harmonize_pictures(
    new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, harmony: Harmony = FULL
) -> torch.Tensor:
    """`harmonize` for pictures as the host has them, [B, H, W, 3 or 4], with a mask of any size.

    The result has the old picture's channels. Alpha is blended where both have it; else the old one's stays. Raises
    ValueError, in the words of the node Harmonize, for pictures of different sizes and batches that don't go together.
    """
    if new.shape[1:3] != old.shape[1:3]:
        raise ValueError(
            f"'image' is {new.shape[2]}x{new.shape[1]} pixels and 'original' {old.shape[2]}x{old.shape[1]}: they have to be of "
            "one size, so scale or crop one of them first."
        )
    mask = resize_mask(mask, old.shape[1:3])
    common_count(image=len(new), original=len(old), mask=len(mask))
    source, destination = new.movedim(-1, 1), old.movedim(-1, 1)
    parts = [harmonize(source[:, :3], destination[:, :3], mask, harmony)]
    if destination.shape[1] > 3:
        alpha = destination[:, 3:].expand(len(parts[0]), -1, -1, -1)
        both_have_it = source.shape[1] > 3
        parts.append(_blended(source[:, 3:].to(alpha), alpha, mask.to(alpha.device)) if both_have_it else alpha)
    return torch.cat(parts, dim=1).movedim(1, -1).contiguous()


def _blended(new: torch.Tensor, old: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`old` where the weight is 0, bit for bit, `new` where it is 1."""
    new, old, weight = torch.broadcast_tensors(new, old, weight.to(old))
    return torch.where(weight > 0, torch.lerp(old, new, weight), old)
