"""Starting fills: known pixels stay, the hole gets what is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module

pytestmark = pytest.mark.quick

fill = pack_module("imaging.fill")
METHODS = ("blurred", "edge", "mean", "noise", "gray")


def some(batch: int, height: int, width: int, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    pictures = torch.rand(batch, channels, height, width, generator=generator)
    return pictures, (torch.rand(batch, 1, height, width, generator=generator) > 0.5).float()


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3), height=st.integers(1, 13), width=st.integers(1, 13), channels=st.sampled_from([1, 3, 4])
)
def test_known_pixels_stay_and_the_rest_is_in_range(method, batch, height, width, channels):
    pictures, mask = some(batch, height, width, channels)
    before = pictures.clone()
    made = fill.fill_hole(pictures, mask, method)
    known = (mask == 0).expand_as(pictures)
    assert made.shape == pictures.shape and torch.equal(made[known], pictures[known])
    assert made.isfinite().all() and made.min() >= 0 and made.max() <= 1
    assert torch.equal(pictures, before)


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_under_the_hole_does_not_matter(method):
    pictures, mask = some(2, 20, 17)
    other = torch.where(mask > 0, 1.0 - pictures, pictures)
    assert torch.equal(fill.fill_hole(pictures, mask, method), fill.fill_hole(other, mask, method))


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_of_a_batch_is_filled_as_if_alone(method):
    pictures, mask = some(3, 16, 24)
    together = fill.fill_hole(pictures, mask, method, seed=3)
    for index in range(3 if method != "noise" else 1):
        alone = fill.fill_hole(pictures[index : index + 1], mask[index : index + 1], method, seed=3)
        torch.testing.assert_close(together[index : index + 1], alone)


def test_edge_is_the_nearest_known_pixel():
    pictures, mask = some(1, 9, 11)
    made = fill.fill_hole(pictures, mask, "edge")[0]
    places = np.argwhere(mask[0, 0].numpy() == 0)
    for y in range(9):
        for x in range(11):
            distance = ((places - (y, x)) ** 2).sum(axis=1)
            nearest = [pictures[0, :, a, b] for a, b in places[distance == distance.min()]]
            assert any(torch.equal(made[:, y, x], colour) for colour in nearest)


def test_mean_and_noise_have_the_statistics_of_the_known_pixels():
    pictures = 0.5 + 0.1 * torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 128, 128)
    mask[:, :, :, 64:] = 1.0
    pictures[..., 64:] = 0.0
    known, mean = pictures[..., :64], pictures[..., :64].mean(dim=(2, 3))
    filled = fill.fill_hole(pictures, mask, "mean")[..., 64:]
    torch.testing.assert_close(filled, mean[..., None, None].expand_as(filled))
    noise = fill.fill_hole(pictures, mask, "noise", seed=1)[..., 64:]
    torch.testing.assert_close(noise.mean(dim=(2, 3)), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(noise.std(dim=(2, 3)), known.std(dim=(2, 3)), atol=0.01, rtol=0)
    assert not torch.equal(noise, fill.fill_hole(pictures, mask, "noise", seed=2)[..., 64:])


def test_blurred_continues_a_ramp_and_has_no_step_at_the_edge():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, 20:44, 20:44] = 1.0
    made = fill.fill_hole(ramp, mask, "blurred")
    assert (made - ramp).abs().max() < 0.12
    assert made.diff(dim=3).abs().max() < 0.12
    flat = fill.fill_hole(torch.full((1, 3, 33, 47), 0.3), some(1, 33, 47)[1], "blurred")
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3))


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_that_is_all_hole_becomes_gray_or_noise_around_it(method):
    made = fill.fill_hole(torch.rand(1, 3, 64, 64), torch.ones(64, 64), method)
    if method == "noise":
        assert abs(float(made.mean()) - 0.5) < 0.02 and made.std() > 0.1
    else:
        assert (made == 0.5).all()


def test_grey_masks_mix_and_one_mask_serves_all():
    pictures = torch.rand(3, 3, 4, 4)
    made = fill.fill_hole(pictures, torch.full((4, 4), 0.25), "gray")
    torch.testing.assert_close(made, 0.75 * pictures + 0.125)
    assert fill.fill_hole(pictures[:1], torch.ones(2, 1, 4, 4), "gray").shape[0] == 2
    assert fill.fill_pictures(pictures[:1].movedim(1, -1), torch.ones(4, 4), "gray").shape[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(1, 3, 4, 4), torch.ones(4, 4), "telea"), "no fill 'telea'; choose one of blurred"),
        ((torch.rand(3, 4, 4), torch.ones(4, 4)), "4 dimensions"),
        ((torch.rand(1, 3, 4, 4), torch.ones(5, 4)), "4x5 pixels, the picture 4x4"),
        ((torch.rand(2, 3, 4, 4), torch.ones(3, 4, 4)), "2 in 'image', 3 in 'mask'; each has to have 1 or 3"),
    ],
)
def test_mistakes_get_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        fill.fill_hole(*arguments)
