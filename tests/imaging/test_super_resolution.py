"""Where super-resolution works and on what: holes, boxes, tiles and resampling against literal ones. No host needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from truefill_testing.host import pack_module

large = pack_module("imaging.super_resolution")
region = pack_module("imaging.region")
tiling = pack_module("imaging.tiling")
Box = pack_module("imaging.region_plan").Box

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
FACTORS = [1, 4, 8]
KINDS = ["full", "pixel", "first", "last", "border", "sparse", "block"]


def random_pictures(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def hole_of(kind: str, height: int, width: int, seed: int = 0) -> torch.Tensor:
    hole = torch.zeros(height, width)
    noise = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    row, column = divmod(int(noise.argmax()), width)
    if kind == "full":
        hole[:] = 1.0
    elif kind == "pixel":
        hole[row, column] = 1.0
    elif kind == "first":
        hole[0, 0] = 1.0
    elif kind == "last":
        hole[-1, -1] = 1.0
    elif kind == "border":
        hole[:, 0] = hole[-1] = 1.0
    elif kind == "sparse":
        hole[noise > 0.999] = 1.0
    elif kind == "block":
        hole[row : row + 90, column : column + 130] = 1.0
    return hole


@st.composite
def holes(draw: st.DrawFn, longest: int = 300) -> torch.Tensor:
    """Every size, from one pixel on, and every kind of hole."""
    sides = st.one_of(st.sampled_from([1, 2, 7, 64, 131, longest]), st.integers(1, longest))
    hole = hole_of(draw(st.sampled_from(KINDS)), draw(sides), draw(sides), draw(st.integers(0, 2**31)))
    return hole


def literal_cells(hole: torch.Tensor, factor: int) -> np.ndarray:
    """The share of hole in each cell; pixels that the last cells lack are those of the picture's edge."""
    missing = [(0, -side % factor) for side in hole.shape]
    pixels = np.pad(hole.double().numpy(), missing, mode="edge")
    height, width = (side // factor for side in pixels.shape)
    return pixels.reshape(height, factor, width, factor).mean((1, 3))


def literal_softened(cells: np.ndarray, factor: int) -> np.ndarray:
    """A Gaussian of 12.8 pixels, cut off at 36 pixels, with the edge repeated."""
    reach = 36 // factor
    line = np.array([math.exp(-((distance * factor) ** 2) / (2 * 12.8**2)) for distance in range(-reach, reach + 1)])
    line /= line.sum()
    for axis in (0, 1):
        cells = ndimage.correlate1d(cells, line, axis=axis, mode="nearest")
    return cells


def shown(start: int, stop: int, side: int) -> list[int]:
    """Which of `side` pixels is seen at each position: mirrored at the first and the last, or those repeated."""
    repeated = -start >= side or stop - side >= side
    line = []
    for position in range(start, stop):
        if repeated:
            position = min(max(position, 0), side - 1)
        while not 0 <= position < side:
            position = -position if position < 0 else 2 * (side - 1) - position
        line.append(position)
    return line


def literal_part(picture: np.ndarray, box: Any) -> np.ndarray:
    rows, columns = shown(box.top, box.bottom, picture.shape[0]), shown(box.left, box.right, picture.shape[1])
    return picture[rows][:, columns]


def scaled(box: Any, factor: int) -> Any:
    return Box(*(line * factor for line in box))


def place_of(
    box: Any, factor: int = 1, side: int = 1 << 20, overlap: int = 0, needed: torch.Tensor | None = None
) -> Any:
    """A workplace on any box, with tiles all over it or where they are needed."""
    if needed is None:
        needed = torch.ones(box.height, box.width, dtype=torch.bool)
    return large.Workplace(
        box, tuple(tiling.tile_boxes(needed, side, overlap)), needed[None, None].float(), overlap, factor
    )


def whole(picture_size: tuple[int, int], factor: int) -> Any:
    """A workplace on all cells of a picture."""
    return place_of(Box(0, 0, *(math.ceil(side / factor) for side in picture_size)), factor)


# Where the work is done.


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (64, 64), (333, 97)])
def test_without_a_hole_there_is_no_place_to_work(size: tuple[int, int], factor: int) -> None:
    assert large.find_workplace(torch.zeros(size), factor, 512, 128) is None
    assert large.find_workplace(torch.zeros(size), factor, 0, 0) is None


