"""How super-resolution's tiles become a picture again. No host needed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module
from truefill_testing.workplaces import FACTORS, hole_of, place_of, random_pictures, scaled

large = pack_module("imaging.super_resolution")
region = pack_module("imaging.region")
tiling = pack_module("imaging.tiling")
Box = pack_module("imaging.region_plan").Box


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
        Box(left, top, left + size[1], top + size[0]), draw(st.sampled_from(FACTORS)), side, overlap, needed
    )
    return place, draw(st.sampled_from([1, place.factor]))


def at(tile: Any, scale: int) -> tuple[slice, slice, slice]:
    rows, columns = (slice(scale * start, scale * stop) for start, stop in (tile[1::2], tile[::2]))
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
    place = place_of(Box(0, 0, 88, 80), 4, side, overlap)
    parts = [torch.full((1, side * scale, side * scale, 1), float(index % 7)) for index in range(len(place.tiles))]
    joined = place.join(parts, torch.zeros(1, 80 * scale, 88 * scale, 1))
    for direction in (1, 2):
        assert joined.diff(dim=direction).abs().max() <= 6 * 1.11 / (overlap * scale)
    assert joined.max() > 4 and joined.min() < 1


@pytest.mark.parametrize("scale", [1, 4])
def test_two_tiles_are_joined_symmetrically(scale: int) -> None:
    place = place_of(Box(0, 0, 28, 16), 4, 16, 4)
    assert place.tiles == (Box(0, 0, 16, 16), Box(12, 0, 28, 16))
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
    place = place_of(Box(0, 0, 28, 16), 4, 16, 4)
    for count in (0, 1, 3):
        with pytest.raises(ValueError):
            place.join([torch.zeros(1, 16, 16, 1)] * count, torch.zeros(1, 16, 28, 1))


def test_a_tile_finds_its_pixels() -> None:
    place = place_of(Box(6, 5, 34, 21), 8, 16, 4)
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
