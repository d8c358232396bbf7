"""Crops a region around a hole at a model's native resolution and stitches what was made of it back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .harmonize import ONLY_BLEND, Harmony, harmonize_pictures
from .mask_shapes import mask_shape
from .masks import as_mask_batch, hole_of, resize_mask
from .morphology import bounding_boxes
from .morphology import feather as feather_mask
from .pictures import check_pictures, common_count, resampled
from .region_plan import Box, Plan, RegionSettings, plan


@dataclass(frozen=True, eq=False)
class Region:
    """What `stitch` needs: the originals and where the crops came from.

    picture: [P, H, W, C], the very tensor that was cropped; never written to.
    mask: [Q, H, W] float32 in [0, 1], at the size of the picture: the weight of the new, 0 or above the noise.
    plan: one box for each of the B crops. P and Q are B or 1.
    """

    picture: torch.Tensor
    mask: torch.Tensor
    plan: Plan


def crop(
    pictures: torch.Tensor,
    mask: torch.Tensor,
    settings: RegionSettings,
    context_mask: torch.Tensor | None = None,
    feather: float = 0.0,
    fill_box: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Region]:
    """Cuts the regions around the holes out of pictures, at the size `settings` asks for.

    `pictures` are [P, H, W, C] in [0, 1], C = 3 or 4; `mask` and `context_mask`, which marks what the region must hold besides
    the hole, are as for `resize_mask`, of any size, Q and K of them. Each count is 1 or the batch's length B. Where a picture has
    no hole, its context mask alone places the region, and without that it is at the centre. `feather` gives the hole a soft
    edge of so many pixels of the picture, outside of it, which `stitch` blends by; the crop's mask is then 1 in all of it, so
    that what is blended is new throughout. Without a feather, gray stays the weight that `stitch` blends by. With `fill_box` all
    of the hole's box is hole, as LAR-Gen's release does for a prompt with a subject.

    Returns the crops [B, height, width, C], their masks [B, height, width], both in [0, 1], and what `stitch` needs. Beyond
    the picture a crop and its mask are mirrored (edge pixel not repeated): a hole at the border goes on, so that nothing
    of what is to be replaced shows up there. Where the picture is too small to be mirrored so far, its edge is repeated.

    Raises ValueError, in the words of the node, for wrong shapes or counts, a picture that isn't floating point, values that
    aren't finite, and a feather below 0.
    """
    check_pictures(pictures, "'image'")
    if not 0 <= feather < math.inf:
        raise ValueError(f"feather is {feather}, but must be 0 or more, and finite.")
    height, width = pictures.shape[1:3]
    hole = _full_size_mask(mask, "'mask'", pictures)
    if fill_box:
        hole = mask_shape(hole, "box", growth=0.0)[:, 0]
    if feather:
        # Through the door once more: the faint end of a wide edge is no hole.
        hole = as_mask_batch(feather_mask(hole, feather, "outside", "smooth"))[:, 0]
    context = None if context_mask is None else _full_size_mask(context_mask, "'context_mask'", pictures)
    counts = {"image": len(pictures), "mask": len(hole)} | ({} if context is None else {"context_mask": len(context)})
    count = common_count(**counts)
    occupied = hole > 0 if context is None else (hole > 0) | (context > 0)
    found = [Box(*sides) if sides[2] else None for sides in bounding_boxes(occupied).tolist()]
    chosen = plan(found * (count // len(found)), (height, width), settings)
    crops, crop_masks = [], []
    for index, box in enumerate(chosen.boxes):
        rows = mirrored(box.top, box.bottom, height, pictures.device)
        columns = mirrored(box.left, box.right, width, pictures.device)
        part = pictures[index % len(pictures)].index_select(0, rows).index_select(1, columns)
        part_mask = hole[index % len(hole)].index_select(0, rows).index_select(1, columns)
        crops.append(_resize(part, chosen.size))
        crop_masks.append(resize_mask(part_mask, chosen.size)[0, 0])
    made = torch.stack(crop_masks)
    return torch.stack(crops), (made > 0).to(made) if feather else made, Region(pictures, hole, chosen)


def place(region: Region, pictures: torch.Tensor, name: str = "The new picture") -> torch.Tensor:
    """Lays pictures made from the crops of `region` over the originals, box and all: [N, H, W, C], new memory.

    `pictures` are [N, h, w, 3 or 4] in [0, 1] of any size (it is resized to the region's box) on any device. N is B, the
    number of crops, or a multiple of it: new picture i belongs to crop i modulo B, the order in which the host
    repeats a batch. The result has the original's channels, type and device; alpha is laid over like the colours where both
    have it, else the original's stays, and an original without it gets none.

    Raises ValueError for wrong shapes or counts, a picture that isn't floating point, and values that aren't finite; its
    sentence begins with `name`.
    """
    check_pictures(pictures, name)
    boxes = region.plan.boxes
    if len(pictures) % len(boxes):
        raise ValueError(
            f"{name} is a batch of {len(pictures)}, but the region has {len(boxes)} crops: a batch of {len(boxes)} is needed, or "
            "of a multiple of it."
        )

    height, width = region.plan.picture_size
    channels = min(pictures.shape[-1], region.picture.shape[-1])
    result = _originals(region, len(pictures))[0]
    for index, picture in enumerate(pictures):
        box = boxes[index % len(boxes)]
        left, top, right, bottom = max(0, box.left), max(0, box.top), min(width, box.right), min(height, box.bottom)
        new = _resize(picture[..., :channels].to(result), region.plan.box_size)
        new = new[top - box.top : bottom - box.top, left - box.left : right - box.left]
        result[index, top:bottom, left:right, :channels] = new
    return result


def stitch(
    region: Region, pictures: torch.Tensor, harmony: Harmony = ONLY_BLEND, name: str = "The new picture"
) -> torch.Tensor:
    """Puts pictures made from the crops of `region` back into the originals: [N, H, W, C], new memory.

    As `place`, but blended by the mask at full resolution: 0 keeps the original bit for bit, 1 takes the new pixel,
    values between mix the two. `harmony` says what is done about a change of tone.
    """
    new = place(region, pictures, name)
    old, mask = _originals(region, len(new))
    return harmonize_pictures(new, old, mask, harmony)


def may_change(region: Region, count: int) -> torch.Tensor:
    """Where `stitch` may change the originals of `count` new pictures: float32 [count, H, W], 1 there and 0 elsewhere."""
    return hole_of(_originals(region, count)[1])[:, 0].float()


def mirrored(start: int, stop: int, side: int, device: torch.device) -> torch.Tensor:
    """The indices of a line of `side` pixels that the positions `start` to `stop` (exclusive) show."""
    position = torch.arange(start, stop, device=device)
    if max(-start, stop - side) >= side:
        return position.clamp(0, side - 1)
    last = side - 1
    return last - (last - position.abs()).abs()


def _originals(region: Region, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The originals [count, H, W, C] and masks [count, H, W] that so many new pictures belong to, in new memory."""
    order = torch.arange(count, device=region.picture.device)
    return region.picture[order % len(region.picture)], region.mask[order % len(region.mask)]


def _resize(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resamples [h, w, C] to `size`; the tensor itself where it has that size already.

    Bicubic keeps the detail of pictures, and what it overshoots is cut off.
    """
    if tuple(picture.shape[:2]) == tuple(size):
        return picture
    # Half precision has no anti-aliased kernel on every device.
    planes = picture.movedim(-1, 0)[None].float()
    return resampled(planes, size, "bicubic")[0].movedim(0, -1).clamp(0.0, 1.0).to(picture.dtype)


def _full_size_mask(mask: torch.Tensor, name: str, pictures: torch.Tensor) -> torch.Tensor:
    """A mask as float32 [B, H, W] in [0, 1], at the size and on the device of the pictures; `name` is refused if not finite."""
    if not mask.isfinite().all():
        raise ValueError(f"{name} holds values that are NaN or infinite, but values from 0 to 1 are needed.")
    return resize_mask(mask.to(pictures.device), pictures.shape[1:3])[:, 0]
