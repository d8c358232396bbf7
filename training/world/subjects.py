"""Subjects: objects with a surface that no word names, seen twice: turned, scaled and otherwise lit.

LAR-Gen's training data are quadruples of a scene, a mask, a subject's picture and a prompt. Here the prompt can only say the
subject's shape; two tones that flow into each other and a drawn mark have to come from its picture. Since that one shows another
view, copying it does not do.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import numpy as np

from .attributes import SHAPES, SIZE, Purpose, SceneObject, generator
from .backgrounds import BACKGROUNDS, paint_background
from .holes import box_mask, grown_hull, polygon_mask
from .scenes import Layout, add_shadow, random_layout, render_objects
from .shapes import bounds, convex_hull, draw, outlines

# Least distance between two tones in RGB, from 0 to 441.
_CONTRAST = 130.0
# Periods of the flowing tones in a radius of the subject: coarse enough for a latent cell of 8 pixels.
_PERIODS = (0.9, 1.6)
_LEAST_TURN = 25.0
"""Degrees between the two views."""


@dataclass(frozen=True, eq=False)
class Look:
    """What stays the same in every view. Lengths are in radii of the subject, in its own upright coordinates.

    tones: RGB [3, 3], 0 to 255: two that flow into each other, and the mark's.
    wave: cycles a radius [2], and phase, of the bands between the two tones.
    warps: [2, 4], cycles a radius [2], phase and depth, of what bends them.
    mark: a closed outline [points, 2].
    """

    shape: str
    tones: np.ndarray
    wave: np.ndarray
    warps: np.ndarray
    mark: np.ndarray


@dataclass(frozen=True)
class View:
    """How a subject is seen: where its centre is in pixels, its radius, its angle in degrees, and the light.

    The side at `light_angle` is brighter by the share `light`, all of it by `brightness`.
    """

    x: float
    y: float
    radius: float
    angle: float
    light_angle: float
    light: float
    brightness: float


@dataclass(frozen=True, eq=False)
class Example:
    """A task: put the subject of `reference` into the hole.

    `picture` is the truth, uint8 [256, 256, 3]; `hole` bool [256, 256] covers the subject there. `reference` is another picture,
    with the subject at `reference_mask`. `prompt` is what words can say of it.
    """

    picture: np.ndarray
    hole: np.ndarray
    reference: np.ndarray
    reference_mask: np.ndarray
    prompt: str


@dataclass(frozen=True, eq=False)
class Quadruple(Example):
    """A task of the world. `scene` is the truth without the subject, `number` says which subject of its split it is, and `view`
    how it is seen in the truth."""

    scene: np.ndarray
    number: int
    view: View


def look_of(split: str, number: int) -> Look:
    """The look of one of a split's subjects: the same for the same arguments, and in no other split."""
    rng = generator(split, number, Purpose.LOOK)
    tones = _tones(rng)
    angle, cycles = rng.uniform(0, 2 * np.pi), rng.uniform(*_PERIODS)
    wave = np.asarray([cycles * np.cos(angle), cycles * np.sin(angle), rng.uniform(0, 2 * np.pi)])
    warps = np.column_stack([rng.normal(0.0, 0.45, (2, 2)), rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.4, 1.3, 2)])
    return Look(str(rng.choice(SHAPES)), tones, wave, warps, _mark(rng))


def _tones(rng: np.random.Generator) -> np.ndarray:
    while True:
        hues, saturations, values = rng.uniform(0, 1, 3), rng.uniform(0.25, 0.95, 3), rng.uniform(0.3, 0.98, 3)
        tones = 255 * np.asarray([colorsys.hsv_to_rgb(*of) for of in zip(hues, saturations, values, strict=True)])
        if all(np.linalg.norm(tones[a] - tones[b]) > _CONTRAST for a, b in ((0, 1), (0, 2), (1, 2))):
            return tones.astype(np.float32)


def _mark(rng: np.random.Generator) -> np.ndarray:
    """A jagged outline around a point that lies beside the middle."""
    points = int(rng.integers(5, 10))
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = rng.uniform(0.14, 0.42, points)
    away, direction = rng.uniform(0.1, 0.35), rng.uniform(0, 2 * np.pi)
    centre = away * np.asarray([np.cos(direction), np.sin(direction)])
    return centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def as_object(look: Look, view: View) -> SceneObject:
    """The object of the world that has the subject's outline; its color and pattern mean nothing."""
    return SceneObject(look.shape, "white", "plain", view.x, view.y, view.radius, view.angle, 0.0, 0.0)


def paint_subject(picture: np.ndarray, look: Look, view: View) -> np.ndarray:
    """Paint a subject into a picture (float32 [256, 256, 3], changed in place); returns its mask, bool [256, 256]."""
    item = as_object(look, view)
    polygons = outlines(item)
    add_shadow(picture, item, polygons)
    box = bounds(polygons[0], 1.0)
    left, top, right, bottom = box
    covered = draw(polygons, box)
    region = picture[top:bottom, left:right]
    region += covered[..., None] * (_surface(look, view, box) - region)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[top:bottom, left:right] = covered > 0.5
    return mask


