"""DreamMix's training masks: the box of a subject with sides that bulge and tremble, as if somebody had drawn around it by hand.

The paper has nothing on them but "user masks" (section 3.3); shape and constants are the released training code's.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from .masks import hole_of

Box = tuple[int, int, int, int]
"""Left, top, right, bottom; the last two are the first column and row behind the box."""

EXTENSIONS = (1, 10)
"""Range of the extension, both ends included, in tenths of a side."""
JITTER = (1, 20)
"""Range of the jitter's amplitude, both ends included, in pixels of a picture of `REFERENCE_SIDE`."""
REFERENCE_SIDE = 1024
POINTS = 19
"""Points on each curve, evenly spaced in its parameter, without its ends."""


def bezier_masks(mask: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Draws `count` masks around the subject of a mask [H, W] as for `as_mask_batch`; all above its noise is subject.

    Each drawn mask has one extension of 0.1, 0.2, ... 1.0 and one amplitude of 1 to 20 pixels, as in the release. Around the box
    of each connected part (corners count as connected; what lies in a hole of a part belongs to it) runs a polygon of four
    quadratic Bezier curves, one for each side. They end on the box's corners; the control point lies off the middle of its side,
    outwards by the extension times the box's extent in that direction, though not beyond the picture. A side therefore bulges
    by half of the extension. Every point of it is jittered by up to the amplitude in x and y. The polygon is filled even-odd:
    around a subject smaller than the jitter it crosses itself and may have gaps, as in the release.

    Differs from the release: the subject itself is always inside, where there the corners' cut and the jitter may leave some of
    it out. The amplitude, meant for training pictures of 1024 x 1024 pixels, is scaled with the longer side; it need not be
    whole.

    A mask depends on `seed` and its place among the drawn alone. Returns float32 [count, H, W] of 0 and 1 on the mask's device.
    Raises ValueError for a batch of several masks, an empty subject and a count below 1.
    """
    subjects = hole_of(mask)
    if len(subjects) != 1:
        raise ValueError(f"Masks are drawn around one subject mask at a time, but this is a batch of {len(subjects)}.")
    if count < 1:
        raise ValueError(f"{count} masks were asked for, but at least 1 has to be drawn.")
    subject = subjects[0, 0].cpu().numpy()
    if not subject.any():
        raise ValueError("The subject's mask is empty: paint white where the subject is in its picture.")
    boxes = _boxes(subject)
    drawn = [_drawn(subject, boxes, np.random.default_rng((seed, index))) for index in range(count)]
    return torch.from_numpy(np.stack(drawn)).to(mask.device, torch.float32)


def _boxes(subject: np.ndarray) -> list[Box]:
    """The boxes of the parts' outer contours."""
    filled = np.asarray(ndimage.binary_fill_holes(subject))
    labels = np.zeros(subject.shape, dtype=np.int32)
    ndimage.label(filled, structure=np.ones((3, 3)), output=labels)
    return [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in ndimage.find_objects(labels)]


def _drawn(subject: np.ndarray, boxes: list[Box], rng: np.random.Generator) -> np.ndarray:
    """One mask, bool [H, W]."""
    height, width = subject.shape
    extension = int(rng.integers(EXTENSIONS[0], EXTENSIONS[1] + 1)) / 10.0
    amplitude = int(rng.integers(JITTER[0], JITTER[1] + 1)) * max(height, width) / REFERENCE_SIDE
    picture = Image.new("L", (width, height))
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        points = _outline(box, extension, width, height)
        points = points + rng.uniform(-amplitude, amplitude, points.shape)
        # The pixel that a point lies in.
        pen.polygon(np.floor(points).astype(int).ravel().tolist(), fill=1)
    return (np.asarray(picture) > 0) | subject


def _outline(box: Box, extension: float, width: int, height: int) -> np.ndarray:
    """The points of the four curves around a box, clockwise from its upper left corner, as x and y: [4 * POINTS, 2]."""
    left, top, right, bottom = box
    across, down = extension * (right - left), extension * (bottom - top)
    x, y = (left + right) / 2.0, (top + bottom) / 2.0
    starts = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=float)
    controls = np.array(
        [
            (x, max(top - down, 0.0)),
            (min(right + across, width), y),
            (x, min(bottom + down, height)),
            (max(left - across, 0.0), y),
        ]
    )
    ends = np.roll(starts, -1, axis=0)
    t = np.arange(1, POINTS + 1)[:, None] / (POINTS + 1)
    curves = (1 - t) ** 2 * starts[:, None] + 2 * t * (1 - t) * controls[:, None] + t**2 * ends[:, None]
    return curves.reshape(-1, 2)
