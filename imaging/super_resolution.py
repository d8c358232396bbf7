"""The pixels' side of inpainting-specialised super-resolution (HD-Painter, section 3.5): where it works, and on what.

A cell is the square of `factor` pixels that one cell of a latent stands for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .masks import hole_of
from .morphology import bounding_boxes, grow
from .region import mirrored
from .region_plan import Box, Plan, RegionSettings, plan
from .tiling import tile_boxes, tile_weight

# Deviation and reach of the authors' softening: 19 cells of 4 pixels, with the deviation OpenCV takes for that many.
_SOFT_PIXELS, _REACH_PIXELS = 12.8, 36
_CONTEXT_PIXELS, _LEAST_PIXELS = 64, 512
# How many pixels the bicubic kernel goes.
_KERNEL_REACH = 2.0
# The UNets of the SD families halve a latent three times.
_CELLS = 8


@dataclass(frozen=True)
class Part:
    """Where a part of a picture lies: its box, and the (height, width) of the whole."""

    box: Box
    size: tuple[int, int]

    def enlarged(self, factor: int) -> Part:
        """The same part of the picture with `factor` pixels for each."""
        return Part(_scaled(self.box, factor), (self.size[0] * factor, self.size[1] * factor))


@dataclass(frozen=True, eq=False)
class Workplace:
    """The part of one picture that is made anew, and the tiles it is made in.

    box: in cells of the whole picture, which it may reach out of.
    tiles: in cells of the box; they hold every cell that changes.
    hole: [1, 1, h, w] in [0, 1], the softened hole on the box's cells.
    overlap: what neighbouring tiles share, in cells.
    factor: pixels per cell.
    """

    box: Box
    tiles: tuple[Box, ...]
    hole: torch.Tensor
    overlap: int
    factor: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in cells."""
        return self.box.height, self.box.width

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.box.height * self.factor, self.box.width * self.factor

    def pixel_plan(self, picture_size: tuple[int, int]) -> Plan:
        """Where the box lies in a picture of `picture_size` (height, width) pixels, for `region.stitch`."""
        return Plan((_scaled(self.box, self.factor),), self.pixel_size, picture_size)

    def cut(self, pictures: torch.Tensor) -> torch.Tensor:
        """The box of pictures [B, H, W, C], mirrored beyond their border: [B, h * factor, w * factor, C]."""
        return _cut(pictures, _scaled(self.box, self.factor), _all_of(pictures))

    def cells_of(self, low: torch.Tensor, picture_size: tuple[int, int]) -> torch.Tensor:
        """The box of pictures [B, h, w, C] that show all of the large one at another size, at a pixel for each cell.

        Returns [B, h, w, C] in [0, 1]. Pictures of just one pixel a cell are cut and nothing else.
        """
        size = picture_size[0] / self.factor, picture_size[1] / self.factor
        return _part(low, size, self.box, _all_of(low))

    def pixels_of(self, low: torch.Tensor, picture_size: tuple[int, int], part: Part | None = None) -> torch.Tensor:
        """As `cells_of`, but at the resolution of the large picture.

        Where `low` is only a part of pictures that show all of it, `part` says which; it holds what is looked at (`seen`).
        """
        return _part(low, picture_size, _scaled(self.box, self.factor), part or _all_of(low))

    def seen(self, size: tuple[int, int], picture_size: tuple[int, int], margin: int) -> Part:
        """What `pixels_of` looks at in pictures of `size` (height, width), and `margin` more pixels on each side of it.

        Enlarged by any whole factor, the same part holds what it looks at there.
        """
        box = _scaled(self.box, self.factor)
        top, bottom = _looked_at(size[0], picture_size[0], box.top, box.bottom, margin)
        left, right = _looked_at(size[1], picture_size[1], box.left, box.right, margin)
        return Part(Box(left, top, right, bottom), size)

    def pixel_hole(self) -> torch.Tensor:
        """The softened hole on the box's pixels, [1, H, W, 1]."""
        return F.interpolate(self.hole, size=self.pixel_size, mode="bilinear").movedim(1, -1)

    def pixels(self, tile: Box) -> tuple[slice, slice]:
        """A tile's rows and columns among the pixels of the box."""
        box = _scaled(tile, self.factor)
        return slice(box.top, box.bottom), slice(box.left, box.right)

    def join(self, parts: list[torch.Tensor], otherwise: torch.Tensor) -> torch.Tensor:
        """One picture [B, h, w, C] of the tiles' parts, each [B, h, w, C] at the resolution of cells or of pixels.

        Tiles are mixed where they overlap (`tile_weight`); `otherwise` [B, H, W, C], at the size of the box, shows where there
        is no tile.
        """
        scale = otherwise.shape[1] // self.box.height
        total, count = torch.zeros_like(otherwise), otherwise.new_zeros(otherwise.shape[1:3])
        for tile, part in zip(self.tiles, parts, strict=True):
            place = _scaled(tile, scale)
            rows, columns = slice(place.top, place.bottom), slice(place.left, place.right)
            weight = tile_weight(place, (otherwise.shape[1], otherwise.shape[2]), self.overlap * scale).to(otherwise)
            total[:, rows, columns] += weight[..., None] * part.to(otherwise)
            count[rows, columns] += weight
        count = count[..., None]
        return torch.where(count > 0, total / count.clamp(min=torch.finfo(count.dtype).tiny), otherwise)


