"""What every function that takes pictures asks of them, and how they are resampled."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F


def check_pictures(pictures: torch.Tensor, name: str) -> None:
    """Raises ValueError, beginning with `name`, unless `pictures` are [B, H, W, 3 or 4], floating point and finite."""
    if pictures.ndim != 4 or 0 in pictures.shape or pictures.shape[-1] not in (3, 4):
        raise ValueError(
            f"{name} has the shape {list(pictures.shape)}, but [B, H, W, C] with at least one pixel and "
            "3 or 4 channels is needed."
        )
    if not pictures.is_floating_point():
        raise ValueError(f"{name} is of type {pictures.dtype}, but floating point from 0 to 1 is needed.")
    if not pictures.isfinite().all():
        raise ValueError(f"{name} holds values that are NaN or infinite, but values from 0 to 1 are needed.")


def common_count(**counts: int) -> int:
    """The length of a batch made of batches of 1 and of one other length, given by the names of the inputs.

    Raises ValueError, naming them, for batches that don't go together.
    """
    most = max(counts.values())
    if set(counts.values()) - {1, most}:
        found = ", ".join(f"{count} in '{name}'" for name, count in counts.items())
        raise ValueError(f"These batches don't go together: {found}; each has to have 1 or {most}.")
    return most


def resampled(planes: torch.Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"]) -> torch.Tensor:
    """Planes [B, C, h, w] at another `size` (height, width), anti-aliased. Bicubic overshoots."""
    if size[1] > 1:
        return F.interpolate(planes, size=size, mode=mode, antialias=True, align_corners=False)
    # What torch 2.14 makes of a result one pixel wide is not that picture, but one pixel high is.
    turned = planes.transpose(-1, -2).contiguous()
    return F.interpolate(turned, size=size[::-1], mode=mode, antialias=True, align_corners=False).transpose(-1, -2)
