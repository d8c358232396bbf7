"""Masks on grids: properties for every size, and the rule for small holes. No host needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from truefill_testing.host import pack_module

masks = pack_module("imaging.masks")

side = st.integers(1, 40)


@st.composite
def holes(draw: st.DrawFn) -> torch.Tensor:
    batch, height, width = draw(st.integers(1, 3)), draw(side), draw(side)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return (torch.rand(batch, 1, height, width, generator=generator) < density).float()


@settings(max_examples=150, deadline=None)
@given(holes(), side, side)
def test_a_hole_is_never_lost_and_none_appears(hole: torch.Tensor, height: int, width: int) -> None:
    cells = masks.hole_cells(hole, (height, width))
    assert cells.shape == (hole.shape[0], height, width)
    assert cells.dtype == torch.bool
    assert torch.equal(cells.flatten(1).any(dim=1), hole.flatten(1).any(dim=1))
    full = hole.flatten(1).all(dim=1)
    assert cells[full].all()


@settings(max_examples=100, deadline=None)
@given(holes(), side, side)
def test_coverage_is_the_area_mean(hole: torch.Tensor, height: int, width: int) -> None:
    covered = masks.coverage(hole, (height, width))
    assert covered.min() >= 0.0 and covered.max() <= 1.0
    assert torch.allclose(covered, F.interpolate(hole, size=(height, width), mode="area"), atol=1e-6)


def test_each_picture_of_a_batch_is_for_itself() -> None:
    one = torch.zeros(1, 1, 16, 16)
    one[..., 3, 3] = 1.0
    other = torch.ones(1, 1, 16, 16)
    together = masks.hole_cells(torch.cat((one, other)), (4, 4))
    assert torch.equal(together, torch.cat((masks.hole_cells(one, (4, 4)), masks.hole_cells(other, (4, 4)))))
    assert together[0].sum() == 1 and together[0, 0, 0]


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (2, 3, 5, 7)])
def test_every_shape_becomes_a_batch_of_one_channel(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape)
    batch = masks.as_mask_batch(mask)
    assert batch.shape == (shape[0] if len(shape) > 2 else 1, 1, 5, 7)
    first = mask if len(shape) < 4 else mask[:, 0]
    assert torch.equal(batch[:, 0], first.reshape(-1, 5, 7))


def test_values_out_of_range_are_cut_and_nan_is_known() -> None:
    batch = masks.as_mask_batch(torch.tensor([[float("nan"), -3.0, 0.25, 7.0]]))
    assert batch.flatten().tolist() == [0.0, 0.0, 0.25, 1.0]


@pytest.mark.parametrize("shape", [(4,), (1, 1, 1, 4, 4), (0, 4, 4), (1, 0, 4)])
def test_what_is_no_mask_is_refused_in_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask") as refused:
        masks.as_mask_batch(torch.ones(shape))
    assert "\n" not in str(refused.value)


def test_the_given_mask_is_not_changed() -> None:
    mask = torch.full((1, 4, 4), 2.0)
    masks.as_mask_batch(mask)
    assert mask.max() == 2.0
