"""Which part of a picture a model gets to see around a hole, and at what size: integers only, no picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

# A region this close to its target is cut out as it is: resampling by less softens everything and gains nothing.
_NO_RESAMPLING = Fraction(1, 100)
# How far a side may grow (pixels, exclusive) beyond its target where that saves the resampling: one latent cell.
_FEW_PIXELS = 8
_ANY_ASPECT = 1e6
_LOCAL_GROWTH = 1.15
LOCAL_SHARE = 0.618
"""How much of a picture's width and height DreamMix's local region has at least (released code)."""


class Box(NamedTuple):
    """A rectangle of pixels, `right` and `bottom` exclusive. Negative or too large where it reaches out of the picture."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


@dataclass(frozen=True)
class RegionSettings:
    """How much of a picture is cut out around a hole, and at what size the model gets it.

    native_size: side in pixels of the square the model was trained on (SD1.5 512, SD2 768, SDXL 1024). Crops have about this
        area, at the aspect of the region.
    multiple: both sides of a crop are multiples of this, itself a multiple of 8.
    context_percent, context_pixels: what surrounds the hole on each side: the larger of a percentage of the side of the
        hole's box and a number of pixels, as far as the picture goes.
    min_side: smallest side of the region in pixels, as far as the picture goes.
    max_aspect: the long side is at most this times the short one; the short one is extended, if need be beyond the
        picture.
    max_upscale: the region is enlarged at most by this factor, and gives a crop of less than the native area where that
        is not enough; 1 never enlarges.
    forced_size: (height, width) of the crop instead of the native area. The region is extended to its aspect, and
        further where max_upscale forbids to enlarge it so much; max_aspect doesn't apply.
    picture_share: the region is what `local_box` gives for this share of the picture, instead of what the context says.

    Raises ValueError for a value out of range.
    """

    native_size: int = 512
    multiple: int = 8
    context_percent: float = 50.0
    context_pixels: int = 32
    min_side: int = 128
    max_aspect: float = 2.0
    max_upscale: float = 4.0
    forced_size: tuple[int, int] | None = None
    picture_share: float | None = None

    @staticmethod
    def local(native_size: int, picture_share: float, multiple: int = 8) -> RegionSettings:
        """DreamMix's local region (released code): `local_box`, at about the model's native area and in its own shape."""
        return RegionSettings(
            native_size=native_size,
            multiple=multiple,
            min_side=1,
            max_aspect=_ANY_ASPECT,
            max_upscale=float(native_size),
            picture_share=picture_share,
        )

    @staticmethod
    def zoom_in(native_size: int, multiple: int = 8) -> RegionSettings:
        """LAR-Gen's zoom-in (section 3.1): the hole's box times 1.3, made square, at the model's native size."""
        return RegionSettings(
            native_size=native_size,
            multiple=multiple,
            context_percent=15.0,
            context_pixels=0,
            min_side=1,
            max_aspect=1.0,
            max_upscale=float(native_size),
        )

    def __post_init__(self) -> None:
        forced = self.forced_size
        rules = (
            ("multiple", self.multiple, self.multiple >= 8 and self.multiple % 8 == 0, "a positive multiple of 8"),
            (
                "native_size",
                self.native_size,
                self.native_size >= self.multiple,
                f"at least the multiple, {self.multiple}",
            ),
            ("context_percent", self.context_percent, 0 <= self.context_percent < math.inf, "0 or more, and finite"),
            ("context_pixels", self.context_pixels, self.context_pixels >= 0, "0 or more"),
            ("min_side", self.min_side, self.min_side >= 1, "1 or more"),
            ("max_aspect", self.max_aspect, 1 <= self.max_aspect < math.inf, "1 or more, and finite"),
            ("max_upscale", self.max_upscale, 1 <= self.max_upscale < math.inf, "1 or more, and finite"),
            (
                "forced_size",
                forced,
                forced is None or (len(forced) == 2 and all(s > 0 and s % self.multiple == 0 for s in forced)),
                f"(height, width), both positive multiples of {self.multiple}",
            ),
            (
                "picture_share",
                self.picture_share,
                self.picture_share is None or 0 <= self.picture_share <= 1,
                "from 0 to 1",
            ),
        )
        for name, given, holds, need in rules:
            if not holds:
                raise ValueError(f"{name} is {given}, but must be {need}.")


