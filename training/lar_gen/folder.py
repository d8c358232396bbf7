"""Quadruples from a folder of pictures, masks and prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..folder import folder_regions
from ..world.subjects import Example

_TURN, _BRIGHTNESS = 30.0, (0.85, 1.1)
"""How another view is made of the only one: degrees at most, and light. LAR-Gen shows the same picture again."""


def folder_examples(folder: Path, seed: int) -> list[Example]:
    """A quadruple of each subject of a folder. Raises ValueError as `folder_regions`."""
    return [
        Example(
            of.picture, of.hole, *_other_view(np.random.default_rng((of.seed, 1)), of.picture, of.inside), of.prompt
        )
        for of in folder_regions(folder, seed)
    ]


def _other_view(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The subject turned and otherwise lit."""
    angle = rng.uniform(-_TURN, _TURN)
    lit = np.clip(picture * rng.uniform(*_BRIGHTNESS), 0, 255).astype(np.uint8)
    turned = Image.fromarray(lit).rotate(angle, Image.Resampling.BILINEAR)
    outline = Image.fromarray((255 * mask).astype(np.uint8)).rotate(angle)
    seen = np.asarray(outline) > 127
    # One at the edge may be turned out of the picture.
    return (np.array(turned), seen) if seen.any() else (picture, mask)
