"""Holes about things in pictures of a user's own, from a folder as `imaging.subject_files` describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..imaging.mask_shapes import mask_shape
from ..imaging.subject_files import SubjectFile, find_subjects
from .loop import step_seed
from .world.attributes import SIZE

_ROOM = (1.3, 3.0)
"""The square around a thing, to its longer side; LAR-Gen's zoom-in has 1.3."""


@dataclass(frozen=True, eq=False)
class FolderRegion:
    """A part of a picture, uint8 [256, 256, 3], where in it the thing is, and a hole as people draw it about that, both bool
    [256, 256]; what words say of it; and the seed by which all of this was chosen."""

    picture: np.ndarray
    inside: np.ndarray
    hole: np.ndarray
    prompt: str
    seed: int


def folder_regions(folder: Path, seed: int) -> list[FolderRegion]:
    """One for each mask of a folder. Raises ValueError as `find_subjects` and `SubjectFile.read`, and for a black mask."""
    return [_region(file, step_seed(seed, place)) for place, file in enumerate(find_subjects(folder))]


def _region(file: SubjectFile, seed: int) -> FolderRegion:
    rng = np.random.default_rng(seed)
    picture, mask = file.read()
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError(f"{file.mask} is black: paint the subject white, or remove it.")
    size = max(np.ptp(rows), np.ptp(columns)) + 1
    side = min(size * rng.uniform(*_ROOM), *picture.shape[:2]) if size <= min(picture.shape[:2]) else size
    box = _square(rng, side, (columns.min(), columns.max() + 1), (rows.min(), rows.max() + 1), picture.shape[:2])
    inside = _cut((255 * mask).astype(np.uint8), box) > 127
    hole = mask_shape(torch.from_numpy(inside).float(), "painternet", seed % 2**31)[0, 0].numpy() > 0
    return FolderRegion(_cut(picture, box), inside, hole, file.prompt, seed)


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