def check_workplace(hole: torch.Tensor, factor: int, tile: int, overlap: int) -> Any:
    """Everything that is promised about the box, its hole and its tiles."""
    place = large.find_workplace(hole, factor, tile, overlap)
    soft = literal_softened(literal_cells(hole, factor), factor)
    grid, box = soft.shape, place.box
    side = max(8, (tile or 512) // factor // 8 * 8)
    for axis, limit in enumerate(grid):
        start, stop = box[axis], box[axis + 2]
        lines = np.flatnonzero(soft.any(1 - axis))
        context = math.ceil(64 / factor)
        first, last = max(0, lines[0] - context), min(limit, lines[-1] + 1 + context)
        # No less than the context and a tile, and no more than the next multiple of 8 cells.
        wanted = max(last - first, min(side, limit))
        assert stop - start == math.ceil(wanted / 8) * 8
        assert start <= first and stop >= last
        if stop - start <= limit:
            assert 0 <= start and stop <= limit
        else:
            assert start <= 0 and stop >= limit and abs(-start - (stop - limit)) <= 1
    assert place.size == (box.height, box.width) and place.factor == factor
    assert place.pixel_size == (box.height * factor, box.width * factor)
    assert place.hole.shape == (1, 1, *place.size) and place.hole.dtype == torch.float32
    assert 0.0 <= place.hole.min() and place.hole.max() <= 1.0
    literal = literal_part(soft, box)
    assert np.abs(place.hole[0, 0].numpy() - literal).max() < 2e-5
    assert np.array_equal(place.hole[0, 0].numpy() > 0, literal > 0)

    if not tile:
        assert place.tiles == (Box(0, 0, *place.size),)
        return place
    assert place.overlap == min(overlap // factor, side - 1)
    covered = torch.zeros(place.size, dtype=torch.bool)
    for part in place.tiles:
        assert 0 <= part.top and part.bottom <= box.height and 0 <= part.left and part.right <= box.width
        assert (part.height, part.width) == (min(side, box.height), min(side, box.width))
        inside = slice(part.top, part.bottom), slice(part.left, part.right)
        assert place.hole[0, 0][inside].any()
        covered[inside] = True
    assert covered[place.hole[0, 0] > 0].all()
    # No tile that the literal layout hasn't got, which test_tiling.py checks.
    assert place.tiles == tuple(tiling.tile_boxes(place.hole[0, 0] > 0, side, place.overlap))
    return place


@settings(max_examples=50, deadline=None)
@given(holes(), st.sampled_from(FACTORS), st.sampled_from([0, 1, 64, 100, 200, 512]), st.sampled_from([0, 8, 30, 128]))
@example(torch.ones(1, 1), 1, 512, 128)
@example(torch.ones(1, 1), 8, 0, 0)
@example(torch.ones(1, 300), 4, 64, 32)
def test_the_box_the_hole_and_the_tiles_are_as_promised(
    hole: torch.Tensor, factor: int, tile: int, overlap: int
) -> None:
    assume(hole.any())
    check_workplace(hole, factor, tile, overlap)


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8192, 100), (97, 4099), (1025, 1031)])
def test_so_they_are_in_large_pictures(size: tuple[int, int], kind: str, factor: int) -> None:
    check_workplace(hole_of(kind, *size), factor, 256, 64)


@pytest.mark.parametrize("kind", ["full", "block"])
@pytest.mark.parametrize("size", [(2047, 100), (700, 707)])
def test_so_they_are_where_a_cell_is_a_pixel(size: tuple[int, int], kind: str) -> None:
    check_workplace(hole_of(kind, *size), 1, 512, 128)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_small_hole_in_a_large_picture_gives_a_box_of_one_tile_around_it(factor: int) -> None:
    hole = torch.zeros(1600, 1200)
    hole[800:840, 600:640] = 1.0
    place = large.find_workplace(hole, factor, 512, 128)
    box = scaled(place.box, factor)
    assert (box.height, box.width) == (512, 512) and len(place.tiles) == 1
    assert abs(box.top + box.bottom - 1640) <= 2 * factor and abs(box.left + box.right - 1240) <= 2 * factor
    # Without tiles it is no smaller.
    assert large.find_workplace(hole, factor, 0, 128).box == place.box
    # A smaller tile leaves the hole with the softening and the context: 40 + 2 (36 + 64) pixels, in whole 8 cells.
    small = large.find_workplace(hole, factor, 128, 32)
    assert 240 - 4 * factor <= small.pixel_size[0] <= 240 + 8 * factor and len(small.tiles) > 1


