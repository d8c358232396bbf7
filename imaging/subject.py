"""A subject cut out of its picture and laid on white, as LAR-Gen's encoders want it (section 3.2, and the released code)."""

from __future__ import annotations

import torch

from .masks import resize_mask
from .morphology import bounding_boxes
from .pictures import check_pictures, common_count, resampled

CLIP_SIDE = 224
CLIP_MARGIN = 1.02
"""The square that CLIP sees is so many times larger than the subject's longer side."""


def cut_out(pictures: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Each picture's subject on white, [h, w, 3], cut to the box of its mask.

    `pictures` [B, H, W, 3 or 4] in [0, 1]; `mask` [H, W], [B, H, W] or [B, 1, H, W], 1 = subject, resized to the pictures.
    Without one the fourth channel, alpha, is the mask, and without that the whole picture is the subject. Where the mask is gray,
    the picture shows through as much. Raises ValueError for batches that don't go together, and where there is no subject.
    """
    check_pictures(pictures, "The picture of the subject")
    size = pictures.shape[1:3]
    if mask is None and pictures.shape[3] == 4:
        mask, what = pictures[..., 3], "its alpha is 0 everywhere"
    else:
        what = "its mask is black"
    covered = pictures.new_ones(1, *size) if mask is None else resize_mask(mask, size)[:, 0]
    count = common_count(image=len(pictures), mask=len(covered))
    weights = covered.to(pictures).expand(count, -1, -1)[..., None]
    on_white = pictures[..., :3] * weights + (1.0 - weights)
    cut = []
    for number, (left, top, right, bottom) in enumerate(bounding_boxes(weights[..., 0]).tolist()):
        if right <= left:
            raise ValueError(
                f"Picture {number + 1} has no subject, since {what}: paint the subject white in the mask, or leave the mask away."
            )
        cut.append(on_white[number, top:bottom, left:right])
    return cut


def for_clip(subject: torch.Tensor) -> torch.Tensor:
    """A subject [h, w, 3] in the middle of a white square, [224, 224, 3]; anti-aliased bilinear."""
    side = round(CLIP_MARGIN * max(subject.shape[:2]))
    return _resized(_in_the_middle(subject, side), (CLIP_SIDE, CLIP_SIDE))


def for_branch(subject: torch.Tensor, side: int) -> torch.Tensor:
    """A subject [h, w, 3] with its longer side brought to `side`, in the middle of a white square, [side, side, 3]."""
    height, width = subject.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return _in_the_middle(_resized(subject, size), side)


def _resized(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    planes = picture.movedim(-1, 0)[None].float()
    return resampled(planes, size, "bilinear")[0].movedim(0, -1).clamp(0.0, 1.0)


def _in_the_middle(subject: torch.Tensor, side: int) -> torch.Tensor:
    height, width = subject.shape[:2]
    side = max(side, height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = subject.new_ones(side, side, subject.shape[2])
    square[top : top + height, left : left + width] = subject
    return square
