"""Measures of an inpainted picture, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Z95 = 1.959964
"""Half the width of a 95 % interval of the normal distribution, in standard deviations."""


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, by Wilson's score; ValueError for a count of 0 or less."""
    if count <= 0 or not 0 <= successes <= count:
        raise ValueError(f"A share needs 0 to n successes of n > 0 trials, not {successes} of {count}.")
    share, z2 = successes / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % confidence interval of the mean (normal approximation); one value has an interval of no width."""
    tensor = torch.tensor(values, dtype=torch.float64)
    mean = float(tensor.mean())
    half = Z95 * float(tensor.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def background_error(result: torch.Tensor, scene: torch.Tensor, hole: torch.Tensor) -> float:
    """The greatest difference outside of the hole, in levels of 255.

    `result` and `scene` are [B, 3, H, W] in [0, 1], `hole` is [B, 1, H, W], 0 where nothing may change.
    """
    known = (hole == 0).expand_as(result)
    return 255.0 * float((result - scene)[known].abs().max()) if bool(known.any()) else 0.0


def background_change(made: torch.Tensor, scene: torch.Tensor, hole: torch.Tensor) -> float:
    """The mean absolute difference outside of the hole, in levels of 255; NaN where all is hole. Arguments as above."""
    known = (hole == 0).expand_as(made)
    return 255.0 * float((made - scene)[known].abs().mean())


def seam_visibility(result: torch.Tensor, scene: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """How much steeper a picture is across the hole's edge than the untouched scene there, in levels of 255: [B].

    Of all pairs of neighbouring pixels one of which is in the hole: the mean absolute difference in `result` less that in
    `scene`, so that 0 is a seam that can't be seen, and an edge of the scene's own that happens to lie there costs nothing.
    `result` and `scene` are [B, 3, H, W] in [0, 1]; `hole` is [B, 1, H, W], 1 in the hole. NaN without an edge.
    """
    inside = (hole > 0.5).float()

    def across(pixels: torch.Tensor) -> torch.Tensor:
        total = pixels.new_zeros(len(pixels))
        for axis in (2, 3):
            edge = inside.diff(dim=axis).abs()
            total = total + (pixels.diff(dim=axis).abs().mean(dim=1, keepdim=True) * edge).sum(dim=(1, 2, 3))
        return total

    pairs = sum(inside.diff(dim=axis).abs().sum(dim=(1, 2, 3)) for axis in (2, 3))
    return 255.0 * (across(result) - across(scene)) / pairs


def square_around(hole: torch.Tensor) -> tuple[int, int, int]:
    """The smallest square within the picture around a hole [H, W]: left, top, side.

    Raises ValueError where there is no hole.
    """
    rows, columns = (hole > 0.5).any(dim=1).nonzero(), (hole > 0.5).any(dim=0).nonzero()
    if len(rows) == 0:
        raise ValueError("The mask has no hole: paint at least one pixel white.")
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    height, width = hole.shape
    side = min(max(bottom - top, right - left), height, width)
    # The square goes on to both sides alike, unless the picture ends.
    top = min(max((top + bottom - side) // 2, 0), height - side)
    left = min(max((left + right - side) // 2, 0), width - side)
    return left, top, side