@pytest.mark.parametrize("factor", FACTORS)
def test_a_hole_at_the_corner_keeps_the_box_in_the_picture(factor: int) -> None:
    hole = torch.zeros(1600, 1200)
    hole[-1, -1] = 1.0
    assert scaled(large.find_workplace(hole, factor, 512, 128).box, factor) == Box(1088, 688, 1600, 1200)


def test_a_tile_is_rounded_down_to_whole_multiples_of_8_cells_and_never_less_than_8() -> None:
    hole = torch.ones(400, 400)
    for tile, side in ((64, 16), (95, 16), (96, 24), (32, 8), (31, 8), (1, 8)):
        place = large.find_workplace(hole, 4, tile, 16)
        assert {(part.height, part.width) for part in place.tiles} == {(side, side)}
        assert place.overlap == 4
    # A tile that was rounded can't share more than it has.
    assert large.find_workplace(torch.ones(40, 40), 4, 60, 56).overlap == 7


def test_only_tiles_at_the_hole_are_laid() -> None:
    hole = torch.zeros(2048, 2048)
    hole[0, 0] = hole[-1, -1] = 1.0
    place = large.find_workplace(hole, 8, 256, 64)
    assert place.box == Box(0, 0, 256, 256)
    assert place.tiles == (Box(0, 0, 32, 32), Box(224, 224, 256, 256))


# The hole.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", FACTORS)
def test_deep_in_a_hole_it_is_exactly_1_and_out_of_reach_exactly_0(factor: int, device: str) -> None:
    hole = torch.zeros(403, 517)
    hole[120:290, 150:400] = 1.0
    hole[:, 501:] = 1.0
    place = large.find_workplace(hole.to(device), factor, 0, 0)
    cells = literal_cells(hole, factor)
    window = 2 * (36 // factor) + 1
    least = literal_part(ndimage.minimum_filter(cells, window, mode="nearest"), place.box)
    most = literal_part(ndimage.maximum_filter(cells, window, mode="nearest"), place.box)
    values = place.hole[0, 0].cpu().numpy()
    assert (least == 1).any() and (most == 0).any()
    assert (values[least == 1] == 1.0).all() and (values[most == 0] == 0.0).all() and (values[most > 0] > 0.0).all()
    # All that isn't within reach of both is between; what lacks no more than 0.001 % may count as whole.
    assert (values[(most > 0) & (literal_softened_in(cells, factor, place) < 1 - 2e-5)] < 1.0).all()


def literal_softened_in(cells: np.ndarray, factor: int, place: Any) -> np.ndarray:
    return literal_part(literal_softened(cells, factor), place.box)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (131, 97), (512, 512)])
def test_a_picture_that_is_all_hole_is_1_throughout(size: tuple[int, int], factor: int, device: str) -> None:
    place = large.find_workplace(torch.ones(size, device=device), factor, 512, 128)
    assert (place.hole == 1.0).all() and (place.pixel_hole() == 1.0).all()


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("edge", [240, 243, 245])
def test_across_a_straight_edge_it_falls_and_never_rises(factor: int, edge: int) -> None:
    hole = torch.zeros(512, 512)
    hole[:, :edge] = 1.0
    for turned in (hole, hole.T):
        place = large.find_workplace(turned, factor, 0, 0)
        soft = place.hole[0, 0] if turned is hole else place.hole[0, 0].T
        assert (soft == soft[:1]).all()
        left, steps = place.box.left if turned is hole else place.box.top, soft[0].diff()
        assert (steps <= 0).all()
        reach = 36 // factor
        first, last = edge // factor - reach - left, math.ceil(edge / factor) + reach - left
        assert (soft[0, :first] == 1.0).all() and (soft[0, last:] == 0.0).all()
        assert (steps[first : last - 1] < 0).all()


def test_the_authors_softening_is_a_gaussian_of_19_cells_that_opencv_gives_a_deviation_of_3_2() -> None:
    hole = torch.zeros(400, 400)
    hole[200:204, 200:204] = 1.0
    place = large.find_workplace(hole, 4, 0, 0)
    line = place.hole[0, 0, 50 - place.box.top]
    line = line / line.sum()
    (where,) = line.nonzero(as_tuple=True)
    assert len(where) == 19 and where[9] == 50 - place.box.left
    for index, value in zip(where.tolist(), line[where].tolist(), strict=True):
        assert value / line.max() == pytest.approx(math.exp(-0.5 * ((index - where[9].item()) / 3.2) ** 2), rel=1e-4)


