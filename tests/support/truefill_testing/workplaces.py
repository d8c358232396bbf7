"""Holes, literal softening and cutting, and workplaces for the tests of super-resolution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy import ndimage

from devtools.pack import pack_module

large = pack_module("imaging.super_resolution")
tiling = pack_module("imaging.tiling")
Box = pack_module("imaging.region_plan").Box

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
FACTORS = [1, 4, 8]
KINDS = ["full", "pixel", "first", "last", "border", "sparse", "block"]


def random_pictures(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def hole_of(kind: str, height: int, width: int, seed: int = 0) -> torch.Tensor:
    hole = torch.zeros(height, width)
    noise = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    row, column = divmod(int(noise.argmax()), width)
    if kind == "full":
        hole[:] = 1.0
    elif kind == "pixel":
        hole[row, column] = 1.0
    elif kind == "first":
        hole[0, 0] = 1.0
    elif kind == "last":
        hole[-1, -1] = 1.0
    elif kind == "border":
        hole[:, 0] = hole[-1] = 1.0
    elif kind == "sparse":
        hole[noise > 0.999] = 1.0
    elif kind == "block":
        hole[row : row + 90, column : column + 130] = 1.0
    return hole


@st.composite
def holes(draw: st.DrawFn, longest: int = 300) -> torch.Tensor:
    """Every size, from one pixel on, and every kind of hole."""
    sides = st.one_of(st.sampled_from([1, 2, 7, 64, 131, longest]), st.integers(1, longest))
    hole = hole_of(draw(st.sampled_from(KINDS)), draw(sides), draw(sides), draw(st.integers(0, 2**31)))
    return hole


def literal_cells(hole: torch.Tensor, factor: int) -> np.ndarray:
    """The share of hole in each cell; pixels that the last cells lack are those of the picture's edge."""
    missing = [(0, -side % factor) for side in hole.shape]
    pixels = np.pad(hole.double().numpy(), missing, mode="edge")
    height, width = (side // factor for side in pixels.shape)
    return pixels.reshape(height, factor, width, factor).mean((1, 3))


def literal_softened(cells: np.ndarray, factor: int) -> np.ndarray:
    """A Gaussian of 12.8 pixels, cut off at 36 pixels, with the edge repeated."""
    reach = 36 // factor
    line = np.array([math.exp(-((distance * factor) ** 2) / (2 * 12.8**2)) for distance in range(-reach, reach + 1)])
    line /= line.sum()
    for axis in (0, 1):
        cells = ndimage.correlate1d(cells, line, axis=axis, mode="nearest")
    return cells


def shown(start: int, stop: int, side: int) -> list[int]:
    """Which of `side` pixels is seen at each position: mirrored at the first and the last, or those repeated."""
    repeated = -start >= side or stop - side >= side
    line = []
    for position in range(start, stop):
        if repeated:
            position = min(max(position, 0), side - 1)
        while not 0 <= position < side:
            position = -position if position < 0 else 2 * (side - 1) - position
        line.append(position)
    return line


def literal_part(picture: np.ndarray, box: Any) -> np.ndarray:
    rows, columns = shown(box.top, box.bottom, picture.shape[0]), shown(box.left, box.right, picture.shape[1])
    return picture[rows][:, columns]


def scaled(box: Any, factor: int) -> Any:
    return Box(*(line * factor for line in box))


def place_of(
    box: Any, factor: int = 1, side: int = 1 << 20, overlap: int = 0, needed: torch.Tensor | None = None
) -> Any:
    """A workplace on any box, with tiles all over it or where they are needed."""
    if needed is None:
        needed = torch.ones(box.height, box.width, dtype=torch.bool)
    return large.Workplace(
        box, tuple(tiling.tile_boxes(needed, side, overlap)), needed[None, None].float(), overlap, factor
    )


def whole(picture_size: tuple[int, int], factor: int) -> Any:
    """A workplace on all cells of a picture."""
    return place_of(Box(0, 0, *(math.ceil(side / factor) for side in reversed(picture_size))), factor)
