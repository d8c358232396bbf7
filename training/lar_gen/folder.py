"""Quadruples from a folder of pictures, masks and prompts, as `imaging.subject_files` describes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...imaging.mask_shapes import mask_shape
from ...imaging.subject_files import SubjectFile, find_subjects
from ..loop import step_seed
from ..world.attributes import SIZE
from ..world.subjects import Example

_ROOM = (1.3, 3.0)
"""The square around a subject, to its longer side; LAR-Gen's zoom-in has 1.3."""
_TURN, _BRIGHTNESS = 30.0, (0.85, 1.1)
"""How another view is made of the only one: degrees at most, and light. LAR-Gen shows the same picture again."""


def folder_examples(folder: Path, seed: int) -> list[Example]:
    """A quadruple of each subject of a folder. Raises ValueError as `find_subjects` and `SubjectFile.read`."""
    return [_example(file, step_seed(seed, place)) for place, file in enumerate(find_subjects(folder))]


def _example(file: SubjectFile, seed: int) -> Example:
    rng = np.random.default_rng(seed)
    picture, mask = file.read()
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError(f"{file.mask} is black: paint the subject white, or remove it.")
    size = max(np.ptp(rows), np.ptp(columns)) + 1
    side = min(size * rng.uniform(*_ROOM), *picture.shape[:2]) if size <= min(picture.shape[:2]) else size
    box = _square(rng, side, (columns.min(), columns.max() + 1), (rows.min(), rows.max() + 1), picture.shape[:2])
    scene = _cut(picture, box)
    inside = _cut((255 * mask).astype(np.uint8), box) > 127
    hole = mask_shape(torch.from_numpy(inside).float(), "painternet", seed % 2**31)[0, 0].numpy() > 0
    return Example(scene, hole, *_other_view(rng, scene, inside), file.prompt)


def _square(
    rng: np.random.Generator,
    side: float,
    across: tuple[int, int],
    down: tuple[int, int],
    picture: tuple[int, ...],
) -> tuple[float, float, float, float]:
    """A square of that side, which holds the subject wherever it can, and lies in the picture where it fits."""
    starts = []
    for (first, last), length in ((across, picture[1]), (down, picture[0])):
        low, high = max(last - side, min(0.0, length - side)), min(first, max(length - side, 0.0))
        starts.append(rng.uniform(min(low, high), max(low, high)))
    left, top = starts
    return left, top, left + side, top + side


def _cut(picture: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """A box of a picture at 256x256 pixels; what lies beyond the picture is its edge."""
    left, top, right, bottom = box
    around = max(0, int(np.ceil(max(-left, -top, right - picture.shape[1], bottom - picture.shape[0]))))
    edges = [(around, around)] * 2 + [(0, 0)] * (picture.ndim - 2)
    padded = Image.fromarray(np.pad(picture, edges, mode="edge"))
    moved = (left + around, top + around, right + around, bottom + around)
    return np.array(padded.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=moved))


def _other_view(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The subject turned and otherwise lit."""
    angle = rng.uniform(-_TURN, _TURN)
    lit = np.clip(picture * rng.uniform(*_BRIGHTNESS), 0, 255).astype(np.uint8)
    turned = Image.fromarray(lit).rotate(angle, Image.Resampling.BILINEAR)
    outline = Image.fromarray((255 * mask).astype(np.uint8)).rotate(angle)
    seen = np.asarray(outline) > 127
    # One at the edge may be turned out of the picture.
    return (np.array(turned), seen) if seen.any() else (picture, mask)
