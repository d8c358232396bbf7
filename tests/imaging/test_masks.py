"""Masks on grids: properties for every size, and the rule for small holes. No host needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module

pytestmark = pytest.mark.quick

masks = pack_module("imaging.masks")

side = st.integers(1, 40)


@st.composite
def holes(draw: st.DrawFn) -> torch.Tensor:
    batch, height, width = draw(st.integers(1, 3)), draw(side), draw(side)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return (torch.rand(batch, 1, height, width, generator=generator) < density).float()


@st.composite
def grey_masks(draw: st.DrawFn) -> torch.Tensor:
    """Holes of any grey above the noise, on backgrounds of 0 to 2/255."""
    hole = draw(holes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = torch.randint(3, 256, hole.shape, generator=generator) / 255
    noise = torch.randint(0, 3, hole.shape, generator=generator) / 255
    return torch.where(hole > 0, levels, noise)


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
    mask = 0.02 + 0.98 * torch.rand(shape)
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


def test_every_8_bit_value_above_2_is_hole_and_keeps_its_grey_however_it_was_made() -> None:
    levels = torch.arange(256, dtype=torch.uint8)[None]
    for given_mask in (levels / 255, 1 - (255 - levels) / 255, levels.double() / 255, (levels / 255).half()):
        batch = masks.as_mask_batch(given_mask)[0, 0, 0]
        assert batch[:3].tolist() == [0.0, 0.0, 0.0]
        assert torch.equal(batch[3:], given_mask[0, 3:].float())
        assert torch.equal(masks.hole_of(given_mask)[0, 0, 0], torch.arange(256) > 2)


@settings(max_examples=150, deadline=None)
@given(grey_masks(), side, side)
def test_what_came_through_the_door_goes_through_it_unchanged(mask: torch.Tensor, height: int, width: int) -> None:
    batch, resized = masks.as_mask_batch(mask), masks.resize_mask(mask, (height, width))
    assert torch.equal(masks.as_mask_batch(batch), batch) and torch.equal(batch > 0, masks.hole_of(mask))
    assert torch.equal(masks.as_mask_batch(resized), resized)
    assert resized.shape == (len(mask), 1, height, width)
    assert torch.equal(resized.flatten(1).any(1), batch.flatten(1).any(1)), "a hole was lost, or one appeared"


def bilinear(given_side: int, side: int, wider: float = 0.0) -> torch.Tensor:
    """Weights [side, given_side] of a triangle as wide as the pixels on the coarser side, or a little wider."""
    scale = given_side / side
    distance = torch.arange(given_side) + 0.5 - (torch.arange(side, dtype=torch.float64)[:, None] + 0.5) * scale
    weight = (1 + wider - distance.abs() / max(1.0, scale)).clamp(min=0.0)
    return weight / weight.sum(dim=1, keepdim=True)


@settings(max_examples=150, deadline=None)
@given(holes(), side, side)
@example(torch.ones(1, 1, 7, 12).triu(), 2, 1)
def test_a_resized_mask_is_bilinear_and_anti_aliased(mask: torch.Tensor, height: int, width: int) -> None:
    resized = masks.resize_mask(mask, (height, width)).double()
    # The last one at which a pixel counts may be lost or won by rounding.
    less, expected, more = (
        bilinear(mask.shape[2], height, wider) @ mask.double() @ bilinear(mask.shape[3], width, wider).T
        for wider in (-1e-5, 0.0, 1e-5)
    )
    assert (resized[less > 0] > 0).all() and (resized[more == 0] == 0).all()
    kept = expected > 3 / 255
    torch.testing.assert_close(resized[kept], expected[kept], atol=2e-5, rtol=0)


@settings(max_examples=150, deadline=None)
@given(grey_masks(), side, side)
def test_on_a_grid_the_hole_counts_however_grey(mask: torch.Tensor, height: int, width: int) -> None:
    binary = (mask > 0.01).float()
    covered = masks.hole_coverage(mask, (height, width))
    assert torch.equal(covered, masks.coverage(binary, (height, width)))
    assert torch.equal(masks.hole_cells(covered, (height, width)), masks.hole_cells(binary, (height, width)))


@pytest.mark.parametrize("grey", [3 / 255, 0.25, 0.498, 0.5, 1.0])
def test_a_second_white_hole_changes_nothing_about_a_grey_one(grey: float) -> None:
    alone = torch.full((1, 64, 64), 1 / 255)
    alone[:, 8:24, 8:24] = grey
    both = alone.clone()
    both[:, 40:56, 40:56] = 1.0
    for size in ((64, 64), (8, 8), (12, 9)):
        cells = [masks.hole_cells(masks.hole_coverage(mask, size), size) for mask in (alone, both)]
        near = slice(None), slice(0, size[0] // 2), slice(0, size[1] // 2)
        assert cells[0].any() and torch.equal(cells[0][near], cells[1][near])
        weights = [masks.coverage(masks.as_mask_batch(mask), size)[:, 0] for mask in (alone, both)]
        assert torch.equal(weights[0][near], weights[1][near])
        assert weights[0].max() == pytest.approx(grey)


def test_noise_is_spoken_of_where_a_hole_vanishes_or_a_background_is_not_black(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clean, faint = torch.zeros(16, 16), torch.zeros(16, 16)
    clean[4:8, 4:8] = 0.5
    faint[4:8, 4:8] = 2 / 255
    noisy = clean.clamp(min=1 / 255)
    soft = clean.clone()
    soft[3:9, 3] = 1 / 255
    batch = torch.stack([clean, faint, noisy, soft, torch.zeros(16, 16)])
    notes = masks.noise_notes(batch, "'mask'")
    assert [bool(note) for note in notes] == [False, True, True, False, False]
    assert notes[1] == "'mask' is not black, but nothing in it is above 2/255, which counts as noise: it has no hole."
    assert notes[2] == "'mask' has a background that is mostly not black, but at most 2/255, which counts as known."
    masks.log_noise("Crop Region", mask=batch[1:3].repeat(2, 1, 1), context_mask=None)
    assert caplog.messages == [f"TrueFill Crop Region: {note} (2 of 4 masks)" for note in notes[1:3]]
    caplog.clear()
    masks.log_noise("Crop Region", mask=noisy, context_mask=faint)
    assert [message.split(" ", 3)[3] for message in caplog.messages] == [
        notes[2],
        notes[1].replace("mask", "context_mask", 1),
    ]
    caplog.clear()
    masks.log_noise("Crop Region", mask=batch[3:])
    assert not caplog.messages
