"""Where super-resolution works, and how soft its hole is: against literal ones, and by property. No host needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from devtools.pack import pack_module
from truefill_testing.workplaces import (
    DEVICES,
    FACTORS,
    KINDS,
    hole_of,
    holes,
    literal_cells,
    literal_part,
    literal_softened,
    scaled,
)

large = pack_module("imaging.super_resolution")
tiling = pack_module("imaging.tiling")
Box = pack_module("imaging.region_plan").Box


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
        start, stop = box[1 - axis], box[3 - axis]
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
        assert place.tiles == (Box(0, 0, place.size[1], place.size[0]),)
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
    assert scaled(large.find_workplace(hole, factor, 512, 128).box, factor) == Box(688, 1088, 1200, 1600)


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
    assert np.abs(soft.hole[0, 0, 10].numpy() - literal_part(line, Box(box.left, 0, box.right, 1))[0]).max() < 2e-5
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
    mask = 0.02 + 0.98 * torch.rand(2, height, width, generator=generator)
    mask[torch.rand(2, height, width, generator=generator) > density] = 0.0
    before = mask.clone()
    result = large.widened(mask, pixels)
    assert result.shape == mask.shape and result.dtype == torch.float32 and torch.equal(mask, before)
    for own, wide in zip(mask, result, strict=True):
        points = own.nonzero().tolist()
        for row, column in np.ndindex(height, width):
            near = any(math.sqrt((row - y) ** 2 + (column - x) ** 2) <= pixels for y, x in points)
            assert wide[row, column] == float(near)


def test_all_grey_above_the_noise_is_hole() -> None:
    mask = torch.full((1, 41, 41), 2 / 255)
    mask[0, 20, 20] = 3 / 255
    assert large.widened(mask, 0).sum() == 1.0
    assert large.widened(mask, 19).sum() == 1129  # the circle problem
