"""The outlines of the shapes, drawn with smooth edges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from .attributes import SIZE, SceneObject

# Outlines are drawn this many times larger and averaged: 16 levels of edge coverage.
_OVERSAMPLING = 4


def _circle(radius: float, start: float = 0.0, stop: float = 2 * np.pi, points: int = 72) -> np.ndarray:
    angles = np.linspace(start, stop, points)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _moved(points: np.ndarray, x: float, y: float) -> np.ndarray:
    return points + np.asarray([x, y])


def _regular(radii: list[float]) -> np.ndarray:
    angles = -np.pi / 2 + np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.asarray(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 72)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 1.0], axis=1) / 16.0


def _cross() -> np.ndarray:
    a, b = 0.34, 0.98
    points = [
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    ]
    return np.asarray(points)


def _moon() -> np.ndarray:
    # A disc less a smaller disc that is shifted to the right; both pass through the two tips.
    tip = 0.7
    outer = _circle(1.0, tip, 2 * np.pi - tip)
    shift, height = 0.45, np.sin(tip)
    reach = np.cos(tip) - shift
    inner_tip = np.arctan2(height, reach)
    inner = _circle(float(np.hypot(reach, height)), 2 * np.pi - inner_tip, inner_tip)
    return _moved(np.concatenate([outer, _moved(inner, shift, 0.0)]), 0.15, 0.0)


# The outlines fill the unit disc about evenly. An outline after the first one is a hole in it.
_OUTLINES: dict[str, Callable[[], list[np.ndarray]]] = {
    "circle": lambda: [_circle(0.88)],
    "square": lambda: [np.asarray([(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)])],
    "triangle": lambda: [_moved(_regular([1.1] * 3), 0.0, 0.14)],
    "star": lambda: [_moved(_regular([1.08, 0.46] * 5), 0.0, 0.06)],
    "heart": lambda: [_heart()],
    "cross": lambda: [_cross()],
    "ring": lambda: [_circle(0.96), _circle(0.5)],
    "moon": lambda: [_moon()],
}
_CACHE = {name: outline() for name, outline in _OUTLINES.items()}


def outlines(item: SceneObject) -> list[np.ndarray]:
    """The outlines of an object as pixel coordinates (x, y), each [points, 2]; all but the first are holes."""
    angle = np.deg2rad(item.angle)
    turn = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [_moved(item.radius * outline @ turn, item.x, item.y) for outline in _CACHE[item.shape]]


def bounds(points: np.ndarray, margin: float = 0.0) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in whole pixels around points and a margin, cut to the picture."""
    low = np.clip(np.floor(points.min(axis=0) - margin), 0, SIZE - 1).astype(int)
    high = np.clip(np.ceil(points.max(axis=0) + margin), low + 1, SIZE).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def draw(polygons: list[np.ndarray], box: tuple[int, int, int, int]) -> np.ndarray:
    """How much of each pixel of a box lies in the first polygon and in none of the others: float32, 0 to 1."""
    left, top, right, bottom = box
    canvas = Image.new("L", ((right - left) * _OVERSAMPLING, (bottom - top) * _OVERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    for number, polygon in enumerate(polygons):
        corners = (polygon - (left, top)) * _OVERSAMPLING
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=255 if number == 0 else 0)
    return np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float32) / 255.0


def convex_hull(points: np.ndarray) -> np.ndarray:
    """The corners [M, 2] of the convex hull of points [N, 2], in order (Andrew's monotone chain)."""
    ordered = sorted(map(tuple, points.tolist()))

    def half(sequence: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        chain: list[tuple[float, ...]] = []
        for x, y in sequence:
            while len(chain) > 1:
                (ax, ay), (bx, by) = chain[-2], chain[-1]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                chain.pop()
            chain.append((x, y))
        return chain[:-1]

    return np.asarray(half(ordered) + half(ordered[::-1]))