def _surface(look: Look, view: View, box: tuple[int, int, int, int]) -> np.ndarray:
    """The colours of a subject's surface over a box of pixels: float32 [h, w, 3], 0 to 255."""
    left, top, right, bottom = box
    y, x = np.mgrid[top:bottom, left:right].astype(np.float64)
    x, y = (x - view.x) / view.radius, (y - view.y) / view.radius
    angle = np.deg2rad(view.angle)
    cos, sin = np.cos(angle), np.sin(angle)
    # Back to the subject's own coordinates: `outlines` turns by the same angle.
    u, v = cos * x + sin * y, cos * y - sin * x
    phase = 2 * np.pi * (look.wave[0] * u + look.wave[1] * v) + look.wave[2]
    for along_u, along_v, shift, depth in look.warps:
        phase = phase + depth * np.sin(2 * np.pi * (along_u * u + along_v * v) + shift)
    share = np.clip(0.5 + 2.0 * np.sin(phase), 0.0, 1.0)[..., None]
    colours = look.tones[0] + share * (look.tones[1] - look.tones[0])
    turn = np.asarray([[cos, sin], [-sin, cos]])
    mark = view.radius * look.mark @ turn + (view.x, view.y)
    drawn = draw([mark], box)[..., None]
    colours = colours + drawn * (look.tones[2] - colours)
    light_angle = np.deg2rad(view.light_angle)
    light = view.brightness * (1.0 + view.light * (np.cos(light_angle) * x + np.sin(light_angle) * y))
    return np.clip(colours * light[..., None], 0, 255).astype(np.float32)


def _view(rng: np.random.Generator, x: float, y: float, radius: float, angle: float) -> View:
    return View(x, y, radius, angle, rng.uniform(0, 360), rng.uniform(0.0, 0.25), rng.uniform(0.85, 1.05))


def _is_free(layout: Layout, hole: np.ndarray) -> bool:
    return not any((polygon_mask(convex_hull(outlines(item)[0])) & hole).any() for item in layout.objects)


def make_quadruple(split: str, index: int, number: int) -> Quadruple:
    """A task of a split with one of its subjects: the same for the same arguments."""
    look = look_of(split, number)
    for attempt in range(1000):
        rng = generator(split, index, Purpose.QUADRUPLE, attempt)
        layout = random_layout(rng)
        radius = rng.uniform(38, 60)
        x, y = rng.uniform(1.2 * radius, SIZE - 1.2 * radius, 2)
        view = _view(rng, x, y, radius, rng.uniform(-40, 40))
        hull = grown_hull(as_object(look, view), rng.uniform(4, 12))
        hole = polygon_mask(hull) if rng.random() < 0.5 else box_mask(hull)
        layout = replace(layout, objects=tuple(item for item in layout.objects if item.shape != look.shape))
        if _is_free(layout, hole):
            break
    else:
        raise RuntimeError(f"No place was found for subject {number} in {split} {index}.")
    canvas = paint_background(layout.background, rng)
    render_objects(canvas, layout.objects)
    scene = canvas.copy()
    paint_subject(canvas, look, view)
    other = view.angle + float(rng.choice((-1, 1))) * rng.uniform(_LEAST_TURN, 80)
    seen = _view(rng, rng.uniform(112, 144), rng.uniform(112, 144), rng.uniform(80, 100), other)
    reference = paint_background(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], rng)
    mask = paint_subject(reference, look, seen)
    return Quadruple(
        _levels(canvas),
        hole,
        _levels(reference),
        mask,
        f"a {look.shape}",
        scene=_levels(scene),
        number=number,
        view=view,
    )


def with_subject(quadruple: Quadruple, look: Look) -> np.ndarray:
    """The truth with another subject in its place, seen the same way: uint8 [256, 256, 3]."""
    canvas = quadruple.scene.astype(np.float32)
    paint_subject(canvas, look, quadruple.view)
    return _levels(canvas)


def make_portrait(look: Look, rng: np.random.Generator, background: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A view of a subject alone, uint8 [256, 256, 3], and its mask; on gray where no background is named."""
    radius = rng.uniform(45, 100)
    reach = max(SIZE / 2 - 1.2 * radius, 8.0)
    x, y = SIZE / 2 + rng.uniform(-reach, reach, 2)
    gray = np.full((SIZE, SIZE, 3), rng.uniform(20, 235), dtype=np.float32)
    canvas = gray if background is None else paint_background(background, rng)
    mask = paint_subject(canvas, look, _view(rng, x, y, radius, rng.uniform(-90, 90)))
    return _levels(canvas), mask


def _levels(canvas: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
