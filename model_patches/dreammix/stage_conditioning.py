"""What of a picture's conditioning a stage gets that works on a part of it: areas, masks, control pictures, sizes.

A conditioning speaks of the whole picture. Where a crop of it is sampled, at another size, everything in it that lies somewhere
is cut out and resized along, so that it lies where it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...imaging.pictures import resampled
from ...imaging.region import mirrored
from ...imaging.region_plan import Box
from .attribute_substitution import RAW_POOLED_KEY

Conditionings = Mapping[str, Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """The part of pictures of a size (height, width) that a stage shows: one box for each, at `size` (height, width) in pixels.

    Beyond the pictures they are mirrored, as in `imaging.region`.
    """

    picture_size: tuple[int, int]
    boxes: tuple[Box, ...]
    size: tuple[int, int]

    @property
    def is_whole(self) -> bool:
        """Whether it shows the pictures as they are."""
        height, width = self.picture_size
        return self.size == self.picture_size and all(tuple(box) == (0, 0, width, height) for box in self.boxes)

    def of(self, planes: torch.Tensor) -> torch.Tensor:
        """The part of planes [B, C, h, w] of any size that show the whole pictures: [boxes or B, C, *size], float32."""
        planes = planes.float()
        if tuple(planes.shape[-2:]) != self.picture_size:
            planes = resampled(planes, self.picture_size, "bilinear")
        boxes = self.boxes if len(set(self.boxes)) > 1 else self.boxes[:1]
        height, width = self.picture_size
        parts = []
        for index in range(max(len(planes), len(boxes))):
            box, plane = boxes[index % len(boxes)], planes[index % len(planes)]
            rows = mirrored(box.top, box.bottom, height, planes.device)
            columns = mirrored(box.left, box.right, width, planes.device)
            parts.append(plane.index_select(-2, rows).index_select(-1, columns))
        cut = torch.stack(parts)
        return cut if tuple(cut.shape[-2:]) == self.size else resampled(cut, self.size, "bilinear")


def conditionings_of(
    conditionings: Conditionings, part: Part, cell: int, concat: Mapping[str, torch.Tensor], raw_pooled: bool
) -> dict[str, list[dict[str, Any]]]:
    """The conditionings of a guider, by role, for a stage.

    `cell` is the side in pixels of a cell of the latent, `concat` what an inpainting model gets to see in this stage. With
    `raw_pooled` a pooled output from which attributes were taken is the one it was before. Nothing given is changed.
    """
    made = {}
    for role, entries in conditionings.items():
        own = [_entry_of(dict(entry), part, cell, concat, raw_pooled) for entry in entries]
        made[role] = [entry for entry in own if entry is not None]
        if entries and not made[role]:
            raise ValueError(
                f"No area of the {role} conditioning reaches into the part of the picture around the hole: widen an area, or "
                "give the hole a prompt of its own."
            )
    return made


def _entry_of(
    entry: dict[str, Any], part: Part, cell: int, concat: Mapping[str, torch.Tensor], raw_pooled: bool
) -> dict[str, Any] | None:
    """None for an entry whose area does not reach into the part."""
    entry.update(concat)
    if raw_pooled and RAW_POOLED_KEY in entry:
        entry["pooled_output"] = entry[RAW_POOLED_KEY]
    if "target_width" in entry:
        # What SDXL is told about the size it makes; of the original's size, which stands for quality, nothing changes.
        entry["target_height"], entry["target_width"] = part.size
    if part.is_whole:
        return entry
    if entry.get("control") is not None:
        entry["control"] = _control_of(entry["control"], part.of)
    if entry.get("mask") is not None:
        entry["mask"] = part.of(_planes(entry["mask"]))[:, 0]
    if entry.get("area") is not None:
        areas = {_area_of(entry["area"], part, box, cell) for box in part.boxes}
        if len(areas) > 1:
            raise ValueError(
                "A conditioning has an area, and the pictures of the batch have their holes in different places: give each "
                "picture a run of its own, or limit the conditioning by a mask (Conditioning Set Mask)."
            )
        entry["area"] = areas.pop()
        return entry if entry["area"] is not None else None
    return entry


def _area_of(area: Sequence[Any], part: Part, box: Box, cell: int) -> tuple[int, int, int, int] | None:
    """(height, width, top, left) in cells of what of an area lies in the part's `box`; None where nothing does."""
    height, width = part.picture_size
    if area[0] == "percentage":
        rows, columns, top, left = (of * side for of, side in zip(area[1:], (height, width) * 2, strict=True))
    else:
        rows, columns, top, left = (cell * of for of in area)
    spans = []
    for first, length, start, side, shown in (
        (top, rows, box.top, box.height, part.size[0]),
        (left, columns, box.left, box.width, part.size[1]),
    ):
        scale = shown / side / cell
        begin = math.floor(max(first - start, 0) * scale)
        end = math.ceil(min(first + length - start, side) * scale)
        if first + length <= start or first >= start + side:
            return None
        spans.append((end - begin, begin))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def _control_of(control: Any, cut: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A ControlNet, and those before it, with the part's picture; the host's own copy shares the weights."""
    made = control.copy()
    if control.cond_hint_original is not None:
        made.cond_hint_original = cut(control.cond_hint_original)
    made.extra_concat_orig = [
        cut(of) if min(of.shape[-2:]) > 1 else of for of in getattr(control, "extra_concat_orig", [])
    ]
    if control.previous_controlnet is not None:
        made.set_previous_controlnet(_control_of(control.previous_controlnet, cut))
    return made


def _planes(mask: torch.Tensor) -> torch.Tensor:
    """A conditioning's mask, [h, w], [B, h, w] or [B, 1, h, w], as [B, 1, h, w]."""
    return mask.reshape(-1, 1, *mask.shape[-2:])
