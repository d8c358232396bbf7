"""What super-resolution cuts out of pictures of any size, at pixels and at cells. No host needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module
from truefill_testing.workplaces import FACTORS, literal_part, place_of, random_pictures, scaled, whole

large = pack_module("imaging.super_resolution")
Box = pack_module("imaging.region_plan").Box


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
    return Box(lines[1][0], lines[0][0], lines[1][1], lines[0][1]), size, factor


@settings(max_examples=150, deadline=None)
@given(cuts(), st.integers(1, 3), st.sampled_from([3, 4]))
def test_a_cut_is_the_pictures_mirrored_beyond_their_border(job: Any, count: int, channels: int) -> None:
    box, size, factor = job
    pictures = random_pictures(count, *size, channels)
    result = place_of(box, factor).cut(pictures)
    assert result.shape == (count, box.height * factor, box.width * factor, channels)
    for picture, part in zip(pictures.numpy(), result.numpy(), strict=True):
        assert np.array_equal(part, literal_part(picture, scaled(box, factor)))


@pytest.mark.parametrize(("size", "box"), [((40, 48), Box(-2, -3, 14, 13)), ((35, 45), Box(-8, 0, 16, 10))])
def test_a_cut_mirrors_as_torch_does(size: tuple[int, int], box: Any) -> None:
    pictures = random_pictures(2, *size)
    pixels = scaled(box, 4)
    out = (max(0, -pixels.left), max(0, pixels.right - size[1]), max(0, -pixels.top), max(0, pixels.bottom - size[0]))
    padded = F.pad(pictures.movedim(-1, 1), out, mode="reflect").movedim(1, -1)
    assert torch.equal(place_of(box, 4).cut(pictures), padded)


def test_a_cut_repeats_the_edge_of_a_picture_that_is_too_small_to_be_mirrored_so_far() -> None:
    pictures = random_pictures(1, 3, 60)
    result = place_of(Box(0, -3, 15, 5), 4).cut(pictures)
    assert torch.equal(result[:, 12:15], pictures)
    assert (result[:, :12] == pictures[:, :1]).all() and (result[:, 15:] == pictures[:, -1:]).all()


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
    pictures, box = random_pictures(2, *low), Box(1, -3, 9, 13)

    def resized(size: tuple[int, int]) -> np.ndarray:
        planes = F.interpolate(pictures.movedim(-1, 1), size=size, mode="bicubic", antialias=True)
        return planes.clamp(0, 1).movedim(1, -1).numpy()

    place, size = place_of(box, factor), (10 * factor, 12 * factor)
    for result, picture in zip(place.cells_of(pictures, size).numpy(), resized((10, 12)), strict=True):
        assert np.abs(result - literal_part(picture, box)).max() < 1e-5
    for result, picture in zip(place.pixels_of(pictures, size).numpy(), resized(size), strict=True):
        assert np.abs(result - literal_part(picture, scaled(box, factor))).max() < 1e-5


@settings(max_examples=100, deadline=None)
@given(cuts(), st.tuples(st.integers(1, 70), st.integers(1, 70)), st.integers(1, 3), st.integers(0, 3))
def test_a_part_that_holds_what_is_seen_shows_what_the_whole_shows(
    job: Any, small: tuple[int, int], times: int, margin: int
) -> None:
    box, size, factor = job
    place = place_of(box, factor)
    pictures = random_pictures(2, small[0] * times, small[1] * times)
    part = place.seen(small, size, margin)
    assert part.size == small and part.box.height <= small[0] and part.box.width <= small[1]
    held = part.enlarged(times)
    cut = pictures[:, held.box.top : held.box.bottom, held.box.left : held.box.right]
    assert cut.shape[1:3] == (part.box.height * times, part.box.width * times)
    assert (place.pixels_of(cut, size, held) - place.pixels_of(pictures, size)).abs().max() < 1e-5


@pytest.mark.quick
def test_what_is_seen_is_no_more_than_the_box_and_its_margin() -> None:
    # 100 to 180 of 400 and 200 to 320 of 600, at half the size: 50 to 90 and 100 to 160, two for the kernel and the margin.
    part = place_of(Box(50, 25, 80, 45), 4).seen((200, 300), (400, 600), 5)
    assert part.size == (200, 300) and part.box == Box(93, 43, 167, 97)
    assert place_of(Box(-10, -1, 30, 15), 4).seen((200, 300), (400, 600), 5).box == Box(0, 0, 67, 37)


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
            for box in (Box(0, 0, *grid[::-1]), Box(*(side // 3 + more for more in (0, 16) for side in grid[::-1]))):
                place = place_of(box, factor)
                cells = drift(place.cells_of(picture, size), box[1 - axis], line / factor, low[axis], axis)
                assert not len(cells) or cells.abs().max() < 0.05
                if factor == 4 and low != size:
                    pixels = drift(place.pixels_of(picture, size), box[1 - axis] * factor, line, low[axis], axis)
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