def widened(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    """What of a picture is made anew, float32 [B, H, W] of 0 and 1: the hole of a mask as for `as_mask_batch`, however gray, and
    all within `pixels` of it."""
    return grow(hole_of(mask).float(), pixels)[:, 0]


def find_workplace(hole: torch.Tensor, factor: int, tile: int, overlap: int) -> Workplace | None:
    """Plans the work on one picture with the hole [H, W] (0 or 1); None where there is no hole.

    `tile` and `overlap` are in pixels; a tile is rounded down to whole multiples of 8 cells, and 0 stands for one tile, as
    large as the box. The box has some context around the hole and is at least as large as a tile (512 pixels where there is
    one), as far as the picture goes.
    """
    if not bool(hole.any()):
        return None
    height, width = hole.shape
    grid = (math.ceil(height / factor), math.ceil(width / factor))
    padded = F.pad(
        hole[None, None].float(), (0, grid[1] * factor - width, 0, grid[0] * factor - height), mode="replicate"
    )
    soft = _softened(F.avg_pool2d(padded, factor), factor)
    needed = soft[0, 0] > 0
    found = Box(*bounding_boxes(needed)[0].tolist())
    side = max(_CELLS, (tile or _LEAST_PIXELS) // factor // _CELLS * _CELLS)
    settings = RegionSettings(
        native_size=1 << 20,
        multiple=_CELLS,
        context_percent=0.0,
        context_pixels=math.ceil(_CONTEXT_PIXELS / factor),
        min_side=side,
        max_aspect=1e6,
        max_upscale=1.0,
    )
    box = plan([found], grid, settings).boxes[0]
    lines = mirrored(box.top, box.bottom, grid[0], soft.device), mirrored(box.left, box.right, grid[1], soft.device)
    inside = soft.index_select(2, lines[0]).index_select(3, lines[1])
    if not tile:
        side = max(box.height, box.width)
    shared = min(overlap // factor, side - 1)
    return Workplace(box, tuple(tile_boxes(inside[0, 0] > 0, side, shared)), inside, shared, factor)


def _softened(cells: torch.Tensor, factor: int) -> torch.Tensor:
    """A mask [1, 1, h, w] after a Gaussian, as if it went on beyond the border as it is there."""
    reach = max(1, _REACH_PIXELS // factor)
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (distance * factor / _SOFT_PIXELS) ** 2)
    taps = (kernel / kernel.sum()).tolist()
    height, width = cells.shape[-2:]
    rows, columns = (_near((cells[0, 0] > 0).any(dim), reach) for dim in (1, 0))
    window = cells[..., rows, columns]
    size = window.shape[-2:]
    window = F.pad(window, (reach,) * 4, mode="replicate")
    # Tap by tap: a convolution of one channel unfolds into as many copies on a CPU, and a GPU may round it to ten bits.
    for dim in (2, 3):
        total = torch.zeros_like(window.narrow(dim, 0, size[dim - 2]))
        for start, tap in enumerate(taps):
            total.add_(window.narrow(dim, start, size[dim - 2]), alpha=tap)
        window = total
    soft = cells.new_zeros(1, 1, height, width)
    # Rounding leaves a full hole a little below 1.
    soft[..., rows, columns] = torch.where(window > 1.0 - 1e-5, 1.0, window)
    return soft


def _near(lines: torch.Tensor, reach: int) -> slice:
    """The lines from `reach` before the first True one to `reach` after the last."""
    found = lines.nonzero()[:, 0]
    return slice(max(0, int(found[0]) - reach), int(found[-1]) + 1 + reach)


def _all_of(pictures: torch.Tensor) -> Part:
    height, width = pictures.shape[1:3]
    return Part(Box(0, 0, width, height), (height, width))


def _cut(pictures: torch.Tensor, box: Box, held: Part) -> torch.Tensor:
    """A box of pictures, of which [B, h, w, C] are the part `held`, mirrored beyond the border of the whole."""
    rows = mirrored(box.top, box.bottom, held.size[0], pictures.device) - held.box.top
    columns = mirrored(box.left, box.right, held.size[1], pictures.device) - held.box.left
    return pictures.index_select(1, rows).index_select(2, columns)


def _part(pictures: torch.Tensor, size: tuple[float, float], box: Box, held: Part) -> torch.Tensor:
    """A box of pictures resized to `size` (height, width), which need not be whole pixels; of the pictures [B, h, w, C] are the
    part `held`."""
    (height, width), (left, top, right, bottom) = held.size, held.box
    if (float(height), float(width)) == (float(size[0]), float(size[1])):
        return _cut(pictures, box, held)
    # The library's resizing takes whole sizes: what lies far from the corner would move by up to a cell.
    down = _resampling(height, size[0], box.top, box.bottom)[:, top:bottom].to(pictures.device)
    across = _resampling(width, size[1], box.left, box.right)[:, left:right].to(pictures.device)
    lines = torch.einsum("yh,bhwc->bywc", down, pictures.float())
    return torch.einsum("xw,bywc->byxc", across, lines).clamp(0.0, 1.0)


def _positions(given: int, wanted: float, start: int, stop: int) -> torch.Tensor:
    """Where in a line of `given` pixels the centres of the pixels `start` to `stop` lie, when it is made `wanted` long."""
    position = mirrored(start, stop, math.ceil(wanted), torch.device("cpu"))
    # The last pixel may lie in part beyond the line.
    return ((position.double() + 0.5) * (given / wanted)).clamp(max=given)


def _resampling(given: int, wanted: float, start: int, stop: int) -> torch.Tensor:
    """Weights [stop - start, given] that make lines of `given` pixels `wanted` long: bicubic, anti-aliased, mirrored beyond."""
    centre = _positions(given, wanted, start, stop)
    distance = (torch.arange(given) + 0.5 - centre[:, None]).abs() / max(1.0, given / wanted)
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    weight = torch.where(distance <= 1.0, near, torch.where(distance < _KERNEL_REACH, far, 0.0))
    return (weight / weight.sum(1, keepdim=True)).float()


def _looked_at(given: int, wanted: float, start: int, stop: int, margin: int) -> tuple[int, int]:
    """The first and the last (exclusive) pixel of the line that `_resampling` has weights for, with a margin."""
    centre = _positions(given, wanted, start, stop)
    reach = _KERNEL_REACH * max(1.0, given / wanted) + margin
    return max(0, math.floor(float(centre.min()) - reach)), min(given, math.ceil(float(centre.max()) + reach))


def _scaled(box: Box, scale: int) -> Box:
    return Box(*(scale * line for line in box))