@dataclass(frozen=True)
class Plan:
    """Where each crop of a batch lies, and the size it is brought to.

    boxes: one per crop, all of one size.
    size: (height, width) of the crops in pixels; equals the size of the boxes where nothing is resampled.
    picture_size: (height, width) of the pictures in pixels.
    """

    boxes: tuple[Box, ...]
    size: tuple[int, int]
    picture_size: tuple[int, int]

    @property
    def box_size(self) -> tuple[int, int]:
        """(height, width) of every box, in pixels of the picture."""
        return self.boxes[0].height, self.boxes[0].width

    @property
    def scale(self) -> tuple[float, float]:
        """Crop pixels per picture pixel, (vertical, horizontal). Equal but for the rounding of the box to whole pixels."""
        return self.size[0] / self.box_size[0], self.size[1] / self.box_size[1]

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Pixels of every box beyond the picture: (top, bottom, left, right).

        One answer for all boxes, because only a box larger than the picture reaches out of it, and such boxes coincide.
        """
        box, (height, width) = self.boxes[0], self.picture_size
        return max(0, -box.top), max(0, box.bottom - height), max(0, -box.left), max(0, box.right - width)


def plan(boxes: Sequence[Box | None], picture_size: tuple[int, int], settings: RegionSettings) -> Plan:
    """Chooses the regions around the holes of a batch of pictures.

    `boxes` are the holes' bounding boxes, None for a picture without a hole; `picture_size` is (height, width). All
    regions get the size that the largest hole needs in each direction. Each is centred on its hole, shifted into the
    picture where it reaches over the border, and reaches out only where it is larger than the picture, by the same on
    both sides. A picture without a hole gives the region at its centre; if none has a hole, that is the whole picture.

    The scale is exactly 1 where the region needs less than 1 % of resampling and the size can be had by taking a few
    more pixels instead. It never exceeds `settings.max_upscale`.

    Raises ValueError for an empty batch, a picture without pixels and a box that is empty or not inside the picture.
    """
    whole = Box(0, 0, picture_size[1], picture_size[0])
    if not boxes or whole.height < 1 or whole.width < 1:
        raise ValueError(
            f"A region needs at least one picture with at least one pixel, not {len(boxes)} of {_by(picture_size)}."
        )
    for box in boxes:
        if box and not (0 <= box.top < box.bottom <= whole.bottom and 0 <= box.left < box.right <= whole.right):
            raise ValueError(
                f"The box {tuple(box)} must hold a pixel and lie inside its picture of {_by(picture_size)}."
            )

    regions = [box and _with_context(box, whole, settings) for box in boxes]
    holes = [region for region in regions if region] or [whole]
    box_size, size = _fit(
        max(max(region.height for region in holes), min(settings.min_side, whole.height)),
        max(max(region.width for region in holes), min(settings.min_side, whole.width)),
        settings,
    )
    placed = tuple(_place(region or whole, box_size, whole) for region in regions)
    return Plan(placed, size, (whole.height, whole.width))


def local_box(hole: Box, picture_size: tuple[int, int], share: float) -> Box:
    """The part of a picture around a hole's box that DreamMix works on before the whole picture (released code).

    A square about the hole, 1.15 times its longer side, cut off at the border; then one pixel is added on both sides of the
    shorter direction (of the width where they are equal, and of the other one where the picture ends), until the box is at
    least `share` of the picture in both. It always holds the hole.
    """
    height, width = picture_size
    # Half the way from the first to the last pixel, as the release takes it: for a hole of one pixel, nothing.
    half = int(_LOCAL_GROWTH * max((hole.height - 1) // 2, (hole.width - 1) // 2))
    row, column = (hole.top + hole.bottom - 1) // 2, (hole.left + hole.right - 1) // 2
    top, bottom = max(0, min(row - half, hole.top)), min(height, max(row + half + 1, hole.bottom))
    left, right = max(0, min(column - half, hole.left)), min(width, max(column + half + 1, hole.right))
    while bottom - top < share * height or right - left < share * width:
        is_taller = bottom - top >= right - left
        if right - left < width and (is_taller or bottom - top == height):
            left, right = max(0, left - 1), min(width, right + 1)
        else:
            top, bottom = max(0, top - 1), min(height, bottom + 1)
    return Box(left, top, right, bottom)


def _with_context(box: Box, whole: Box, settings: RegionSettings) -> Box:
    if settings.picture_share is not None:
        return local_box(box, (whole.height, whole.width), settings.picture_share)
    vertical, horizontal = (
        max(math.ceil(side * _exact(settings.context_percent) / 100), settings.context_pixels)
        for side in (box.height, box.width)
    )
    return Box(
        left=max(whole.left, box.left - horizontal),
        top=max(whole.top, box.top - vertical),
        right=min(whole.right, box.right + horizontal),
        bottom=min(whole.bottom, box.bottom + vertical),
    )


def _fit(height: int, width: int, settings: RegionSettings) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes (height, width) of the box for a region of at least this size, and of its crop."""
    if settings.forced_size:
        size = settings.forced_size
        box = _enclosing(height, width, size, settings.max_upscale)
    else:
        height, width = _with_aspect(height, width, settings.max_aspect, 1)
        wanted = settings.native_size / math.sqrt(height * width)
        scale = min(wanted, settings.max_upscale)
        # A crop that can't have the native area must not lose any more of it to the rounding.
        cells = math.ceil if wanted > scale else round
        size = _with_aspect(
            max(1, cells(height * scale / settings.multiple)) * settings.multiple,
            max(1, cells(width * scale / settings.multiple)) * settings.multiple,
            settings.max_aspect,
            settings.multiple,
        )
        box = _enclosing(height, width, size, settings.max_upscale)
        if abs(scale - 1) <= _NO_RESAMPLING or _nearly(size, box):
            tall, wide = (math.ceil(side / settings.multiple) * settings.multiple for side in (height, width))
            growth = ((tall, height, size[0]), (wide, width, size[1]))
            if all(grown - side < _FEW_PIXELS or grown == target for grown, side, target in growth):
                box = size = _with_aspect(tall, wide, settings.max_aspect, settings.multiple)
    if _nearly(size, box) and size[0] >= height and size[1] >= width:
        box = size
    return box, size


