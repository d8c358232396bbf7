"""Labelled crops of single objects, for the classifier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .attributes import COLOURS, PATTERNS, SHAPES, SIZE, Purpose, generator
from .scenes import Layout, make_scene
from .shapes import bounds, outlines

CROP = 64
NOTHING = len(SHAPES)
"""The shape label of a crop without an object in its middle; its colour and pattern labels are IGNORED."""
IGNORED = -100
_NOTHING_SHARE = 0.12


@dataclass(frozen=True)
class Crop:
    """A crop, uint8 [64, 64, 3], and the indices of its attributes in SHAPES, COLOURS and PATTERNS."""

    picture: np.ndarray
    shape: int
    colour: int
    pattern: int


def cut(picture: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """A box (left, top, right, bottom) of a picture uint8 [H, W, 3], resized to uint8 [64, 64, 3]."""
    return np.asarray(Image.fromarray(picture).resize((CROP, CROP), Image.Resampling.BILINEAR, box=box))


def square(x: float, y: float, side: float) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) of a square about a point, moved and shrunk to lie in the picture."""
    side = min(side, SIZE)
    left = float(np.clip(x - side / 2, 0, SIZE - side))
    top = float(np.clip(y - side / 2, 0, SIZE - side))
    return left, top, left + side, top + side


def _empty_box(rng: np.random.Generator, layout: Layout) -> tuple[float, float, float, float] | None:
    for _ in range(20):
        side = rng.uniform(60, 130)
        x, y = rng.uniform(side / 2, SIZE - side / 2, 2)
        if all(np.hypot(x - item.x, y - item.y) > 0.9 * item.radius + 0.45 * side for item in layout.objects):
            return square(x, y, side)
    return None


def worn_out(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As a decoder or a sampler might have left it: softer, noisier, in slightly other colours."""
    if rng.random() < 0.4:
        softened = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
        picture = np.asarray(softened)
    gain = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(0, 7))
    return np.clip(picture * gain + noise, 0, 255).astype(np.uint8)


def make_crop(split: str, index: int, worn: bool = True) -> Crop:
    """One labelled crop of a split: the same for the same arguments; `worn` varies its quality."""
    rng = generator(split, index, Purpose.CROP)
    scene = make_scene(split, index)
    empty = _empty_box(rng, scene.layout) if rng.random() < _NOTHING_SHARE else None
    if empty is not None:
        box, labels = empty, (NOTHING, IGNORED, IGNORED)
    else:
        item = scene.layout.objects[rng.integers(len(scene.layout.objects))]
        left, top, right, bottom = bounds(outlines(item)[0])
        size = max(right - left, bottom - top)
        side = size * rng.uniform(0.98, 2.0)
        # What fills a hole lies anywhere in it, and may be cut off a little.
        reach = 0.4 * (side - size) + 0.05 * size
        middle = np.asarray([(left + right) / 2, (top + bottom) / 2])
        x, y = middle + rng.uniform(-reach, reach, 2)
        box = square(x, y, side)
        labels = (SHAPES.index(item.shape), tuple(COLOURS).index(item.colour), PATTERNS.index(item.pattern))
    picture = cut(scene.picture, box)
    return Crop(worn_out(picture, rng) if worn else picture, *labels)
