"""Masks such as people draw, made from a mask that follows an object: boxes, brushed outlines, hulls, scribbles.

PainterNet (section 3.4 and algorithm 1) trains with such masks and publishes no constants; those below are ours. Lengths are
relative to the root of the object's area, so that a mask looks the same at every resolution.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from .masks import hole_of
from .morphology import bounding_boxes, convex_hull, grow

Shape = Literal["painternet", "box", "irregular", "convex hull", "scribble", "as it is"]

PAINTERNET_SHARES = (0.25, 0.75)
"""k at most the first: a box; at most the second: irregular; else the mask as it is."""
DILATION = (0.05, 0.25)
"""Range of the distance by which an irregular mask grows first, times 1 - the object's share of the picture: what fills the
picture grows less."""
STROKE_PARTS = (2, 6)
"""How many strokes follow each other from one starting point."""
STROKE_LENGTH = (0.1, 0.5)
BRUSH_WIDTH = (0.08, 0.25)
SCRIBBLE_POINTS = (6, 12)
SCRIBBLE_WIDTH = (0.12, 0.25)


def mask_shape(mask: torch.Tensor, shape: Shape, seed: int = 0, growth: float = 0.25, strokes: int = 4) -> torch.Tensor:
    """Makes masks of another shape from masks as for `as_mask_batch`; all above their noise is hole.

    shape: "box": the object's box, each side moved out by a random part of up to `growth` of the box's own side. "irregular":
        grown, then up to `strokes` times painted over with lines, circles and squares that start in it (algorithm 1).
        "convex hull". "scribble": one quick stroke to and fro over the object, which need not cover it. "painternet": for
        each picture one of box, irregular and as it is, at 25, 50 and 25 %. "as it is": 1 where there is hole.

    A picture depends on `seed` and its place in the batch alone; one without a hole stays empty. Returns float32 [B, 1, H, W]
    of 0 and 1. Raises ValueError for an unknown shape, and for a negative growth or number of strokes.
    """
    if shape not in get_args(Shape):
        raise ValueError(f"There is no mask shape '{shape}'; choose one of {', '.join(get_args(Shape))}.")
    if not (growth >= 0 and strokes >= 0):
        raise ValueError(f"growth is {growth} and strokes {strokes}, but neither may be negative.")
    holes = hole_of(mask).float()
    made = []
    for index, hole in enumerate(holes.split(1)):
        rng = np.random.default_rng((seed, index))
        kind = _painternet_kind(rng) if shape == "painternet" else shape
        made.append(_shaped(hole, kind, rng, growth, strokes) if bool(hole.any()) else hole)
    return torch.cat(made)


def _painternet_kind(rng: np.random.Generator) -> Shape:
    k = rng.random()
    boxes, irregular = PAINTERNET_SHARES
    return "box" if k <= boxes else "irregular" if k <= irregular else "as it is"


def _shaped(hole: torch.Tensor, shape: Shape, rng: np.random.Generator, growth: float, strokes: int) -> torch.Tensor:
    if shape == "box":
        return _grown_box(hole, rng, growth)
    if shape == "irregular":
        return _irregular(hole, rng, strokes)
    if shape == "convex hull":
        return convex_hull(hole)
    if shape == "scribble":
        return _scribble(hole, rng)
    return hole


def _grown_box(hole: torch.Tensor, rng: np.random.Generator, growth: float) -> torch.Tensor:
    left, top, right, bottom = bounding_boxes(hole)[0].tolist()
    height, width = bottom - top, right - left
    above, below, before, after = rng.uniform(0.0, growth, 4) * (height, height, width, width)
    made = torch.zeros_like(hole)
    rows = slice(max(0, round(top - above)), round(bottom + below))
    columns = slice(max(0, round(left - before)), round(right + after))
    made[..., rows, columns] = 1.0
    return made


def _irregular(hole: torch.Tensor, rng: np.random.Generator, strokes: int) -> torch.Tensor:
    share = float(hole.mean())
    made = grow(hole, rng.uniform(*DILATION) * (1.0 - share) * _unit(hole))
    canvas = _Canvas(made)
    for _ in range(int(rng.integers(1, strokes + 1)) if strokes else 0):
        point = canvas.point_inside(rng)
        for _ in range(int(rng.integers(STROKE_PARTS[0], STROKE_PARTS[1] + 1))):
            angle, width = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(*BRUSH_WIDTH) * _unit(hole)
            step = rng.uniform(*STROKE_LENGTH) * _unit(hole) * np.array([np.sin(angle), np.cos(angle)])
            end = np.clip(point + step, 0.0, canvas.far_corner)
            brush = rng.integers(3)
            # Circles and squares end a line, so that nothing lies apart from the object.
            canvas.line(point, end, width)
            if brush == 1:
                canvas.line(end, end, 2.0 * width)
            elif brush == 2:
                canvas.square(end, 2.0 * width, angle)
            point = end
    return canvas.picture


def _scribble(hole: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """To and fro across the object's longer direction, as with a wide brush."""
    canvas = _Canvas(torch.zeros_like(hole))
    cells = hole[0, 0].nonzero().cpu().double().numpy()
    middle = cells.mean(0)
    # Of a single pixel there is no direction.
    axis = np.linalg.svd(cells - middle, full_matrices=False)[2][0] if len(cells) > 1 else np.array([0.0, 1.0])
    count = int(rng.integers(SCRIBBLE_POINTS[0], SCRIBBLE_POINTS[1] + 1))
    along, across = (cells - middle) @ axis, (cells - middle) @ np.array([-axis[1], axis[0]])
    width = rng.uniform(*SCRIBBLE_WIDTH) * _unit(hole)
    bounds = np.linspace(along.min(), along.max(), count + 1)
    points = []
    for index in range(count):
        band = np.flatnonzero((along >= bounds[index]) & (along <= bounds[index + 1]))
        if band.size:
            # The stroke turns in the outer thirds, on either side in turn.
            side = across[band] * (1 if index % 2 else -1)
            outer = band[side >= np.quantile(side, 2.0 / 3.0)]
            points.append(cells[rng.choice(outer)])
    for start, end in zip(points, points[1:] or points, strict=False):
        canvas.line(start, end, width)
    return canvas.picture