def test_beyond_the_border_the_hole_goes_on() -> None:
    hole = torch.zeros(40, 400)
    hole[:20] = 1.0
    soft = large.find_workplace(hole, 4, 0, 0).hole[0, 0]
    assert (soft[:3] == soft[3:4]).logical_not().any()  # mirrored
    place = large.find_workplace(hole, 4, 0, 0)
    assert place.box.top == -3
    # The first row of the picture is as far from the edge as any row within a picture would be.
    deep = torch.zeros(400, 400)
    deep[:200] = 1.0
    inner = large.find_workplace(deep, 4, 0, 0)
    assert torch.allclose(soft[3], inner.hole[0, 0, 45 - inner.box.top, :1], atol=1e-6)


def test_a_cell_counts_by_its_share_of_hole_and_the_last_by_that_of_what_there_is_of_it() -> None:
    hole = torch.zeros(200, 202)
    hole[:, 101:] = 1.0
    soft = large.find_workplace(hole, 4, 0, 0)
    line = literal_softened(np.array([[0.0] * 25 + [0.75] + [1.0] * 25]), 4)
    box = soft.box
    assert np.abs(soft.hole[0, 0, 10].numpy() - literal_part(line, Box(0, box.left, 1, box.right))[0]).max() < 2e-5
    # Two of four pixels are in the picture, and both are hole.
    last = torch.zeros(200, 202)
    last[:, 200:] = 1.0
    whole_cell = torch.zeros(200, 204)
    whole_cell[:, 200:] = 1.0
    one, other = large.find_workplace(last, 4, 0, 0), large.find_workplace(whole_cell, 4, 0, 0)
    assert one.box == other.box and torch.equal(one.hole, other.hole)


@pytest.mark.parametrize("factor", FACTORS)
def test_on_pixels_the_hole_is_smooth_and_in_its_place(factor: int) -> None:
    hole = torch.zeros(403, 517)
    hole[120:290, 150:350] = 1.0
    place = large.find_workplace(hole, factor, 0, 0)
    pixels = place.pixel_hole()
    assert pixels.shape == (1, *place.pixel_size, 1)
    if factor == 1:
        assert torch.equal(pixels[..., 0], place.hole[0])
    near = literal_part(hole.double().numpy(), scaled(place.box, factor))
    inside = ndimage.minimum_filter(near, 2 * (36 + 2 * factor) + 1, mode="nearest") == 1
    outside = ndimage.maximum_filter(near, 2 * (36 + 2 * factor) + 1, mode="nearest") == 0
    values = pixels[0, ..., 0].numpy()
    assert inside.any() and outside.any()
    assert (values[inside] == 1.0).all() and (values[outside] == 0.0).all()
    # A Gaussian crosses a half at the edge: rows 120 and 290, columns 150 and 350 of the picture.
    middle = values[205 - place.box.top * factor] > 0.5
    columns = np.flatnonzero(middle) + place.box.left * factor
    assert abs(columns[0] - 150) <= 1 and abs(columns[-1] + 1 - 350) <= 1
    rows = np.flatnonzero(values[:, 250 - place.box.left * factor] > 0.5) + place.box.top * factor
    assert abs(rows[0] - 120) <= 1 and abs(rows[-1] + 1 - 290) <= 1
    assert np.abs(np.diff(values, axis=1)).max() < 0.05


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.one_of(st.floats(0, 6), st.integers(0, 40).map(math.sqrt)),
    st.sampled_from([0.05, 0.3, 0.97]),
    st.integers(0, 2**31),
)
def test_widening_adds_a_disc_around_every_pixel_above_0(
    height: int, width: int, pixels: float, density: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, height, width, generator=generator)
    mask[torch.rand(2, height, width, generator=generator) > density] = 0.0
    before = mask.clone()
    result = large.widened(mask, pixels)
    assert result.shape == mask.shape and result.dtype == torch.float32 and torch.equal(mask, before)
    for own, wide in zip(mask, result, strict=True):
        points = own.nonzero().tolist()
        for row, column in np.ndindex(height, width):
            near = any(math.sqrt((row - y) ** 2 + (column - x) ** 2) <= pixels for y, x in points)
            assert wide[row, column] == float(near)


def test_the_faintest_grey_is_hole() -> None:
    mask = torch.zeros(1, 41, 41)
    mask[0, 20, 20] = 1e-6
    assert large.widened(mask, 0).sum() == 1.0
    assert large.widened(mask, 19).sum() == 1129  # the circle problem


