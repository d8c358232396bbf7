"""What to put into a hole before sampling begins: colors from around it, noise, or gray."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from .masks import as_mask_batch, resize_mask
from .pictures import check_pictures, common_count

Fill = Literal["blurred", "edge", "mean", "noise", "gray", "box blurs"]
GRAY = 0.5
_BOX_BLURS = ((512, 2), (256, 2), (128, 4), (64, 4), (33, 8), (15, 8), (5, 16), (3, 16))
"""Radius in pixels and repeats, as Fooocus and DreamMix have them."""


def fill_hole(pictures: torch.Tensor, mask: torch.Tensor, method: Fill = "blurred", seed: int = 0) -> torch.Tensor:
    """Pictures [B, C, H, W] in [0, 1] with something else in their holes.

    `mask` is as for `as_mask_batch`, of the pictures' size; a batch of 1 goes with every picture. Gray values mix both.
    Where there is no hole the picture stays as it is, bit for bit. Pixels of the hole, however gray, count as unknown.

    method: "blurred" interpolates smoothly from all around the hole (push-pull pyramid: Gortler et al., "The Lumigraph",
        section 4.3). "edge" repeats the nearest known pixel. "mean" is the mean of all known pixels. "noise" is normally
        distributed with the mean and deviation of the known pixels, from `seed`. "gray" is 0.5, which inpainting models see
        as their hole. "box blurs" blurs the picture again and again, hole and all, by less and less, and puts the known pixels
        back each time (DreamMix's released code, after Fooocus); seconds for a picture of a megapixel.

    A picture without a known pixel becomes gray (noise around gray for "noise"). The input is not changed. Raises ValueError
    for an unknown method and for sizes that do not fit together.
    """
    if method not in get_args(Fill):
        raise ValueError(f"There is no fill '{method}'; choose one of {', '.join(get_args(Fill))}.")
    if pictures.ndim != 4:
        raise ValueError(f"Pictures need 4 dimensions [B, C, H, W]; these have {pictures.ndim}.")
    mask = as_mask_batch(mask).to(pictures)
    if mask.shape[-2:] != pictures.shape[-2:]:
        raise ValueError(
            f"The mask is {mask.shape[-1]}x{mask.shape[-2]} pixels, the picture {pictures.shape[-1]}x{pictures.shape[-2]}: "
            "bring the mask to the picture's size."
        )
    count = common_count(image=len(pictures), mask=len(mask))
    pictures, mask = pictures.expand(count, -1, -1, -1), mask.expand(count, -1, -1, -1)
    known = (mask == 0).to(pictures)
    if method == "gray":
        made = torch.full_like(pictures, GRAY)
    elif method == "blurred":
        made = _push_pull(pictures, known)
    elif method == "edge":
        made = torch.stack([_nearest(picture, there[0] > 0) for picture, there in zip(pictures, known, strict=True)])
    elif method == "box blurs":
        made = torch.stack([_box_blurred(picture, there) for picture, there in zip(pictures, known, strict=True)])
    else:
        mean, deviation = _statistics(pictures, known)
        made = mean.expand_as(pictures)
        if method == "noise":
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(pictures.shape, generator=generator).to(pictures)
            made = (mean + deviation * noise).clamp(0.0, 1.0)
    return torch.where(mask == 0, pictures, torch.lerp(pictures, made, mask))


def fill_pictures(pictures: torch.Tensor, mask: torch.Tensor, method: Fill = "blurred", seed: int = 0) -> torch.Tensor:
    """`fill_hole` for pictures as the host has them, [B, H, W, 3 or 4]; a mask of another size is resized."""
    check_pictures(pictures, "'image'")
    filled = fill_hole(pictures.movedim(-1, 1), resize_mask(mask, pictures.shape[1:3]), method, seed)
    return filled.movedim(1, -1).contiguous()


def _statistics(pictures: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the known pixels, [B, C, 1, 1]; gray and a quarter where there are none."""
    count = known.sum(dim=(2, 3), keepdim=True)
    there = count > 0
    count = count.clamp(min=1.0)
    mean = (pictures * known).sum(dim=(2, 3), keepdim=True) / count
    deviation = (((pictures - mean) * known).square().sum(dim=(2, 3), keepdim=True) / count).sqrt()
    return torch.where(there, mean, GRAY), torch.where(there, deviation, 0.25)


def _nearest(picture: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """A picture [C, H, W] in which every pixel is the nearest of those in `known`, bool [H, W]."""
    if not bool(known.any()):
        return torch.full_like(picture, GRAY)
    indices = ndimage.distance_transform_edt(~known.cpu().numpy(), return_distances=False, return_indices=True)
    rows, columns = torch.from_numpy(np.asarray(indices)).long().to(picture.device)
    return picture[:, rows, columns]


def _box_blurred(picture: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """A picture [C, H, W] whose pixels that are not `known`, [1, H, W], come from ever narrower blurs."""
    if not bool(known.any()):
        return torch.full_like(picture, GRAY)
    old, keep = picture.cpu().double().numpy(), known.cpu().numpy() > 0
    made = old
    for radius, repeats in _BOX_BLURS:
        for _ in range(repeats):
            for axis in (1, 2):
                made = ndimage.uniform_filter1d(made, 2 * radius + 1, axis=axis, mode="nearest")
            made = np.where(keep, old, made)
    return torch.from_numpy(made).to(picture)


def _push_pull(pictures: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Unknown pixels from ever coarser means of the known ones."""
    colors, weight = [pictures * known], [known]
    while max(colors[-1].shape[-2:]) > 1:
        # A cell that knows of anything counts as known: only its sum tells how much of it is.
        total = F.avg_pool2d(weight[-1], 2, ceil_mode=True, count_include_pad=False)
        colors.append(F.avg_pool2d(colors[-1], 2, ceil_mode=True, count_include_pad=False) / total.clamp(min=1e-6))
        weight.append((total > 0).to(total))
        colors[-1] = colors[-1] * weight[-1]
    made = torch.where(weight[-1] > 0, colors[-1], GRAY)
    for color, there in zip(colors[-2::-1], weight[-2::-1], strict=True):
        coarse = F.interpolate(made, size=color.shape[-2:], mode="bilinear", align_corners=False)
        made = torch.where(there > 0, color, coarse)
    return made
