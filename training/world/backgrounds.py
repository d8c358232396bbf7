"""The backgrounds: muted, so that objects stand out, and each with words for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from .attributes import SIZE

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def _colour(rng: np.random.Generator, *rgb: float, spread: float = 10.0) -> np.ndarray:
    """A colour near the given one."""
    return np.asarray(rgb, dtype=np.float32) + rng.uniform(-spread, spread, 3).astype(np.float32)


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Smooth noise about 0, roughly -1 to 1, with so many cells down and across: float32 [SIZE, SIZE]."""
    cells = rng.uniform(-1.0, 1.0, (rows + 1, columns + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(cells).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _blend(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The mix of two colours [3] by a share [SIZE, SIZE] of the second."""
    return first + share[..., None] * (second - first)


def _ramp(rng: np.random.Generator) -> np.ndarray:
    """0 to 1 across the picture in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    along = np.float32(np.cos(angle)) * (_X - SIZE / 2) + np.float32(np.sin(angle)) * (_Y - SIZE / 2)
    return np.clip(along / SIZE + 0.5, 0.0, 1.0)


def _edges(wave: np.ndarray, period: float) -> np.ndarray:
    """A sine wave of this period in pixels as bands of 0 and 1 with edges one pixel wide."""
    return np.clip(wave * np.float32(period / (2 * np.pi)) + 0.5, 0.0, 1.0)


def _gradient(*tone: float) -> Callable[[np.random.Generator], np.ndarray]:
    def paint(rng: np.random.Generator) -> np.ndarray:
        middle = _colour(rng, *tone, spread=12)
        contrast = np.float32(rng.uniform(20, 40))
        return _blend(middle - contrast, middle + contrast, _ramp(rng))

    return paint


def _wallpaper(rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(24, 44)
    angle = rng.choice([0.0, 0.0, np.pi / 4, np.pi / 2])
    along = np.float32(np.cos(angle)) * _X + np.float32(np.sin(angle)) * _Y
    bands = _edges(np.sin(along * np.float32(2 * np.pi / period) + np.float32(rng.uniform(0, 6))), period)
    tone = rng.uniform(-25, 25, 3).astype(np.float32) + 175
    return _blend(tone, tone - np.float32(rng.uniform(28, 45)), bands)


def _checker(rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(56, 88)
    x, y = (np.sin(axis * np.float32(2 * np.pi / period) + np.float32(rng.uniform(0, 6))) for axis in (_X, _Y))
    tone = rng.uniform(-12, 12, 3).astype(np.float32)
    return _blend(tone + 105, tone + 165, _edges(x * y, period))


def _wood(rng: np.random.Generator) -> np.ndarray:
    plank = rng.uniform(48, 72)
    rows = (_Y + np.float32(rng.uniform(0, plank))) / np.float32(plank)
    number = rows.astype(np.int32)
    grain = np.sin(_Y * np.float32(0.55) + 5 * _noise(rng, 6, 3) + number * np.float32(2.1))
    shade = rng.uniform(-13, 13, int(number.max()) + 1).astype(np.float32)[number]
    gaps = np.clip((np.abs(rows - number - 0.5) - 0.5) * np.float32(plank) + 2.2, 0, 1)
    base = _colour(rng, 152, 106, 66)
    texture = 8 * grain + 6 * _noise(rng, 64, 12) + shade - 45 * gaps
    return base + texture[..., None] * np.asarray([1.0, 0.9, 0.75], dtype=np.float32)


def _grass(rng: np.random.Generator) -> np.ndarray:
    texture = 16 * _noise(rng, 36, 90) + 11 * _noise(rng, 7, 7)
    return _colour(rng, 84, 112, 60) + texture[..., None] * np.asarray([0.8, 1.0, 0.5], dtype=np.float32)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    height = rng.uniform(24, 34)
    width = 2.1 * height
    rows = (_Y + np.float32(rng.uniform(0, height))) / np.float32(height)
    row = rows.astype(np.int32)
    columns = (_X + np.float32(rng.uniform(0, width))) / np.float32(width) + (row % 2) * np.float32(0.5)
    column = columns.astype(np.int32)
    from_edge = np.minimum(
        (0.5 - np.abs(rows - row - 0.5)) * np.float32(height),
        (0.5 - np.abs(columns - column - 0.5)) * np.float32(width),
    )
    mortar = np.clip(2.4 - from_edge, 0.0, 1.0)
    shade = rng.uniform(-14, 14, (int(row.max()) + 1, int(column.max()) + 1)).astype(np.float32)[row, column]
    clay = _colour(rng, 142, 92, 80) + (shade + 7 * _noise(rng, 48, 48))[..., None]
    return clay + mortar[..., None] * (_colour(rng, 172, 165, 158) - clay)


def _sand(rng: np.random.Generator) -> np.ndarray:
    dunes = np.sin(_Y * np.float32(rng.uniform(0.16, 0.26)) + 4 * _noise(rng, 5, 4))
    texture = 7 * dunes + 8 * _noise(rng, 110, 110)
    return _colour(rng, 196, 172, 128) + texture[..., None]


def _stone(rng: np.random.Generator) -> np.ndarray:
    texture = 20 * _noise(rng, 6, 6) + 14 * _noise(rng, 22, 22) + 8 * _noise(rng, 90, 90)
    return _colour(rng, 122, 122, 126, spread=8) + texture[..., None]


def _sky(rng: np.random.Generator) -> np.ndarray:
    clouds = np.clip(1.3 * _noise(rng, 5, 4) + 0.6 * _noise(rng, 12, 10) - 0.1, 0.0, 1.0)
    air = _blend(_colour(rng, 88, 136, 184), _colour(rng, 150, 186, 212), _Y / SIZE)
    return air + 0.75 * clouds[..., None] * (_colour(rng, 222, 224, 228, spread=5) - air)


def _sunset(rng: np.random.Generator) -> np.ndarray:
    height = np.clip(_Y / SIZE + 0.12 * _noise(rng, 10, 2), 0.0, 1.0)
    return _blend(_colour(rng, 74, 62, 104), _colour(rng, 214, 142, 104), height)


def _horizon(rng: np.random.Generator, base: float, swing: float, cells: int) -> np.ndarray:
    """1 below a smooth line across the picture, 0 above it."""
    line = base * SIZE + swing * _noise(rng, 1, cells)[0]
    return np.clip(_Y - line[None] + 0.5, 0.0, 1.0)


def _hills(rng: np.random.Generator) -> np.ndarray:
    base = rng.uniform(0.35, 0.5)
    picture = _blend(_colour(rng, 128, 166, 200), _colour(rng, 188, 206, 216), _Y / SIZE)
    for number, tone in enumerate(((126, 148, 124), (104, 132, 94), (84, 112, 72))):
        below = _horizon(rng, base + 0.17 * number, 26, int(rng.integers(3, 6)))
        picture += below[..., None] * (_colour(rng, *tone) + 5 * _noise(rng, 40, 40)[..., None] - picture)
    return picture


def _sea(rng: np.random.Generator) -> np.ndarray:
    below = _horizon(rng, rng.uniform(0.3, 0.5), 0.0, 2)
    air = _blend(_colour(rng, 150, 182, 206), _colour(rng, 204, 212, 214), _Y / (SIZE / 2))
    waves = np.sin(_Y * np.float32(0.42) + 6 * _noise(rng, 24, 6)) + _noise(rng, 60, 24)
    water = _colour(rng, 58, 104, 126) + 9 * waves[..., None]
    return air + below[..., None] * (water - air)


_KINDS: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], tuple[str, ...]]] = {
    "grey": (_gradient(128, 128, 132), ("on a grey background", "in front of a grey background")),
    "beige": (_gradient(186, 170, 144), ("on a beige background", "in front of a beige background")),
    "teal": (_gradient(78, 128, 128), ("on a teal background", "in front of a teal background")),
    "brown": (_gradient(112, 84, 66), ("on a brown background", "in front of a brown background")),
    "wallpaper": (_wallpaper, ("on striped wallpaper", "in front of striped wallpaper")),
    "checker": (_checker, ("on a checkered floor", "on checkered tiles")),
    "wood": (_wood, ("on a wooden table", "on a wooden floor")),
    "grass": (_grass, ("on green grass", "on a lawn")),
    "bricks": (_bricks, ("in front of a brick wall", "on a brick wall")),
    "sand": (_sand, ("on the sand", "on a sandy beach")),
    "stone": (_stone, ("on a stone floor", "on grey stone")),
    "sky": (_sky, ("in a cloudy sky", "in the sky")),
    "sunset": (_sunset, ("at sunset", "in the evening sky")),
    "hills": (_hills, ("in front of green hills", "over the hills")),
    "sea": (_sea, ("by the sea", "over the sea")),
}
BACKGROUNDS = tuple(_KINDS)
PHRASES = {name: phrases for name, (_, phrases) in _KINDS.items()}
"""The phrases for each background, the usual one first: "on a wooden table"."""


def paint_background(name: str, rng: np.random.Generator) -> np.ndarray:
    """One background of a kind in BACKGROUNDS: float32 [SIZE, SIZE, 3], 0 to 255."""
    return np.clip(_KINDS[name][0](rng), 0.0, 255.0).astype(np.float32, copy=False)
