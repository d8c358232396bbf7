"""Scenes: what lies where, and the picture of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .attributes import COLOURS, PATTERN_TONES, PATTERNS, SHAPES, SIZE, Purpose, SceneObject, generator
from .backgrounds import BACKGROUNDS, paint_background
from .captions import global_caption, local_caption
from .shapes import bounds, draw, outlines

MAX_OBJECTS = 5
# Few objects are common: a caption that names one thing teaches its words best.
_COUNTS = (0.28, 0.28, 0.2, 0.14, 0.1)
# Smallest and largest radius for 1 to 5 objects.
_RADII = ((40, 72), (36, 64), (32, 54), (30, 46), (28, 42))
# How near two objects may come, as a share of the sum of their radii.
_NEARNESS = 0.88
# Width of one stripe and the next, from dot to dot, of two checks; coarse enough for a latent cell of 8 pixels.
_PERIODS = {"striped": 20.0, "dotted": 21.0, "checkered": 30.0}


@dataclass(frozen=True)
class Layout:
    """What a scene holds, lowest object first, before anything is painted."""

    objects: tuple[SceneObject, ...]
    background: str


@dataclass(frozen=True)
class Scene:
    """A painted scene.

    `picture` is uint8 [256, 256, 3] and `masks` bool [objects, 256, 256], the visible part of each object. The captions
    name everything in the usual words; `scene_caption` varies them.
    """

    picture: np.ndarray
    masks: np.ndarray
    layout: Layout
    global_caption: str
    local_captions: tuple[str, ...]


def random_layout(rng: np.random.Generator) -> Layout:
    """A layout of 1 to 5 objects, no two of the same shape and colour."""
    count = int(rng.choice(MAX_OBJECTS, p=_COUNTS)) + 1
    objects: list[SceneObject] = []
    kinds = rng.permutation(len(SHAPES) * len(COLOURS))[:count]
    colours = tuple(COLOURS)
    low, high = _RADII[count - 1]
    for kind in kinds:
        # An object that finds no place is left out.
        for _ in range(24):
            radius = rng.uniform(low, high)
            x, y = rng.uniform(1.03 * radius, SIZE - 1.03 * radius, 2)
            if all(np.hypot(x - o.x, y - o.y) > _NEARNESS * (radius + o.radius) for o in objects):
                shape, colour = SHAPES[kind % len(SHAPES)], colours[kind // len(SHAPES)]
                pattern = PATTERNS[rng.integers(len(PATTERNS))]
                angles = rng.uniform(-30, 30), rng.uniform(0, 180)
                objects.append(SceneObject(shape, colour, pattern, x, y, radius, angles[0], angles[1], rng.uniform()))
                break
    return Layout(tuple(objects), BACKGROUNDS[rng.integers(len(BACKGROUNDS))])


def plan_scene(split: str, index: int) -> Layout:
    """The layout of one scene of a split ("train", "dev", "test"): the same for the same arguments, on any machine."""
    return random_layout(generator(split, index, Purpose.LAYOUT))


def scene_caption(split: str, index: int, variant: int, omission: float = 0.0) -> str:
    """One of the varied global captions of a scene."""
    layout = plan_scene(split, index)
    rng = generator(split, index, Purpose.CAPTION, variant)
    return global_caption(layout.objects, layout.background, rng, omission)


def _surface(item: SceneObject, box: tuple[int, int, int, int]) -> np.ndarray:
    """The colours of an object's surface over a box of pixels: float32 [h, w, 3], 0 to 255."""
    left, top, right, bottom = box
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    x, y = x - np.float32(item.x), y - np.float32(item.y)
    base = np.asarray(COLOURS[item.colour], dtype=np.float32)
    # Light from above left: a little roundness, which leaves the mean as it is.
    light = 1.0 - np.float32(0.06 / item.radius) * (x + y)
    if item.pattern == "plain":
        return base * light[..., None]
    period = _PERIODS[item.pattern]
    angle = np.deg2rad(item.pattern_angle)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    # Periods along and across, so that whole numbers are one period apart.
    along = (cos * x + sin * y) / np.float32(period) + np.float32(item.pattern_phase)
    across = (cos * y - sin * x) / np.float32(period)
    # Signed distance in pixels from the nearest edge of the pattern, positive on its second tone.
    if item.pattern == "dotted":
        from_dot = np.hypot(along - np.rint(along), across - np.rint(across))
        depth = np.float32(period) * (np.float32(0.31) - from_dot)
    else:
        wave = np.sin(2 * np.pi * along)
        if item.pattern == "checkered":
            wave = wave * np.sin(2 * np.pi * across)
        depth = wave * np.float32(period / (2 * np.pi))
    share = np.clip(depth + 0.5, 0.0, 1.0)
    tone = np.asarray(PATTERN_TONES[item.colour], dtype=np.float32)
    return (base + share[..., None] * (tone - base)) * light[..., None]


