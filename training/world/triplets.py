"""Benchmark triplets as in the HD-Painter paper: a picture, a hole, and a prompt that the picture does not suggest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .attributes import COLOURS, PATTERNS, SHAPES, SIZE, Purpose, generator
from .captions import local_caption
from .holes import box_mask, grown_hull, polygon_mask
from .scenes import Layout, Scene, paint, random_layout
from .shapes import convex_hull, outlines

KINDS = ("removed hull", "removed box", "free place")
# Share of a neighbour's outline that may lie in the hole: a neighbour is context, not content.
_NEIGHBOUR_SHARE = 0.12
_SMALLEST_SIDE = 60


@dataclass(frozen=True)
class Triplet:
    """One task of the benchmark.

    `scene` is what the method sees, without the removed object; `hole` is bool [256, 256]. `prompt` asks for an object
    whose shape and colour differ from those of every object of the scene, the removed one included.
    """

    scene: Scene
    hole: np.ndarray
    prompt: str
    shape: str
    colour: str
    pattern: str
    kind: str


def _removed_hole(rng: np.random.Generator, layout: Layout, kind: str) -> tuple[Layout, np.ndarray]:
    number = int(rng.integers(len(layout.objects)))
    hull = grown_hull(layout.objects[number], rng.uniform(6, 14))
    rest = layout.objects[:number] + layout.objects[number + 1 :]
    mask = polygon_mask(hull) if kind == "removed hull" else box_mask(hull)
    return Layout(rest, layout.background), mask


def _free_hole(rng: np.random.Generator, layout: Layout) -> tuple[Layout, np.ndarray]:
    half = rng.uniform(36, 60, 2)
    x, y = rng.uniform(half + 4, SIZE - half - 4)
    corners = np.asarray([(x - half[0], y - half[1]), (x + half[0], y + half[1])])
    return layout, box_mask(corners)


def _is_clear(layout: Layout, hole: np.ndarray) -> bool:
    """Whether a hole is large enough and takes next to nothing of any object."""
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    if min(np.ptp(rows), np.ptp(columns)) + 1 < _SMALLEST_SIDE:
        return False
    for item in layout.objects:
        outline = polygon_mask(convex_hull(outlines(item)[0]))
        if (outline & hole).sum() > _NEIGHBOUR_SHARE * outline.sum():
            return False
    return True


def make_triplet(split: str, index: int) -> Triplet:
    """One triplet of a split: the same for the same arguments, and of a scene that no other stream contains."""
    for attempt in range(1000):
        rng = generator(split, index, Purpose.TRIPLET, attempt)
        layout = random_layout(rng)
        kind = str(rng.choice(KINDS))
        found = _free_hole(rng, layout) if kind == "free place" else _removed_hole(rng, layout, kind)
        if not _is_clear(*found):
            continue
        taken_shapes = {item.shape for item in layout.objects}
        taken_colours = {item.colour for item in layout.objects}
        shape = str(rng.choice([name for name in SHAPES if name not in taken_shapes]))
        colour = str(rng.choice([name for name in COLOURS if name not in taken_colours]))
        pattern = str(rng.choice(PATTERNS))
        scene = paint(found[0], rng)
        return Triplet(scene, found[1], local_caption(shape, colour, pattern), shape, colour, pattern, kind)
    raise RuntimeError(f"No triplet was found for {split} {index}.")
