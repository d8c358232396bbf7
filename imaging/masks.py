"""Masks: what of them is hole, and the hole on the grids that a model works on. 1 is hole, 0 is known.

What gray means, in the whole pack:

- Values up to 2/255 are the noise of soft mask models and count as known. Everything above is hole.
- Where new and old pixels are mixed (stitching, Harmonize, Fill Hole, blending in known latents), a gray value is the weight of
  the new.
- Where a soft edge is added or a hole is put on a grid, all of the hole counts alike, however gray it is. So it does where
  only its place matters: regions, boxes, hulls, specks and islands, colours and gradients around it, figures inside and outside.
- Growing and shrinking move gray as it is.
- A second, white hole elsewhere changes nothing about a gray one.

`as_mask_batch` is the door through which every mask comes: it knows the shapes and takes the noise out. Behind it everything
above 0 is hole, and only there masks can be counted.
"""

import logging
from collections import Counter

import torch
import torch.nn.functional as F

from .pictures import resampled

NOISE = 2.5 / 255
"""Up to this a value is noise: 2 levels of 8 bits, and half a level more, so that no rounding (of 1 - alpha) decides."""
_FAINTEST = 3 / 255


def as_mask_batch(mask: torch.Tensor) -> torch.Tensor:
    """Returns a mask given as [H, W], [B, H, W] or [B, C, H, W] (first channel counts) as new float32 [B, 1, H, W].

    Values are cut to [0, 1]; those up to 2/255 (`NOISE`) become 0. NaN counts as known. Raises ValueError for any other number
    of dimensions and for an empty batch.
    """
    mask = _unsifted(mask)
    return torch.where(mask > NOISE, mask, 0.0)


def hole_of(mask: torch.Tensor) -> torch.Tensor:
    """Which pixels of a mask, as for `as_mask_batch`, are hole: bool [B, 1, H, W]."""
    return as_mask_batch(mask) > 0


def resize_mask(mask: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """A mask as for `as_mask_batch`, at a picture's `size` (height, width): float32 [B, 1, height, width] in [0, 1].

    A mask of another size is resized, bilinear and anti-aliased. No hole is lost, however small it becomes: what is left of it
    counts as hole.
    """
    mask = as_mask_batch(mask)
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    resized = resampled(mask, (size[0], size[1]), "bilinear")
    # The weights add up to 1 only within rounding; inside the hole the mask shall stay 1.
    resized = torch.where(resized > 1 - 1e-5, 1.0, resized)
    return torch.where(resized > 0, resized.clamp(min=_FAINTEST), 0.0)


def coverage(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The weight of the new in each cell of a grid of `size` (height, width): the area mean of the mask, gray included.

    `mask` is [B, 1, H, W]; the result [B, 1, height, width], in [0, 1]. A grid finer than the mask repeats its pixels. For what
    is hole on a grid, see `hole_coverage`.
    """
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    return F.adaptive_avg_pool2d(mask, size)


def hole_coverage(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """How much of each cell of a grid of `size` (height, width) is hole, however gray: float32 [B, 1, height, width].

    `mask` is as for `as_mask_batch`. A cell of the mask's own grid is all hole or not at all.
    """
    return coverage(hole_of(mask).float(), size)


def hole_cells(covered: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Which cells of a grid of `size` (height, width) belong to the hole: those of which at least half is hole.

    A cell that is exactly half hole counts, as in HD-Painter's released code. A hole too small to cover half of any cell keeps
    the cell (or cells) it covers most, so that no hole is lost at a coarse level. `covered` is [B, 1, H, W], how much of each
    cell of a finer grid is hole (`hole_coverage`); the result is a bool tensor [B, height, width].
    """
    shares = coverage(covered, size)[:, 0]
    # An area mean of exactly a half may come out a rounding below it.
    cells = shares >= 0.5 - 1e-6
    most = shares.amax(dim=(1, 2), keepdim=True)
    lost = ~cells.any(dim=2, keepdim=True).any(dim=1, keepdim=True) & (most > 0)
    return cells | (lost & (shares == most))


def noise_notes(mask: torch.Tensor, name: str) -> list[str]:
    """For each picture of a mask what was done about its noise, in a sentence that calls it `name`; "" where nothing was.

    Said is that a mask which is not black has no hole, and that most of a background which is not black counts as known: else
    somebody might look for the hole, or for the reason why not all of the picture was one.
    """
    values = _unsifted(mask).flatten(1)
    hole = values > NOISE
    noise = (values > 0) & ~hole
    vanished = noise.any(dim=1) & ~hole.any(dim=1)
    background = 2 * noise.sum(dim=1) > (~hole).sum(dim=1)
    return [
        f"{name} is not black, but nothing in it is above 2/255, which counts as noise: it has no hole."
        if is_gone
        else f"{name} has a background that is mostly not black, but at most 2/255, which counts as known."
        if is_noisy
        else ""
        for is_gone, is_noisy in zip(vanished.tolist(), background.tolist(), strict=True)
    ]


def log_noise(node: str, **masks: torch.Tensor | None) -> None:
    """Writes what `noise_notes` says about a node's masks, given by the names of its inputs, to the log: one line for each."""
    for name, mask in masks.items():
        if mask is None:
            continue
        notes = noise_notes(mask, f"'{name}'")
        for note, count in Counter(filter(None, notes)).items():
            where = f" ({count} of {len(notes)} masks)" if len(notes) > 1 else ""
            logging.warning("TrueFill %s: %s%s", node, note, where)


def _unsifted(mask: torch.Tensor) -> torch.Tensor:
    """The mask as float32 [B, 1, H, W] in [0, 1], noise included."""
    if mask.ndim == 2:
        mask = mask[None, None]
    elif mask.ndim == 3:
        mask = mask[:, None]
    elif mask.ndim == 4:
        mask = mask[:, :1]
    else:
        raise ValueError(
            f"A mask needs 2 to 4 dimensions ([H, W], [B, H, W] or [B, C, H, W]); this one has {mask.ndim}."
        )
    if 0 in mask.shape:
        raise ValueError(f"The mask is empty: its shape is {list(mask.shape)}. Connect a mask with at least one pixel.")
    return mask.float().nan_to_num(nan=0.0).clamp(0.0, 1.0)
