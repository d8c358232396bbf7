"""Hole masks as in the training of Stable Inpainting: boxes, ellipses, brush strokes, an object's hull, everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .attributes import SIZE, Purpose, SceneObject, generator
from .scenes import plan_scene
from .shapes import convex_hull, outlines

KINDS = ("boxes", "ellipses", "strokes", "hull", "everything")
EVERYTHING_SHARE = 0.25
"""How often the hole is the whole picture; the model card of Stable Inpainting gives this share."""
_KIND_SHARES = (0.25, 0.2, 0.25, 0.3)


def _ellipse(x: float, y: float, half_width: float, half_height: float, angle: float) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    points = np.stack([half_width * np.cos(t), half_height * np.sin(t)], axis=1)
    turn = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return points @ turn + (x, y)


def _pairs(points: np.ndarray) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points]


def grown_hull(item: SceneObject, margin: float) -> np.ndarray:
    """The corners of an object's convex hull, moved away from its centre by `margin` pixels."""
    hull = convex_hull(outlines(item)[0])
    away = hull - hull.mean(axis=0)
    return hull + margin * away / np.linalg.norm(away, axis=1, keepdims=True)


def polygon_mask(points: np.ndarray) -> np.ndarray:
    """The pixels inside a polygon [N, 2]: bool [256, 256]."""
    canvas = Image.new("1", (SIZE, SIZE))
    ImageDraw.Draw(canvas).polygon(_pairs(points), fill=1)
    return np.asarray(canvas).copy()


def box_mask(points: np.ndarray) -> np.ndarray:
    """The pixels of the smallest upright box around points [N, 2]: bool [256, 256]."""
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return polygon_mask(np.asarray([(left, top), (right, top), (right, bottom), (left, bottom)]))


def hole_mask(rng: np.random.Generator, objects: Sequence[SceneObject] = (), kind: str | None = None) -> np.ndarray:
    """A random hole: bool [256, 256], true in the hole, never empty.

    `kind` is one of KINDS; without it a random one other than "everything". "hull" takes one of `objects`, and an ellipse
    where there are none. Raises ValueError for an unknown kind.
    """
    if kind is None:
        kind = str(rng.choice(KINDS[:-1], p=_KIND_SHARES))
    if kind not in KINDS:
        raise ValueError(f"There is no kind of hole {kind!r}; choose one of {', '.join(KINDS)}.")
    if kind == "everything":
        return np.ones((SIZE, SIZE), dtype=bool)
    if kind == "hull" and objects:
        return polygon_mask(grown_hull(objects[int(rng.integers(len(objects)))], rng.uniform(2, 14)))
    canvas = Image.new("1", (SIZE, SIZE))
    pen = ImageDraw.Draw(canvas)
    if kind == "strokes":
        for _ in range(rng.integers(1, 4)):
            _stroke(rng, pen)
    else:
        for _ in range(rng.integers(1, 3)):
            x, y = rng.uniform(40, SIZE - 40, 2)
            half_width, half_height = rng.uniform(20, 64, 2)
            angle = 0.0 if kind == "boxes" else rng.uniform(0, np.pi)
            if kind == "boxes":
                pen.rectangle((x - half_width, y - half_height, x + half_width, y + half_height), fill=1)
            else:
                pen.polygon(_pairs(_ellipse(x, y, half_width, half_height, angle)), fill=1)
    return np.asarray(canvas).copy()


def _stroke(rng: np.random.Generator, pen: ImageDraw.ImageDraw) -> None:
    """A wandering brush stroke with round joints."""
    width = rng.uniform(16, 44)
    point, heading = rng.uniform(30, SIZE - 30, 2), rng.uniform(0, 2 * np.pi)
    points = [point]
    for _ in range(rng.integers(2, 7)):
        heading += rng.normal(0, 0.9)
        point = np.clip(point + rng.uniform(20, 60) * np.asarray([np.cos(heading), np.sin(heading)]), 5, SIZE - 5)
        points.append(point)
    corners = _pairs(np.asarray(points))
    pen.line(corners, fill=1, width=int(width))
    for x, y in corners:
        pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)


def scene_hole(split: str, index: int, variant: int = 0) -> np.ndarray:
    """One of the random holes for a scene of a split, other than "everything": bool [256, 256]."""
    return hole_mask(generator(split, index, Purpose.HOLE, variant), plan_scene(split, index).objects)
