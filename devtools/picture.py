"""Joins the demo's pictures into one and compares the known pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from .paths import UserError

GAP = 8


def join(target: Path, scene: bytes, mask: bytes, results: Sequence[bytes]) -> int:
    """Write PNG files side by side into one; returns how many known pixels there are.

    Raises UserError where the sizes differ, and where a pixel outside of the mask, and not next to it, is not the scene's.
    """
    pictures = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in (scene, mask, *results)]
    if any(picture.shape != pictures[0].shape for picture in pictures):
        raise UserError(f"The demo's pictures differ in size: {', '.join(str(picture.shape) for picture in pictures)}.")
    gap = np.full((pictures[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)][:-1]
    Image.fromarray(np.concatenate(parts, axis=1)).save(target)
    # A scaled mask fades out over a cell; in 8 bits the last of it is 0 although it counts.
    touched = Image.fromarray(pictures[1].max(axis=2)).filter(ImageFilter.MaxFilter(3))
    known = np.asarray(touched) == 0
    changed = max(int((known & (pictures[0] != result).any(axis=2)).sum()) for result in pictures[2:])
    if changed:
        raise UserError(f"The demo's check failed: {changed} of {int(known.sum())} known pixels (mask 0) have changed.")
    return int(known.sum())