# Cutting.


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Any, tuple[int, int], int]:
    """A box in cells, the size of a picture that it shows some of, and the factor."""
    factor = draw(st.sampled_from([1, 2, 4, 8]))
    size = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    lines = []
    for side in size:
        cells = math.ceil(side / factor)
        start = draw(st.integers(-cells - 2, cells - 1))
        lines.append((start, draw(st.integers(max(start, 0) + 1, 2 * cells + 2))))
    return Box(lines[0][0], lines[1][0], lines[0][1], lines[1][1]), size, factor


@settings(max_examples=150, deadline=None)
@given(cuts(), st.integers(1, 3), st.sampled_from([3, 4]))
def test_a_cut_is_the_pictures_mirrored_beyond_their_border(job: Any, count: int, channels: int) -> None:
    box, size, factor = job
    pictures = random_pictures(count, *size, channels)
    result = place_of(box, factor).cut(pictures)
    assert result.shape == (count, box.height * factor, box.width * factor, channels)
    for picture, part in zip(pictures.numpy(), result.numpy(), strict=True):
        assert np.array_equal(part, literal_part(picture, scaled(box, factor)))


@pytest.mark.parametrize(("size", "box"), [((40, 48), Box(-3, -2, 13, 14)), ((35, 45), Box(0, -8, 10, 16))])
def test_a_cut_mirrors_as_torch_does(size: tuple[int, int], box: Any) -> None:
    pictures = random_pictures(2, *size)
    pixels = scaled(box, 4)
    out = (max(0, -pixels.left), max(0, pixels.right - size[1]), max(0, -pixels.top), max(0, pixels.bottom - size[0]))
    padded = F.pad(pictures.movedim(-1, 1), out, mode="reflect").movedim(1, -1)
    assert torch.equal(place_of(box, 4).cut(pictures), padded)


def test_a_cut_repeats_the_edge_of_a_picture_that_is_too_small_to_be_mirrored_so_far() -> None:
    pictures = random_pictures(1, 3, 60)
    result = place_of(Box(-3, 0, 5, 15), 4).cut(pictures)
    assert torch.equal(result[:, 12:15], pictures)
    assert (result[:, :12] == pictures[:, :1]).all() and (result[:, 15:] == pictures[:, -1:]).all()


# Pictures of another size.


@settings(max_examples=100, deadline=None)
@given(cuts(), st.integers(1, 3))
def test_of_a_picture_with_one_pixel_a_cell_the_cells_are_a_plain_cut(job: Any, count: int) -> None:
    box, size, factor = job
    low = random_pictures(count, *size)
    result = place_of(box, factor).cells_of(low, (size[0] * factor, size[1] * factor))
    for picture, part in zip(low.numpy(), result.numpy(), strict=True):
        assert np.array_equal(part, literal_part(picture, box))


@settings(max_examples=60, deadline=None)
@given(cuts(), st.integers(1, 3))
def test_of_a_picture_of_the_same_size_the_pixels_are_a_plain_cut(job: Any, count: int) -> None:
    box, size, factor = job
    place, pictures = place_of(box, factor), random_pictures(count, *size)
    assert torch.equal(place.pixels_of(pictures, size), place.cut(pictures))


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("low", [(10, 12), (33, 70), (80, 96), (160, 17)])
def test_otherwise_they_are_a_cut_of_the_resized_picture(low: tuple[int, int], factor: int) -> None:
    pictures, box = random_pictures(2, *low), Box(-3, 1, 13, 9)

    def resized(size: tuple[int, int]) -> np.ndarray:
        planes = F.interpolate(pictures.movedim(-1, 1), size=size, mode="bicubic", antialias=True)
        return planes.clamp(0, 1).movedim(1, -1).numpy()

    place, size = place_of(box, factor), (10 * factor, 12 * factor)
    for result, picture in zip(place.cells_of(pictures, size).numpy(), resized((10, 12)), strict=True):
        assert np.abs(result - literal_part(picture, box)).max() < 1e-5
    for result, picture in zip(place.pixels_of(pictures, size).numpy(), resized(size), strict=True):
        assert np.abs(result - literal_part(picture, scaled(box, factor))).max() < 1e-5


def ramp(low: tuple[int, int], axis: int) -> torch.Tensor:
    """A picture [1, h, w, 1] that shows in each pixel how far along an axis it lies, from 0 to 1."""
    line = (torch.arange(low[axis], dtype=torch.float64) + 0.5) / low[axis]
    return (line[:, None] if axis == 0 else line).expand(low).float()[None, ..., None]


