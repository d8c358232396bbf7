"""Loss curves as pictures, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_WIDTH, _HEIGHT = 900, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 16, 34, 34
_TONES = ((31, 119, 180), (214, 96, 30), (44, 140, 60), (148, 90, 180), (120, 120, 120))


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a fiftieth of the curve."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curves(history: Sequence[dict[str, float]], title: str) -> Image.Image:
    """A picture of everything that `history` records over "step", on a logarithmic scale, smoothed.

    Values that are not above zero are left out.
    """
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(canvas)
    names = [name for name in history[0] if name != "step"]
    steps = np.asarray([row["step"] for row in history], dtype=float)
    curves = {name: _smooth(np.asarray([row[name] for row in history], dtype=float)) for name in names}
    shown = np.concatenate([curve[curve > 0] for curve in curves.values()])
    if not len(shown):
        return canvas
    low, high = math.log10(shown.min()), math.log10(shown.max())
    low, high = low - 0.03, max(high, low + 0.1) + 0.03

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / steps[-1]
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - math.log10(value)) / (high - low)
        return x, y

    for share in np.linspace(0, 1, 6):
        value = 10 ** (low + share * (high - low))
        y = place(0, value)[1]
        pen.line((_LEFT, y, _WIDTH - _RIGHT, y), fill=(225, 225, 225))
        pen.text((8, y - 6), f"{value:.3g}", fill="black")
        step = share * steps[-1]
        pen.text((place(step, value)[0] - 12, _HEIGHT - _BOTTOM + 8), f"{step:.0f}", fill="black")
    pen.text((_LEFT, 10), title, fill="black")
    for number, name in enumerate(names):
        tone = _TONES[number % len(_TONES)]
        points = [place(step, value) for step, value in zip(steps, curves[name], strict=True) if value > 0]
        if len(points) > 1:
            pen.line(points, fill=tone, width=2)
        pen.text((_LEFT + 160 + 130 * number, 10), name, fill=tone)
    return canvas
