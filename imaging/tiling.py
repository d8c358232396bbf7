"""Overlapping tiles over the part of a grid that is needed, and the weights that join them without a seam."""

from __future__ import annotations

import math

import torch

from .region_plan import Box


def tile_boxes(needed: torch.Tensor, side: int, overlap: int) -> list[Box]:
    """Tiles that hold every True cell of `needed` [H, W], in reading order.

    All tiles are of one size: `side` in each direction, or the whole grid where it is smaller. They lie evenly over the
    grid with at least `overlap` cells in common with each neighbour; those without a needed cell are left out.

    Raises ValueError unless 0 <= overlap < side.
    """
    if not 0 <= overlap < side:
        raise ValueError(f"The overlap is {overlap}, but must be from 0 to less than the side of a tile, {side}.")
    height, width = needed.shape
    boxes = [
        Box(left, top, left + min(side, width), top + min(side, height))
        for top in _starts(height, side, overlap)
        for left in _starts(width, side, overlap)
    ]
    return [box for box in boxes if bool(needed[box.top : box.bottom, box.left : box.right].any())]


def _starts(length: int, side: int, overlap: int) -> list[int]:
    if length <= side:
        return [0]
    count = math.ceil((length - overlap) / (side - overlap))
    return [round(index * (length - side) / (count - 1)) for index in range(count)]


def tile_weight(box: Box, size: tuple[int, int], overlap: int) -> torch.Tensor:
    """How much a tile counts in each of its cells, float32 [h, w] in (0, 1].

    It falls linearly over `overlap` cells towards each edge that lies inside the grid of `size` (height, width): where
    tiles meet, the sum of what they say is divided by the sum of their weights.
    """

    def line(start: int, stop: int, length: int) -> torch.Tensor:
        position = torch.arange(stop - start, dtype=torch.float32)
        rise = (position + 0.5) / max(overlap, 1)
        ones = torch.ones_like(position)
        before = ones if start == 0 else rise
        after = ones if stop == length else rise.flip(0)
        return torch.minimum(before, after).clamp(max=1.0)

    return line(box.top, box.bottom, size[0])[:, None] * line(box.left, box.right, size[1])
