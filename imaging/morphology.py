"""Growing, shrinking, feathering and tidying of hole masks, in which a pixel is a pixel.

Every function takes a mask as [H, W], [B, H, W] or [B, C, H, W] (first channel counts) through `as_mask_batch`, which takes
the noise out of it. A mask that comes back is a new float32 tensor [B, 1, H, W] in [0, 1] on the device of the given one; each
picture of a batch is for itself. Distances are Euclidean, in pixels, between pixel centres. Every gray pixel is hole: an
antialiased edge lies where its outermost gray does. What lies outside of the picture is unknown: it is neither hole nor
known, so nothing grows in from the border and nothing is eroded there.
"""

import math
from typing import Literal, get_args

import numpy as np
import torch
from scipy import ndimage

from .masks import as_mask_batch, hole_of

Where = Literal["inside", "outside", "centered"]
Curve = Literal["linear", "smooth"]
Shape = Literal["as it is", "box", "convex hull"]

# Pixels that the search for the nearest row treats at once on a CPU: what is read again and again stays in its cache.
_PIXELS_IN_CACHE = 1 << 16


def distance_to_hole(mask: torch.Tensor, limit: float = math.inf) -> torch.Tensor:
    """How far each pixel is from the nearest hole pixel: 0 in the hole, inf where it is farther than `limit` pixels.

    Returns float32 [B, 1, H, W]; distances up to and including `limit` are exact. Time grows with `limit` and with the
    area of the box around the hole. Raises ValueError for a limit that is negative or NaN.
    """
    _require_not_negative("limit", limit)
    return _distance(hole_of(mask), limit)


def distance_to_known(mask: torch.Tensor, limit: float = math.inf) -> torch.Tensor:
    """How far each pixel is from the nearest known pixel: 0 outside of the hole, inf where it is farther than `limit`.

    The border of the picture does not count as known: in a picture that is all hole, every distance is inf. Otherwise as
    `distance_to_hole`.
    """
    _require_not_negative("limit", limit)
    hole = hole_of(mask)
    distance = torch.zeros(hole.shape, device=hole.device)
    # One pixel around the hole is enough: each known pixel farther away has one on that rim that is nearer.
    window = _window(hole, 1)
    distance[window] = _distance(~hole[window], limit)
    return distance


