"""Pictures of a subject as the tuning needs them: at the model's size, encoded, each with masks that are drawn beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...imaging.bezier_masks import bezier_masks
from ...imaging.fill import GRAY
from ...imaging.masks import coverage, resize_mask
from ...imaging.pictures import resampled
from .tuning import Example

MULTIPLE = 64
"""Of the sides of a training picture, in pixels."""


def training_size(height: int, width: int, native_size: int) -> tuple[int, int]:
    """(height, width) of about `native_size` squared pixels, in a picture's shape."""
    scale = native_size / math.sqrt(height * width)
    rows, columns = (max(1, round(side * scale / MULTIPLE)) * MULTIPLE for side in (height, width))
    return rows, columns


def encode_example(
    picture: torch.Tensor,
    mask: torch.Tensor,
    prompts: Sequence[Any],
    vae: Any,
    native_size: int,
    masks: int,
    seed: int,
    inpainting: bool,
) -> Example:
    """A picture [H, W, 3 or 4] in [0, 1] whose subject is where `mask` [h, w], of any size, is not black.

    `prompts` are CONDITIONING. So many training masks are drawn (`bezier_masks`); an `inpainting` model gets to see the picture
    without what is in them. Raises ValueError for a mask that is black.
    """
    size = training_size(picture.shape[0], picture.shape[1], native_size)
    planes = picture[None, ..., :3].movedim(-1, 1).float()
    shown = resampled(planes, size, "bicubic").clamp(0.0, 1.0) if tuple(planes.shape[-2:]) != size else planes
    drawn = bezier_masks(resize_mask(mask, size)[0, 0], masks, seed)[:, None]
    latent = vae.encode(shown.movedim(1, -1))
    grid = (latent.shape[-2], latent.shape[-1])
    concat = []
    if inpainting:
        for own in drawn:
            masked = torch.where(own > 0, GRAY, shown)
            concat.append({"concat_latent_image": vae.encode(masked.movedim(1, -1)), "concat_mask": own})
    return Example(latent=latent, masks=coverage(drawn, grid), concat=concat, prompts=prompts)