def drift(part: torch.Tensor, start: int, picture_side: float, low_side: int, axis: int) -> torch.Tensor:
    """How far what each line of `part` of a ramp shows lies from where it should, in lines.

    For lines two pixels of the low picture, and two of its own, away from the border, where no filter is cut off.
    """
    seen = part[0, ..., 0].movedim(axis, 0)
    assert (seen == seen[:, :1]).all() or (seen - seen[:, :1]).abs().max() < 1e-5
    centres = torch.arange(start, start + len(seen)) + 0.5
    margin = 2.0 * max(1.0, picture_side / low_side) + 0.5
    inner = (centres > margin) & (centres < picture_side - margin)
    return seen[inner, 0].double() * picture_side - centres[inner]


SIZES = [(512, 512), (513, 640), (515, 519), (1021, 135), (1023, 1031), (333, 2050)]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("size", SIZES)
def test_nothing_moves_whatever_the_sizes(size: tuple[int, int], factor: int) -> None:
    grid = tuple(math.ceil(side / factor) for side in size)
    # Of another aspect than the large one, as small as thumbnails, rounded up and down, the same, and larger.
    for low in ((61, 63), (97, 45), grid, (grid[0] - 2, grid[1] + 1), size, (size[0] + 7, 300)):
        for axis in (0, 1):
            picture, line = ramp(low, axis), size[axis]
            # A box in the middle, and the whole grid.
            for box in (Box(0, 0, *grid), Box(*(side // 3 for side in grid), *(side // 3 + 16 for side in grid))):
                place = place_of(box, factor)
                cells = drift(place.cells_of(picture, size), box[axis], line / factor, low[axis], axis)
                assert not len(cells) or cells.abs().max() < 0.05
                if factor == 4 and low != size:
                    pixels = drift(place.pixels_of(picture, size), box[axis] * factor, line, low[axis], axis)
                    assert not len(pixels) or pixels.abs().max() < 0.05 * factor


@pytest.mark.parametrize(
    ("size", "low", "factor"),
    [
        ((2050, 2048), (512, 512), 4),
        ((515, 519), (128, 200), 4),
        ((515, 519), (90, 129), 4),
        ((1023, 1031), (127, 128), 8),
    ],
)
def test_nothing_moves_where_the_small_picture_has_just_as_many_pixels_as_there_are_whole_cells(
    size: tuple[int, int], low: tuple[int, int], factor: int
) -> None:
    # Not a pixel a cell: the last cell, which the large picture fills in part, belongs to the small picture too.
    place = whole(size, factor)
    for axis in (0, 1):
        cells = drift(place.cells_of(ramp(low, axis), size), 0, size[axis] / factor, low[axis], axis)
        assert len(cells) and cells.abs().max() < 0.05


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("rest", [1, 2, 3])
def test_a_last_cell_that_the_picture_fills_only_in_part_shows_what_lies_there(factor: int, rest: int) -> None:
    size = (40 * factor, 40 * factor + rest * factor // 4)
    for width in (41, 80, size[1]):
        seen = whole(size, factor).cells_of(ramp((40, width), 1), size)[0, 20, :, 0] * size[1] / factor
        # A mirrored one would show the last but one: two cells further in.
        assert (seen - torch.arange(41) - 0.5).abs().max() < 1.1


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (7, 7), (1, 700)])
def test_a_picture_narrower_than_a_cell_can_be_shown_as_well(size: tuple[int, int], factor: int) -> None:
    place = large.find_workplace(torch.ones(size), factor, 512, 128)
    for low in ((1, 1), (5, 6), (64, 64)):
        grey = torch.full((1, *low, 3), 0.25)
        cells, pixels = place.cells_of(grey, size), place.pixels_of(grey, size)
        assert cells.shape == (1, *place.size, 3) and pixels.shape == (1, *place.pixel_size, 3)
        assert (cells - 0.25).abs().max() < 1e-6 and (pixels - 0.25).abs().max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    cuts(),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.integers(1, 3),
    st.sampled_from([3, 4]),
    st.integers(0, 2**31),
)
def test_values_stay_in_range_and_pictures_by_themselves(
    job: Any, low: tuple[int, int], count: int, channels: int, seed: int
) -> None:
    box, size, factor = job
    assume(min(size) >= factor)
    place = place_of(box, factor)
    pictures = random_pictures(count, *low, channels, seed).round()  # black and white: bicubic overshoots
    before = pictures.clone()
    for show, shape in ((place.cells_of, place.size), (place.pixels_of, place.pixel_size)):
        result = show(pictures, size)
        assert result.shape == (count, *shape, channels)
        assert 0.0 <= result.min() and result.max() <= 1.0
        for index, picture in enumerate(pictures):
            assert torch.allclose(result[index], show(picture[None], size)[0], atol=1e-6)
    assert torch.equal(pictures, before)


def test_black_and_white_would_overshoot() -> None:
    picture = torch.zeros(1, 8, 8, 3)
    picture[:, 2:6, 2:6] = 1.0
    planes = F.interpolate(picture.movedim(-1, 1), size=(64, 64), mode="bicubic", antialias=True)
    assert planes.max() > 1.01 and planes.min() < -0.01
    shown_pixels = whole((64, 64), 8).pixels_of(picture, (64, 64))
    assert shown_pixels.max() == 1.0 and shown_pixels.min() == 0.0
    assert (shown_pixels - planes.movedim(1, -1)).abs().max() < 0.2


def test_half_precision_is_resized_too() -> None:
    low = random_pictures(1, 10, 12)
    place = whole((80, 96), 4)
    assert (place.cells_of(low.half(), (80, 96)) - place.cells_of(low, (80, 96))).abs().max() < 2e-3


def test_cells_and_pixels_show_the_same_place() -> None:
    size = (403, 517)
    place = whole(size, 4)
    rows, columns = torch.meshgrid(torch.linspace(0, 9, 64), torch.linspace(0, 7, 90), indexing="ij")
    low = (0.5 + 0.4 * torch.sin(rows) * torch.cos(columns))[None, ..., None]
    cells, pixels = place.cells_of(low, size), place.pixels_of(low, size)
    averaged = F.avg_pool2d(pixels.movedim(-1, 1), 4).movedim(1, -1)
    assert (averaged - cells)[0, :98, :126].abs().max() < 0.01


# Joining.


@st.composite
def joins(draw: st.DrawFn) -> Any:
    """A workplace with tiles over some of it, and the scale of what is joined: 1 for cells, the factor for pixels."""
    size = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    side = draw(st.integers(1, 16))
    overlap = draw(st.integers(0, side - 1))
    noise = torch.rand(*size, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    needed = noise < draw(st.sampled_from([0.005, 0.1, 1.1]))
    top, left = draw(st.integers(-9, 99)), draw(st.integers(-9, 99))
    place = place_of(
        Box(top, left, top + size[0], left + size[1]), draw(st.sampled_from(FACTORS)), side, overlap, needed
    )
    return place, draw(st.sampled_from([1, place.factor]))


def at(tile: Any, scale: int) -> tuple[slice, slice, slice]:
    rows, columns = (slice(scale * start, scale * stop) for start, stop in (tile[::2], tile[1::2]))
    return slice(None), rows, columns


@settings(max_examples=150, deadline=None)
@given(joins(), st.integers(1, 3), st.sampled_from([1, 3, 4]))
def test_joined_the_parts_of_a_picture_are_that_picture(job: Any, count: int, channels: int) -> None:
    place, scale = job
    size = (place.box.height * scale, place.box.width * scale)
    picture, otherwise = random_pictures(count, *size, channels), random_pictures(count, *size, channels, seed=1)
    before = otherwise.clone()
    parts = [picture[at(tile, scale)] for tile in place.tiles]
    joined = place.join(parts, otherwise)
    covered = torch.zeros(size, dtype=torch.bool)
    for tile in place.tiles:
        covered[at(tile, scale)[1:]] = True
    assert joined.shape == otherwise.shape and torch.equal(otherwise, before)
    assert torch.equal(joined[:, ~covered], otherwise[:, ~covered])
    assert torch.allclose(joined[:, covered], picture[:, covered], rtol=1e-5, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(joins())
def test_tiles_are_mixed_by_their_weights(job: Any) -> None:
    place, scale = job
    size = (place.box.height * scale, place.box.width * scale)
    total, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    parts = []
    for index, tile in enumerate(place.tiles):
        part = random_pictures(1, tile.height * scale, tile.width * scale, 1, seed=index)
        weight = tiling.tile_weight(scaled(tile, scale), size, place.overlap * scale).double()
        total[at(tile, scale)[1:]] += weight * part[0, ..., 0]
        count[at(tile, scale)[1:]] += weight
        parts.append(part)
    joined = place.join(parts, torch.zeros(1, *size, 1))[0, ..., 0].double()
    literal = torch.where(count > 0, total / count, 0.0)
    assert torch.allclose(joined, literal, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize(("side", "overlap"), [(32, 8), (32, 16), (16, 2), (24, 12)])
def test_tiles_that_differ_are_joined_in_steps_too_small_for_a_seam(side: int, overlap: int, scale: int) -> None:
    place = place_of(Box(0, 0, 80, 88), 4, side, overlap)
    parts = [torch.full((1, side * scale, side * scale, 1), float(index % 7)) for index in range(len(place.tiles))]
    joined = place.join(parts, torch.zeros(1, 80 * scale, 88 * scale, 1))
    for direction in (1, 2):
        assert joined.diff(dim=direction).abs().max() <= 6 * 1.11 / (overlap * scale)
    assert joined.max() > 4 and joined.min() < 1


@pytest.mark.parametrize("scale", [1, 4])
def test_two_tiles_are_joined_symmetrically(scale: int) -> None:
    place = place_of(Box(0, 0, 16, 28), 4, 16, 4)
    assert place.tiles == (Box(0, 0, 16, 16), Box(0, 12, 16, 28))
    joined = place.join(
        [torch.full((1, 16 * scale, 16 * scale, 1), value) for value in (0.0, 1.0)],
        torch.zeros(1, 16 * scale, 28 * scale, 1),
    )[0, ..., 0]
    across = (torch.arange(4 * scale) + 0.5) / (4 * scale)
    line = torch.cat((torch.zeros(12 * scale), across, torch.ones(12 * scale)))
    assert torch.allclose(joined, line.expand(16 * scale, -1), atol=1e-6)


@pytest.mark.parametrize("overlap", [128, 512, 1024])
def test_the_corner_of_a_tile_by_itself_is_as_it_came_however_little_it_weighs(overlap: int) -> None:
    side, size = overlap + 8, overlap + 20
    tile = Box(6, 6, 6 + side, 6 + side)
    place = large.Workplace(Box(0, 0, size, size), (tile,), torch.ones(1, 1, size, size), overlap, 1)
    joined = place.join([torch.full((1, side, side, 1), 0.5)], torch.zeros(1, size, size, 1))
    assert (joined[at(tile, 1)] - 0.5).abs().max() < 1e-5


def test_otherwise_shows_bit_for_bit_even_where_it_is_no_number() -> None:
    needed = torch.zeros(20, 20, dtype=torch.bool)
    needed[2, 3] = True
    place = place_of(Box(0, 0, 20, 20), 4, 8, 2, needed)
    otherwise = torch.full((1, 20, 20, 1), math.nan)
    joined = place.join([torch.ones(1, 8, 8, 1)], otherwise)
    assert torch.allclose(joined[:, :8, :8], torch.ones(8, 8, 1)) and joined.isnan().sum() == 400 - 64


def test_every_tile_needs_its_part() -> None:
    place = place_of(Box(0, 0, 16, 28), 4, 16, 4)
    for count in (0, 1, 3):
        with pytest.raises(ValueError):
            place.join([torch.zeros(1, 16, 16, 1)] * count, torch.zeros(1, 16, 28, 1))


def test_a_tile_finds_its_pixels() -> None:
    place = place_of(Box(5, 6, 21, 34), 8, 16, 4)
    assert place.pixels(place.tiles[1]) == (slice(0, 128), slice(96, 224))
    pictures = random_pictures(1, 300, 300)
    box = place.cut(pictures)
    parts = [box[:, rows, columns] for rows, columns in map(place.pixels, place.tiles)]
    assert torch.equal(parts[1], pictures[:, 40:168, 144:272])
    assert torch.allclose(place.join(parts, torch.zeros_like(box)), box, atol=1e-6)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("size", "kind"), [((403, 517), "block"), ((99, 131), "full"), ((7, 200), "last")])
def test_what_is_made_of_a_cut_comes_back_to_its_place(size: tuple[int, int], kind: str, factor: int) -> None:
    hole = hole_of(kind, *size)
    place = large.find_workplace(hole, factor, 256, 64)
    old, new = random_pictures(1, *size), random_pictures(1, *size, seed=1)
    stitched = region.stitch(region.Region(old, hole[None], place.pixel_plan(size)), place.cut(new))
    assert torch.equal(stitched, torch.where(hole[None, ..., None] > 0, new, old))