def grow(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    """The hole and everything within `pixels` of it; negative pixels shrink it.

    Growing makes each pixel the highest value among the pixels whose centres lie within `pixels` of its own (a disc, its
    edge included; any fraction is allowed), shrinking the lowest value, so that gray keeps its meaning. Pixels beyond the
    border of the picture do not count. Binary masks take a faster way to the same result.

    Returns float32 [B, 1, H, W]. Raises ValueError unless `pixels` is finite.
    """
    _require_finite("pixels", pixels)
    mask = as_mask_batch(mask)
    if pixels == 0:
        return mask
    if bool(((mask == 0) | (mask == 1)).all()):
        if pixels > 0:
            return distance_to_hole(mask, pixels).isfinite().float()
        return distance_to_known(mask, -pixels).isinf().float()
    if pixels > 0:
        grown = mask.clone()
        window = _window(mask > 0, math.isqrt(_largest_square(pixels, mask)))
        grown[window] = _disc_maximum(mask[window], pixels)
        return grown
    shrunk = mask.clone()
    window = _window(mask > 0, 1)
    shrunk[window] = -_disc_maximum(-mask[window], -pixels)
    return shrunk


def shrink(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    """What is left of the hole farther than `pixels` from everything known: `grow` by `-pixels`."""
    return grow(mask, -pixels)


def feather(mask: torch.Tensor, pixels: float, where: Where = "centered", curve: Curve = "linear") -> torch.Tensor:
    """A ramp between 1 (hole) and 0 (known) that is `pixels` wide, in true distance from the edge of the hole.

    The edge lies half a pixel from the centres of the pixels on both sides of it, so that a ramp n pixels wide along
    a straight edge has n pixels between 0 and 1 if it lies on one side of the edge. Beyond the ramp, values are exactly
    0 or 1. All of a gray mask is hole, and its own gray is replaced by the ramp.

    where: "outside" is 1 in the whole hole and falls to 0 over `pixels` outside of it. "inside" is 0 outside of the hole
        and rises to 1 over `pixels` inside of it: nothing known is touched, but a hole up to twice as wide as the ramp
        never reaches 1, and a single pixel is left with 0.5 / `pixels` (grow the hole first to keep it). "centered" is half
        the ramp on either side, with 0.5 at the edge; a hole up to as wide as the ramp does not reach 1 here either.
    curve: "linear", or "smooth", which starts and ends flat (t * t * (3 - 2 * t)).

    The border of the picture is not an edge. 0 pixels return the mask as it is, gray included. Returns float32
    [B, 1, H, W]. Raises ValueError for pixels that are negative or not finite and for an unknown `where` or `curve`.
    """
    _require_finite("pixels", pixels)
    _require_not_negative("pixels", pixels)
    _require_one_of("where", where, get_args(Where))
    _require_one_of("curve", curve, get_args(Curve))
    mask = as_mask_batch(mask)
    if pixels == 0:
        return mask
    at_edge = {"inside": 0.0, "centered": 0.5, "outside": 1.0}[where]
    outwards = distance_to_hole(mask, pixels * at_edge + 0.5) - 0.5
    inwards = distance_to_known(mask, pixels * (1.0 - at_edge) + 0.5) - 0.5
    ramp = torch.where(mask > 0, at_edge + inwards / pixels, at_edge - outwards / pixels).clamp(0.0, 1.0)
    return ramp * ramp * (3.0 - 2.0 * ramp) if curve == "smooth" else ramp


def opening(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    """Shrinks and grows again: parts of the hole into which no disc of radius `pixels` fits vanish, nothing is added.

    Returns float32 [B, 1, H, W]. Raises ValueError for pixels that are negative or not finite.
    """
    _require_not_negative("pixels", pixels)
    return grow(shrink(mask, pixels), pixels)


def closing(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    """Grows and shrinks again: gaps into which no disc of radius `pixels` fits become hole, nothing is taken away.

    Returns float32 [B, 1, H, W]. Raises ValueError for pixels that are negative or not finite.
    """
    _require_not_negative("pixels", pixels)
    return shrink(grow(mask, pixels), pixels)


def stabilise(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    """Removes specks and thin whiskers (`opening`), then bridges narrow gaps (`closing`), both by a radius of `pixels`.

    A hole that is itself thinner than the disc vanishes. Returns float32 [B, 1, H, W]. Raises ValueError for pixels
    that are negative or not finite.
    """
    return closing(opening(mask, pixels), pixels)


def fill_holes(mask: torch.Tensor, largest_area: float | None = None) -> torch.Tensor:
    """Known islands inside the hole become hole: those of up to `largest_area` pixels, or all of them for None.

    An island is a part of the known pixels, connected along their sides (4 neighbours), that does not touch the border of
    the picture. In a gray mask the rim one pixel wide of a filled island, its antialiased edge, becomes 1 with it unless it
    also borders on something that stays known; all other gray stays.

    Returns float32 [B, 1, H, W]. Raises ValueError for an area that is negative or NaN.
    """
    largest = math.inf if largest_area is None else largest_area
    _require_not_negative("largest_area", largest)
    mask = as_mask_batch(mask)
    pictures = mask.squeeze(1).cpu().numpy()
    for picture in pictures:
        known = picture == 0
        labels, areas = _parts(known, ndimage.generate_binary_structure(2, 1))
        is_island = areas <= largest
        for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
            is_island[border] = False
        is_island[0] = False
        picture[_with_rim(is_island[labels], known)] = 1.0
    return torch.from_numpy(pictures)[:, None].to(mask.device)


def remove_specks(mask: torch.Tensor, smallest_area: float) -> torch.Tensor:
    """Connected parts of the hole with fewer than `smallest_area` pixels vanish.

    Pixels of a part are connected along sides and corners (8 neighbours); a gray pixel is one like every other. What stays
    keeps its gray.

    Returns float32 [B, 1, H, W]. Raises ValueError for an area that is negative or NaN.
    """
    _require_not_negative("smallest_area", smallest_area)
    mask = as_mask_batch(mask)
    pictures = mask.squeeze(1).cpu().numpy()
    for picture in pictures:
        labels, areas = _parts(picture > 0, ndimage.generate_binary_structure(2, 2))
        is_speck = areas < smallest_area
        is_speck[0] = False
        picture[is_speck[labels]] = 0.0
    return torch.from_numpy(pictures)[:, None].to(mask.device)


def bounding_boxes(mask: torch.Tensor) -> torch.Tensor:
    """The box around the hole of each picture: int64 [B, 4] of left, top, right, bottom.

    Right and bottom are exclusive. An empty picture has the box 0, 0, 0, 0.
    """
    hole = hole_of(mask)[:, 0]
    left, right = _first_and_end(hole.any(dim=1))
    top, bottom = _first_and_end(hole.any(dim=2))
    return torch.stack((left, top, right, bottom), dim=1)


def box(mask: torch.Tensor, padding: float = 0) -> torch.Tensor:
    """The filled box around the hole, wider by `padding` pixels on each side and cut at the border.

    An empty picture stays empty. Returns float32 [B, 1, H, W] of 0 and 1. Raises ValueError for a padding that is
    negative or not finite.
    """
    _require_finite("padding", padding)
    _require_not_negative("padding", padding)
    mask = as_mask_batch(mask)
    left, top, right, bottom = (side[:, None] for side in bounding_boxes(mask).unbind(dim=1))
    columns = torch.arange(mask.shape[3], device=mask.device)
    rows = torch.arange(mask.shape[2], device=mask.device)
    across = (columns >= left - padding) & (columns <= right - 1 + padding) & (left < right)
    down = (rows >= top - padding) & (rows <= bottom - 1 + padding)
    return (down[:, :, None] & across[:, None, :])[:, None].float()


def convex_hull(mask: torch.Tensor) -> torch.Tensor:
    """The filled convex hull of the hole: all pixels whose centres lie in the hull of the centres of its pixels.

    The edge of the hull counts, in exact integers, so that each pixel of the hole is in it, the hull of one pixel is that
    pixel, and the hull of a hull is the same. Two single pixels far apart are joined only by the pixels whose centres lie
    on the line between them. Returns float32 [B, 1, H, W] of 0 and 1.
    """
    hole = hole_of(mask)[:, 0]
    first, end = _first_and_end(hole)
    left = torch.ones_like(first)
    right = torch.zeros_like(first)
    for picture in range(hole.shape[0]):
        rows = hole[picture].any(dim=1).nonzero()[:, 0].cpu().numpy()
        if rows.size == 0:
            continue
        span = slice(int(rows[0]), int(rows[-1]) + 1)
        lefts = first[picture].cpu().numpy()[rows]
        rights = end[picture].cpu().numpy()[rows] - 1
        left[picture, span] = torch.from_numpy(_lower_envelope(rows, lefts)).to(left.device)
        right[picture, span] = torch.from_numpy(-_lower_envelope(rows, -rights)).to(right.device)
    columns = torch.arange(hole.shape[2], device=hole.device)
    return ((columns >= left[:, :, None]) & (columns <= right[:, :, None]))[:, None].float()


def clean(
    mask: torch.Tensor, specks: float = 0, islands: float = 0, smooth: float = 0, shape: Shape = "as it is"
) -> torch.Tensor:
    """What a detector or a quick brush left, made usable.

    In this order: parts of the hole of fewer than `specks` pixels vanish, known islands of up to `islands` pixels become
    hole, the outline is opened and closed by `smooth` pixels, and the hole turns into its `shape`. 0 skips a step. Raises
    ValueError, in the words of the node, for numbers below 0 or not finite, and for another shape.
    """
    for name, number in (("remove_specks", specks), ("fill_islands", islands), ("smooth", smooth)):
        _require_finite(name, number)
        _require_not_negative(name, number)
    _require_one_of("shape", shape, get_args(Shape))
    cleaned = remove_specks(mask, specks)
    if islands:
        cleaned = fill_holes(cleaned, islands)
    if smooth:
        cleaned = stabilise(cleaned, smooth)
    if shape == "as it is":
        return cleaned
    return box(cleaned) if shape == "box" else convex_hull(cleaned)


def _distance(members: torch.Tensor, limit: float) -> torch.Tensor:
    """The distance to the nearest true pixel of bool [B, 1, H, W], inf beyond `limit`."""
    distance = torch.full(members.shape, math.inf, device=members.device)
    largest = _largest_square(limit, members)
    window = _window(members, math.isqrt(largest))
    squares = _squared_distance(members[window], largest)
    distance[window] = torch.where(squares <= largest, squares.float().sqrt_(), math.inf)
    return distance


def _squared_distance(members: torch.Tensor, largest: int) -> torch.Tensor:
    """Squared distance to the nearest true pixel of bool [B, 1, H, W]: exact up to `largest`, more than that beyond."""
    height, width = members.shape[-2:]
    reach = math.isqrt(largest)
    farthest_row = min(reach, height - 1)
    highest = (reach + 1) ** 2 + farthest_row**2
    dtype = next(kind for kind in (torch.int16, torch.int32, torch.int64) if highest <= torch.iinfo(kind).max)

    # Beyond the reach every distance within the row is the same to us, and small numbers make the search fast.
    within_row = _distance_within_row(members, reach).to(dtype).square_()
    if farthest_row == 0:
        return within_row
    beyond = within_row.new_full((*members.shape[:2], farthest_row, width), (reach + 1) ** 2)
    padded = torch.cat((beyond, within_row, beyond), dim=2)

    squares = within_row
    block = height if members.is_cuda else max(1, _PIXELS_IN_CACHE // (members.shape[0] * width))
    for top in range(0, height, block):
        nearest = squares[:, :, top : top + block]
        rows = nearest.shape[2]
        for offset in range(1, farthest_row + 1):
            above = padded[:, :, top + farthest_row - offset :][:, :, :rows]
            below = padded[:, :, top + farthest_row + offset :][:, :, :rows]
            torch.minimum(nearest, torch.minimum(above, below).add_(offset * offset), out=nearest)
    return squares


def _distance_within_row(members: torch.Tensor, reach: int) -> torch.Tensor:
    """int32 distance to the nearest true pixel of the same row of bool [..., W]; `reach` + 1 for anything farther."""
    width = members.shape[-1]
    column = torch.arange(width, device=members.device, dtype=torch.int32)
    nowhere = -(reach + 1)
    before = torch.where(members, column, nowhere).cummax(dim=-1).values
    after = torch.where(members.flip(-1), column, nowhere).cummax(dim=-1).values.flip(-1)
    return torch.minimum(column - before, width - 1 - column - after).clamp_(max=reach + 1)


def _disc_maximum(values: torch.Tensor, radius: float) -> torch.Tensor:
    """The highest value within `radius` of each pixel of [B, 1, H, W]."""
    height, width = values.shape[-2:]
    largest = _largest_square(radius, values)
    highest = values.clone()
    across = values.clone()
    reach = 0
    # From the disc's poles to its equator its rows only become wider, so that the maximum over a row is built on the last.
    for offset in range(min(math.isqrt(largest), height - 1), -1, -1):
        half = min(math.isqrt(largest - offset * offset), width - 1)
        for step in range(reach + 1, half + 1):
            torch.maximum(across[..., step:], values[..., :-step], out=across[..., step:])
            torch.maximum(across[..., :-step], values[..., step:], out=across[..., :-step])
        reach = half
        upper, lower = slice(0, height - offset), slice(offset, height)
        torch.maximum(highest[:, :, upper], across[:, :, lower], out=highest[:, :, upper])
        torch.maximum(highest[:, :, lower], across[:, :, upper], out=highest[:, :, lower])
    return highest


def _largest_square(limit: float, picture: torch.Tensor) -> int:
    """The largest whole number whose root is within `limit`, which no two pixels of the picture need exceed.

    Squaring the limit alone would miss the pixels at a distance of exactly the limit where it is a root such as 3 ** 0.5.
    """
    limit = min(limit, math.hypot(*picture.shape[-2:]))
    square = int(limit * limit) + 1
    while math.sqrt(square) > limit:
        square -= 1
    return square


def _window(members: torch.Tensor, margin: int) -> tuple[slice, slice, slice, slice]:
    """The part of [B, 1, H, W] that holds the true pixels of all pictures and `margin` pixels around them.

    It is never empty: any window will do where there is no true pixel, and one without pixels would be a case of its own.
    """
    height, width = members.shape[-2:]
    left, top, right, bottom = bounding_boxes(members.any(dim=0))[0].tolist()
    rows = slice(max(top - margin, 0), min(max(bottom, 1) + margin, height))
    columns = slice(max(left - margin, 0), min(max(right, 1) + margin, width))
    return slice(None), slice(None), rows, columns


def _first_and_end(members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first true element along the last axis and the one after the last; 0 and 0 where there is none."""
    there = members.any(dim=-1)
    first = members.byte().argmax(dim=-1)
    end = members.shape[-1] - members.flip(-1).byte().argmax(dim=-1)
    return first * there, end * there


def _parts(pixels: np.ndarray, neighbours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the connected parts of bool [H, W] from 1, and counts the pixels of each; 0 is everything else."""
    labels = np.zeros(pixels.shape, dtype=np.int32)
    ndimage.label(pixels, structure=neighbours, output=labels)
    return labels, np.bincount(labels.ravel())


def _with_rim(parts: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """`parts` (some of `kind`) and the pixels of the other kind that border on them alone."""
    return parts | (_neighbourhood(parts) & ~kind & ~_neighbourhood(kind & ~parts))


def _neighbourhood(pixels: np.ndarray) -> np.ndarray:
    near = np.zeros(pixels.shape, dtype=bool)
    ndimage.binary_dilation(pixels, structure=ndimage.generate_binary_structure(2, 2), output=near)
    return near


def _lower_envelope(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The largest convex function below values at ascending rows, rounded up, at each row from the first to the last."""
    corners: list[tuple[int, int]] = []
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        while len(corners) > 1:
            (row_0, value_0), (row_1, value_1) = corners[-2:]
            if (value_1 - value_0) * (row - row_0) < (value - value_0) * (row_1 - row_0):
                break
            corners.pop()
        corners.append((row, value))
    if len(corners) == 1:
        return values.copy()
    at, level = np.array(corners).T
    every = np.arange(at[0], at[-1] + 1)
    piece = np.minimum(np.searchsorted(at, every, side="right"), len(corners) - 1) - 1
    rise, run = level[piece + 1] - level[piece], at[piece + 1] - at[piece]
    return level[piece] - (-rise * (every - at[piece])) // run


def _require_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} needs to be a finite number; it is {value}.")


def _require_not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} needs to be 0 or more; it is {value}.")


def _require_one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} needs to be one of {', '.join(options)}; it is {value!r}.")