def add_shadow(picture: np.ndarray, item: SceneObject, polygons: list[np.ndarray]) -> None:
    """Darken a picture (float32 [256, 256, 3], changed in place) below and to the right of an object with these outlines."""
    blur = 5.0
    offset = (0.07 * item.radius, 0.1 * item.radius)
    shifted = [polygon + offset for polygon in polygons]
    box = bounds(shifted[0], 2.5 * blur)
    left, top, right, bottom = box
    hard = Image.fromarray((draw(shifted, box) * 255).astype(np.uint8))
    soft = np.asarray(hard.filter(ImageFilter.BoxBlur(blur)), dtype=np.float32)
    picture[top:bottom, left:right] *= (1.0 - soft * np.float32(0.4 / 255))[..., None]


def render_objects(picture: np.ndarray, objects: tuple[SceneObject, ...]) -> np.ndarray:
    """Paint objects into a picture (float32 [256, 256, 3], changed in place); returns the visible masks [N, 256, 256]."""
    masks = np.zeros((len(objects), SIZE, SIZE), dtype=bool)
    for number, item in enumerate(objects):
        polygons = outlines(item)
        add_shadow(picture, item, polygons)
        box = bounds(polygons[0], 1.0)
        left, top, right, bottom = box
        covered = draw(polygons, box)
        region = picture[top:bottom, left:right]
        region += covered[..., None] * (_surface(item, box) - region)
        solid = covered > 0.5
        masks[:number, top:bottom, left:right] &= ~solid
        masks[number, top:bottom, left:right] = solid
    return masks


def object_cells(layout: Layout, cells: int) -> np.ndarray:
    """Which object lies in the middle of each cell of a grid: uint8 [cells, cells], 0 for none, 1 + i for object i.

    `cells` divides 128.
    """
    side = 128
    found = np.zeros((side, side), dtype=np.uint8)
    for number, item in enumerate(layout.objects):
        canvas = Image.new("1", (side, side))
        pen = ImageDraw.Draw(canvas)
        for place, polygon in enumerate(outlines(item)):
            pen.polygon([tuple(corner) for corner in (polygon * (side / SIZE)).tolist()], fill=0 if place else 1)
        found[np.asarray(canvas)] = 1 + number
    step = side // cells
    return found[step // 2 :: step, step // 2 :: step]


def paint(layout: Layout, background_rng: np.random.Generator) -> Scene:
    """Paint a layout. The same generator state gives the same background, whatever the objects are."""
    canvas = paint_background(layout.background, background_rng)
    masks = render_objects(canvas, layout.objects)
    picture = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(
        picture,
        masks,
        layout,
        global_caption(layout.objects, layout.background),
        tuple(local_caption(item.shape, item.colour, item.pattern) for item in layout.objects),
    )


def make_scene(split: str, index: int) -> Scene:
    """One scene of a split ("train", "dev", "test"): the same for the same arguments."""
    return paint(plan_scene(split, index), generator(split, index, Purpose.BACKGROUND))
