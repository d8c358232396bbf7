"""Overlapping tiles over a grid and the weights that join them, against literal loops. No host needed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module
from truefill_testing.regions import one_sentence

pytestmark = pytest.mark.quick

tiling = pack_module("imaging.tiling")
Box = pack_module("imaging.region_plan").Box


@st.composite
def tilings(draw: st.DrawFn, longest: int = 60) -> tuple[tuple[int, int], int, int]:
    """The size of a grid, the side of a tile and the overlap: odd, one cell wide, smaller than a tile, much larger."""
    side = draw(st.integers(1, 20))
    return (
        (draw(st.integers(1, longest)), draw(st.integers(1, longest))),
        side,
        draw(st.one_of(st.integers(0, side - 1), st.sampled_from([0, side // 4, side // 2, side - 1]))),
    )


@st.composite
def needs(draw: st.DrawFn, size: tuple[int, int]) -> torch.Tensor:
    noise = torch.rand(*size, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    return noise < draw(st.sampled_from([0.001, 0.02, 0.3, 1.1]))


def everywhere(size: tuple[int, int]) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool)


def cells(box: Any) -> set[tuple[int, int]]:
    return {(row, column) for row in range(box.top, box.bottom) for column in range(box.left, box.right)}


def some_of(boxes: list[Any]) -> list[Any]:
    """The first, the last and about ten more."""
    return [*boxes[:: 1 + len(boxes) // 10], boxes[-1]]


def shares(boxes: list[Any], size: tuple[int, int], overlap: int) -> torch.Tensor:
    """What each tile has in each cell [N, H, W]; the sum over all tiles is 1."""
    weights = torch.zeros(len(boxes), *size, dtype=torch.float64)
    for weight, box in zip(weights, boxes, strict=True):
        weight[box.top : box.bottom, box.left : box.right] = tiling.tile_weight(box, size, overlap)
    return weights / weights.sum(0)


@settings(max_examples=100, deadline=None)
@given(tilings(), st.data())
def test_the_tiles_are_those_of_the_full_layout_that_hold_a_needed_cell(layout: Any, data: st.DataObject) -> None:
    size, side, overlap = layout
    needed = data.draw(needs(size))
    wanted = {(row, column) for row, column in needed.nonzero().tolist()}
    boxes = tiling.tile_boxes(needed, side, overlap)
    assert boxes == [box for box in tiling.tile_boxes(everywhere(size), side, overlap) if cells(box) & wanted]
    assert wanted <= {cell for box in boxes for cell in cells(box)}


@settings(max_examples=100, deadline=None)
@given(tilings(longest=30), st.integers(1, 400))
@example(((1, 1), 1, 0), 1)
@example(((1, 1), 20, 19), 1)
@example(((8, 1), 8, 7), 9)
@example(((3, 1), 2, 1), 400)
def test_the_full_layout_is_an_even_lattice_of_no_more_tiles_than_the_overlap_needs(layout: Any, length: int) -> None:
    (first, second), side, overlap = layout
    for size in ((first, second), (first, length), (length, second)):
        check_lattice(size, side, overlap)


def check_lattice(size: tuple[int, int], side: int, overlap: int) -> None:
    boxes = tiling.tile_boxes(everywhere(size), side, overlap)
    assert {(box.height, box.width) for box in boxes} == {(min(side, size[0]), min(side, size[1]))}
    tops, lefts = (sorted({box[side] for box in boxes}) for side in (1, 0))
    # Reading order, each place once.
    assert [(box.top, box.left) for box in boxes] == [(top, left) for top in tops for left in lefts]
    for starts, length in ((tops, size[0]), (lefts, size[1])):
        tile = min(side, length)
        steps = [after - before for before, after in itertools.pairwise(starts)]
        assert starts[0] == 0 and starts[-1] + tile == length
        assert all(tile - step >= overlap for step in steps)
        assert not steps or max(steps) - min(steps) <= 1
        # One tile less, at the widest spacing that is allowed, would leave cells without a tile.
        assert len(starts) == 1 or tile + (len(starts) - 2) * (side - overlap) < length


def test_layouts_drawn_by_hand() -> None:
    assert tiling.tile_boxes(everywhere((5, 20)), 8, 2) == [Box(0, 0, 8, 5), Box(6, 0, 14, 5), Box(12, 0, 20, 5)]
    assert tiling.tile_boxes(everywhere((5, 21)), 8, 2) == [
        Box(left, 0, left + 8, 5) for left in (0, 4, 9, 13)
    ]  # 13 cells to go in three steps
    assert tiling.tile_boxes(everywhere((16, 8)), 8, 0) == [Box(0, 0, 8, 8), Box(0, 8, 8, 16)]
    needed = torch.zeros(16, 24, dtype=torch.bool)
    needed[8, 15] = True
    assert tiling.tile_boxes(needed, 8, 0) == [Box(8, 8, 16, 16)]
    needed[7, 16] = True
    assert tiling.tile_boxes(needed, 8, 0) == [Box(16, 0, 24, 8), Box(8, 8, 16, 16)]


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (40, 7)])
def test_where_nothing_is_needed_there_is_no_tile(size: tuple[int, int]) -> None:
    assert tiling.tile_boxes(torch.zeros(size, dtype=torch.bool), 8, 2) == []


@pytest.mark.parametrize(("side", "overlap"), [(8, 8), (8, 9), (8, -1), (0, 0), (1, 1), (-8, 2)])
def test_an_overlap_out_of_range_is_refused_in_one_sentence(side: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=rf"overlap is {overlap}, .*{side}") as refused:
        tiling.tile_boxes(everywhere((20, 20)), side, overlap)
    assert one_sentence(refused)


@settings(max_examples=60, deadline=None)
@given(tilings())
def test_the_weight_falls_towards_each_edge_that_lies_inside_the_grid(layout: Any) -> None:
    size, side, overlap = layout
    for box in some_of(tiling.tile_boxes(everywhere(size), side, overlap)):
        weight = tiling.tile_weight(box, size, overlap)
        assert weight.shape == (box.height, box.width) and weight.dtype == torch.float32
        assert 0.0 < weight.min() and weight.max() <= 1.0
        lines = []
        for start, stop, length in ((box.top, box.bottom, size[0]), (box.left, box.right, size[1])):
            line = []
            for cell in range(start, stop):
                # From the centre of the cell to the edge of the tile.
                distances = [cell + 0.5 - start] * (start > 0) + [stop - cell - 0.5] * (stop < length)
                line.append(min([1.0, *(distance / max(overlap, 1) for distance in distances)]))
            lines.append(torch.tensor(line))
        assert torch.allclose(weight, lines[0][:, None] * lines[1], rtol=1e-6, atol=0)


@settings(max_examples=50, deadline=None)
@given(tilings())
def test_the_weights_of_a_mirrored_tile_are_mirrored(layout: Any) -> None:
    size, side, overlap = layout
    for box in some_of(tiling.tile_boxes(everywhere(size), side, overlap)):
        weight = tiling.tile_weight(box, size, overlap)
        upside_down = Box(box.left, size[0] - box.bottom, box.right, size[0] - box.top)
        assert torch.equal(tiling.tile_weight(upside_down, size, overlap), weight.flip(0))
        turned = Box(box.top, box.left, box.bottom, box.right)
        assert torch.equal(tiling.tile_weight(turned, size[::-1], overlap), weight.T)


def largest_step(side: int, overlap: int) -> float:
    """What the shares in neighbouring cells may differ by: a little more where more than two tiles overlap."""
    return (1.101 if 2 * overlap <= side else 1.0 + math.log(side) / 2) / max(overlap, 1)


def test_the_weights_of_two_tiles_drawn_by_hand() -> None:
    boxes = [Box(0, 0, 8, 3), Box(4, 0, 12, 3)]
    first = tiling.tile_weight(boxes[0], (3, 12), 4)
    assert first[1].tolist() == [1.0, 1.0, 1.0, 1.0, 0.875, 0.625, 0.375, 0.125]
    assert torch.equal(tiling.tile_weight(boxes[1], (3, 12), 4), first.flip(1))
    assert torch.equal(tiling.tile_weight(Box(0, 0, 12, 3), (3, 12), 4), torch.ones(3, 12))
    # Inside of a larger grid a tile falls on all four sides.
    corner = torch.tensor([0.25, 0.75, 1.0, 1.0, 0.75, 0.25])
    assert torch.equal(tiling.tile_weight(Box(1, 1, 7, 7), (8, 8), 2), corner[:, None] * corner)


@pytest.mark.parametrize("side", [2, 3, 8, 13, 16])
def test_what_is_joined_goes_over_from_tile_to_tile_in_steps_of_one_overlapth(side: int) -> None:
    for overlap in range(1, side):
        for length in {side + 1, side + overlap, 2 * side - overlap, 2 * side, 3 * side + 1, 5 * side + 2}:
            boxes = tiling.tile_boxes(everywhere((1, length)), side, overlap)
            share = shares(boxes, (1, length), overlap)[:, 0]
            # Half of what all tiles gain and lose is what a cell differs from the next where tiles are apart by 1.
            step = share.diff(dim=1).abs().sum(0).max() / 2
            assert step <= largest_step(side, overlap)
            if [length - box.right for box in reversed(boxes)] == [box.left for box in boxes]:
                assert torch.allclose(share, share.flip(0, 1), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(tilings(longest=40), st.data())
def test_no_seam_where_tiles_that_are_not_needed_are_left_out(layout: Any, data: st.DataObject) -> None:
    size, side, overlap = layout
    needed = data.draw(needs(size))
    every, some = tiling.tile_boxes(everywhere(size), side, overlap), tiling.tile_boxes(needed, side, overlap)
    if not some:
        return
    full, left = shares(every, size, overlap), shares(some, size, overlap)
    for index, box in enumerate(every):
        mine = left[some.index(box)] if box in some else torch.zeros(size)
        assert torch.allclose(full[index][needed], mine[needed].double(), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(tilings(longest=40))
def test_in_two_directions_neighbouring_cells_differ_by_no_more_than_along_one(layout: Any) -> None:
    size, side, overlap = layout
    share = shares(tiling.tile_boxes(everywhere(size), side, overlap), size, overlap)
    assert torch.allclose(share.sum(0), torch.ones(size, dtype=torch.float64))
    for direction in (1, 2):
        steps = share.diff(dim=direction).abs().sum(0) / 2
        assert not steps.numel() or steps.max() <= largest_step(side, overlap)
