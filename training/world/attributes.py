"""What the world is made of: shapes, colours, surface patterns, and the words for them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

SIZE = 256
"""Side of every picture in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
PATTERNS = ("plain", "striped", "dotted", "checkered")
COLOURS = {
    "red": (214, 38, 38),
    "orange": (245, 132, 22),
    "yellow": (250, 218, 45),
    "green": (36, 160, 64),
    "blue": (38, 84, 216),
    "purple": (126, 48, 172),
    "pink": (246, 134, 190),
    "white": (246, 246, 244),
}
"""Name and RGB value."""

# The second tone of a pattern stands out from the first and is no colour of its own.
_CREAM, _CHARCOAL = (250, 242, 224), (40, 36, 44)
PATTERN_TONES = {
    name: _CHARCOAL if name in ("orange", "yellow", "pink", "white") else _CREAM
    for name in COLOURS
}  # fmt: skip
"""RGB value of the stripes, dots or checks on an object of each colour."""

WORLD_VERSION = 1
"""A new value gives a new world: every picture of every split changes. To be raised with any change of what is drawn."""
_SPLITS = {"train": 1, "dev": 2, "test": 3}
SPLITS = tuple(_SPLITS)


@dataclass(frozen=True)
class SceneObject:
    """One object: its attributes, and where it lies in pixels and degrees."""

    shape: str
    colour: str
    pattern: str
    x: float
    y: float
    radius: float
    angle: float
    pattern_angle: float
    pattern_phase: float


class Purpose(IntEnum):
    """What random numbers are for; scenes and triplets of the same index have nothing in common."""

    LAYOUT = 1
    BACKGROUND = 2
    CAPTION = 3
    HOLE = 4
    CROP = 5
    TRIPLET = 6
    BATCH = 7
    LOOK = 8
    QUADRUPLE = 9


def generator(split: str, index: int, purpose: Purpose, variant: int = 0) -> np.random.Generator:
    """The random numbers for one purpose of one example.

    Numbers of different splits, indices, purposes and variants never come from the same seed. Raises ValueError for an
    unknown split or a negative index.
    """
    if split not in _SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if index < 0:
        raise ValueError(f"The index of an example is 0 or more, not {index}.")
    seed = np.random.SeedSequence((WORLD_VERSION, _SPLITS[split], int(purpose), variant, index))
    return np.random.Generator(np.random.PCG64(seed))