def _unit(hole: torch.Tensor) -> float:
    """The root of the object's area, in pixels."""
    return float(hole.sum()) ** 0.5


class _Canvas:
    """A mask [1, 1, H, W] that is painted on. Points are (row, column) of pixel centres."""

    def __init__(self, picture: torch.Tensor) -> None:
        self.picture = picture.clone()
        height, width = picture.shape[-2:]
        self.far_corner = np.array([height - 1.0, width - 1.0])
        self._rows = torch.arange(height, dtype=torch.float32, device=picture.device)[:, None]
        self._columns = torch.arange(width, dtype=torch.float32, device=picture.device)

    def point_inside(self, rng: np.random.Generator) -> np.ndarray:
        """A random pixel that is painted."""
        painted = self.picture[0, 0].nonzero()
        return painted[int(rng.integers(len(painted)))].cpu().double().numpy()

    def line(self, start: np.ndarray, end: np.ndarray, width: float) -> None:
        """A stroke of a round brush: every pixel within half of `width` of the line; the nearest pixel at least."""
        down, right = (end - start).tolist()
        rows, columns = self._rows - float(start[0]), self._columns - float(start[1])
        length = down * down + right * right
        part = ((rows * down + columns * right) / length).clamp(0.0, 1.0) if length else 0.0
        distance = ((rows - part * down) ** 2 + (columns - part * right) ** 2).sqrt()
        self._paint(distance <= max(width / 2.0, 0.71))

    def square(self, centre: np.ndarray, side: float, angle: float) -> None:
        """A filled square, turned by `angle` (radians)."""
        rows, columns = self._rows - float(centre[0]), self._columns - float(centre[1])
        sine, cosine = float(np.sin(angle)), float(np.cos(angle))
        reach = torch.maximum((rows * cosine + columns * sine).abs(), (columns * cosine - rows * sine).abs())
        self._paint(reach <= max(side / 2.0, 0.71))

    def _paint(self, pixels: torch.Tensor) -> None:
        self.picture[0, 0][pixels] = 1.0
