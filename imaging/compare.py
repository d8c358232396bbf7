"""What changed between two pictures: a heat map to look at, and figures to judge by.

Differences are in levels: of 255, as in an 8-bit file, but not rounded to whole ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .masks import noise_notes, resize_mask
from .pictures import common_count

LEVELS = 255
RAMP = ((88, 36, 152), (172, 44, 148), (232, 76, 92), (252, 160, 60), (252, 255, 164))
"""The colors of a difference, from the smallest to the largest, each lighter than the one before. Black is no difference."""


@dataclass(frozen=True)
class Extent:
    """How much some pixels of a picture differ: their number, how many of them differ at all, and by how many levels."""

    pixels: int
    changed: int
    maximum: float
    mean: float

    @classmethod
    def of(cls, levels: torch.Tensor) -> Extent:
        """Of the differences of these pixels, a tensor of any shape; all figures of no pixels are 0."""
        if not levels.numel():
            return cls(0, 0, 0.0, 0.0)
        levels = levels.cpu().double()
        return cls(levels.numel(), int(levels.count_nonzero()), float(levels.max()), float(levels.mean()))

    def __str__(self) -> str:
        if not self.pixels:
            return "no pixels"
        if not self.changed:
            return f"none of {self.pixels:,} pixels changed"
        return (
            f"{self.changed:,} of {self.pixels:,} pixels changed ({_number(100 * self.changed / self.pixels)} %), "
            f"max {_number(self.maximum)}, mean {_number(self.mean)} levels"
        )


@dataclass(frozen=True)
class Figures:
    """How much one picture differs from another: outside and inside the hole of the mask; without a mask, everywhere.

    note: what was done about the mask's noise, a sentence or "".
    """

    outside: Extent
    inside: Extent | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.inside is None:
            return f"Whole picture: {self.outside}."
        return f"Outside the mask: {self.outside}.\nInside the mask: {self.inside}." + (self.note and f"\n{self.note}")


def compare(
    before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[Figures]]:
    """Compares pictures [B, H, W, 3 or 4], as they are seen: values outside of [0, 1] count as 0 or 1, NaN as 0.

    A pixel's difference is that of its channel that differs most, alpha included; a picture without alpha is opaque. The mask
    is as for `resize_mask`, of any size; all of its hole is inside, however gray. A batch of 1 goes with every picture of a
    longer one.

    Returns the heat map [B, H, W, 3] in [0, 1] (`heat_map`) and each picture's figures. Raises ValueError for pictures of
    different sizes, for numbers of pictures or masks that do not go together, for other numbers of channels, and for none.
    """
    _check(before, after)
    counts = {"before": len(before), "after": len(after)}
    hole, notes = None, []
    if mask is not None:
        hole = resize_mask(mask, before.shape[1:3])[:, 0].to(before.device) > 0
        notes = noise_notes(mask, "The mask")
        counts["mask"] = len(hole)
    maps, figures = [], []
    for index in range(common_count(**counts)):
        levels = _difference(_at(before, index), _at(after, index).to(before.device))
        maps.append(heat_map(levels))
        if hole is None:
            figures.append(Figures(Extent.of(levels)))
        else:
            inside = _at(hole, index)
            figures.append(
                Figures(Extent.of(levels[~inside]), Extent.of(levels[inside]), notes[min(index, len(notes) - 1)])
            )
    return torch.stack(maps), figures


def heat_map(levels: torch.Tensor) -> torch.Tensor:
    """The colors of differences [...] in levels: float32 [..., 3] in [0, 1].

    No difference is black. The smallest is a clear violet, and it gets lighter through red and orange to a pale yellow, on a
    logarithmic scale: the five colors of `RAMP` stand for 0, 3, 15, 63 and 255 levels.
    """
    ramp = torch.tensor(RAMP, dtype=torch.float32, device=levels.device) / LEVELS
    place = torch.log2(1 + levels.float().clamp(0, LEVELS)) / 8 * (len(RAMP) - 1)
    below = place.floor().clamp(max=len(RAMP) - 2)
    lower = below.long()
    colors = torch.lerp(ramp[lower], ramp[lower + 1], (place - below)[..., None])
    return torch.where(levels[..., None] > 0, colors, 0.0)


def _difference(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Two pictures [H, W, 3 or 4] to [H, W] levels."""
    channels = max(before.shape[-1], after.shape[-1])
    return LEVELS * (_seen(before, channels) - _seen(after, channels)).abs().amax(dim=-1)


def _seen(picture: torch.Tensor, channels: int) -> torch.Tensor:
    """A picture in float32, [0, 1], with so many channels."""
    picture = picture.float().nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return torch.nn.functional.pad(picture, (0, channels - picture.shape[-1]), value=1.0)


def _at(batch: torch.Tensor, index: int) -> torch.Tensor:
    return batch[min(index, len(batch) - 1)]


def _check(before: torch.Tensor, after: torch.Tensor) -> None:
    for name, picture in (("before", before), ("after", after)):
        if picture.ndim != 4 or 0 in picture.shape or picture.shape[-1] not in (3, 4):
            raise ValueError(
                f"'{name}' has the shape {list(picture.shape)}, but pictures are [number, height, width, 3 or 4 channels], "
                "with at least one pixel."
            )
    if before.shape[1:3] != after.shape[1:3]:
        raise ValueError(
            f"'before' is {before.shape[2]}x{before.shape[1]} pixels and 'after' {after.shape[2]}x{after.shape[1]}: they have "
            "to be of one size, so scale or crop one of them first."
        )


def _number(value: float) -> str:
    """A positive number with three digits at most; what is too small for that says so."""
    return f"{value:.3g}" if value >= 0.01 else "<0.01"