def _enclosing(height: int, width: int, size: tuple[int, int], max_upscale: float) -> tuple[int, int]:
    """The smallest box of the aspect of `size` that holds the region and is enlarged to `size` by max_upscale at most."""
    scale = min(Fraction(size[0], height), Fraction(size[1], width), _exact(max_upscale))
    return math.ceil(size[0] / scale), math.ceil(size[1] / scale)


def _with_aspect(height: int, width: int, max_aspect: float, step: int) -> tuple[int, int]:
    """Extends the short side to the next multiple of `step` that keeps the aspect."""
    shortest = math.ceil(max(height, width) / _exact(max_aspect) / step) * step
    return max(height, shortest), max(width, shortest)


def _nearly(size: tuple[int, int], box: tuple[int, int]) -> bool:
    return all(abs(new - old) <= old * _NO_RESAMPLING for new, old in zip(size, box, strict=True))


def _exact(value: float) -> Fraction:
    """The number that was typed: 1.2 as 6 / 5, so that 1.2 times 600 is 720 and not a little less."""
    return Fraction(value).limit_denominator(10**6)


def _place(region: Box, size: tuple[int, int], whole: Box) -> Box:
    top = _centred(region.top, region.height, size[0], whole.height)
    left = _centred(region.left, region.width, size[1], whole.width)
    return Box(left, top, left + size[1], top + size[0])


def _centred(start: int, side: int, new_side: int, limit: int) -> int:
    if new_side > limit:
        return (limit - new_side) // 2
    return min(max(start + (side - new_side) // 2, 0), limit - new_side)


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} pixels"
