"""Color matching: which pixels count, what the map does to their statistics, and where it does nothing. No host needed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module

pytestmark = pytest.mark.quick

color = pack_module("imaging.color")

MODES = ["mean", "covariance"]


def square_hole(size: int = 40, start: int = 14, stop: int = 26) -> torch.Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., start:stop, start:stop] = 1
    return mask


def noise(seed: int, *shape: int) -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def literal_band(inside: torch.Tensor, width: int) -> torch.Tensor:
    height, length = inside.shape
    hole = [(y, x) for y in range(height) for x in range(length) if inside[y, x]]
    near = torch.zeros_like(inside)
    for y, x in itertools.product(range(height), range(length)):
        near[y, x] = not inside[y, x] and any((y - v) ** 2 + (x - u) ** 2 <= width**2 for v, u in hole)
    return near


def statistics(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [C] and covariance [C, C] of pixels [C, N]."""
    return pixels.double().mean(dim=1), torch.cov(pixels.double(), correction=0)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 18),
    st.integers(0, 2**31),
    st.sampled_from([0, 0.03, 0.3, 1]),
)
def test_the_band_is_a_true_distance(height: int, length: int, width: int, seed: int, density: float) -> None:
    inside = torch.rand(height, length, generator=torch.Generator().manual_seed(seed)) < density
    assert torch.equal(color.seam_band(inside, width), literal_band(inside, width))


@pytest.mark.parametrize("mode", MODES)
def test_a_shift_of_tone_is_taken_back_inside_the_hole_only(mode: str) -> None:
    mask, destination = square_hole(), noise(1, 1, 3, 40, 40)
    tone = torch.tensor([0.1, -0.05, 0.2]).reshape(1, 3, 1, 1)
    source = destination + tone
    matched = color.match_color(source, destination, mask, band=5, mode=mode)
    assert torch.allclose(matched, torch.where(mask > 0.5, destination, source), atol=1e-6)
    assert torch.equal(matched[..., 0, :], source[..., 0, :])


def test_the_mean_is_that_of_the_band() -> None:
    mask, source, destination = square_hole(), noise(2, 1, 3, 40, 40), noise(3, 1, 3, 40, 40) * 0.8
    matched = color.match_color(source, destination, mask, band=4)
    near = literal_band(mask[0, 0] > 0.5, 4)
    shift = (destination[0][:, near].double().mean(1) - source[0][:, near].double().mean(1)).reshape(3, 1, 1)
    hole = mask[0] > 0.5
    assert shift.abs().min() > 0.05
    assert torch.allclose(matched[0], torch.where(hole, source[0] + shift, source[0]).float(), atol=1e-6)


def test_an_affine_change_of_colour_is_taken_back() -> None:
    # Symmetric and positive: what optimal transport between two distributions can be.
    mixing = torch.tensor([[0.8, 0.15, 0.0], [0.15, 1.3, -0.1], [0.0, -0.1, 0.6]])
    mask, destination = square_hole(), noise(4, 1, 3, 40, 40)
    source = torch.einsum("dc,bchw->bdhw", torch.linalg.inv(mixing), destination - 0.5) + 0.45
    matched = color.match_color(source, destination, mask, band=6, mode="covariance")
    # The deviation added against flat colours (one level) keeps it from being exact.
    assert (matched - destination)[..., 14:26, 14:26].abs().max() < 2 / 255
    by_mean = color.match_color(source, destination, mask, band=6, mode="mean")
    assert (by_mean - destination)[..., 14:26, 14:26].abs().max() > 10 / 255


def test_the_covariance_match_reaches_the_targets_mean_and_covariance() -> None:
    mask = square_hole(start=10, stop=30)
    hole = mask[0, 0] > 0.5
    near = literal_band(hole, 3)
    count = int(near.sum())
    generator = torch.Generator().manual_seed(5)
    mixing = torch.tensor([[0.08, 0.03, 0.0], [0.0, 0.04, 0.02], [0.01, 0.0, 0.05]])
    source = 0.55 + torch.einsum("dc,chw->dhw", mixing, torch.randn(3, 40, 40, generator=generator))
    destination = 0.45 + torch.einsum("dc,chw->dhw", mixing.flip(0), torch.randn(3, 40, 40, generator=generator))
    # The hole begins with copies of the band's pixels: their statistics must become the destination's.
    source[:, hole] = torch.cat((source[:, near], source[:, hole][:, count:]), dim=1)
    matched = color.match_color(source[None], destination[None], mask, band=3, mode="covariance")
    mean, covariance = statistics(matched[0][:, hole][:, :count])
    target_mean, target_covariance = statistics(destination[:, near])
    assert torch.allclose(mean, target_mean, atol=1e-5)
    assert torch.allclose(covariance, target_covariance, rtol=0, atol=5e-5)
    assert (statistics(source[:, near])[1] - target_covariance).abs().max() > 3e-3


@pytest.mark.parametrize("mode", MODES)
def test_pixels_outside_of_the_band_do_not_leak_into_it(mode: str) -> None:
    mask, source, destination = square_hole(), noise(6, 1, 3, 40, 40), noise(7, 1, 3, 40, 40) * 0.7
    hole = mask[0, 0] > 0.5
    near = literal_band(hole, 5)
    matched = color.match_color(source, destination, mask, band=5, mode=mode)
    elsewhere, far = source.clone(), destination.clone()
    elsewhere[..., ~near & ~hole] = float("nan")
    far[..., ~near] = 7.0
    changed = color.match_color(elsewhere, far, mask, band=5, mode=mode)
    assert torch.equal(changed[..., hole], matched[..., hole])
    assert not torch.equal(matched[..., hole], source[..., hole])
    # And the fill's own colours do not count: each pixel of it is mapped for itself.
    filled = source.clone()
    filled[..., 20, 20] = 0.9
    again = color.match_color(filled, destination, mask, band=5, mode=mode)
    others = hole.clone()
    others[20, 20] = False
    assert torch.equal(again[..., others], matched[..., others])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", [(0, 0), (10, 14), (14, 9), (30, 20)])
def test_every_pixel_of_the_band_counts(mode: str, place: tuple[int, int]) -> None:
    mask, source, destination = square_hole(), noise(8, 1, 3, 40, 40), noise(9, 1, 3, 40, 40)
    in_band = bool(literal_band(mask[0, 0] > 0.5, 5)[place])
    matched = color.match_color(source, destination, mask, band=5, mode=mode)
    source[..., place[0], place[1]] += 0.5
    changed = color.match_color(source, destination, mask, band=5, mode=mode)
    assert in_band == (place != (0, 0))
    assert torch.equal(changed[..., 14:26, 14:26], matched[..., 14:26, 14:26]) != in_band


@pytest.mark.parametrize("mode", MODES)
def test_a_source_composited_already_is_left_alone(mode: str) -> None:
    mask, destination = square_hole(), noise(10, 1, 3, 40, 40)
    source = torch.where(mask > 0.5, torch.rand(1, 3, 40, 40), destination)
    # Values that a map equal to the identity but for rounding, or for the clamp, would change.
    source[..., 20, 20:22] = torch.tensor([1e-30, 1.01])
    assert torch.equal(color.match_color(source, destination, mask, mode=mode), source)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 9, 7), torch.ones(1, 1, 9, 7)])
def test_without_an_edge_the_source_is_left_alone(mode: str, mask: torch.Tensor) -> None:
    source = noise(11, 1, 3, 9, 7)
    assert torch.equal(color.match_color(source, noise(12, 1, 3, 9, 7), mask, mode=mode), source)


def test_strength_goes_from_the_source_to_the_match() -> None:
    mask, source, destination = square_hole(), noise(13, 1, 3, 40, 40), noise(14, 1, 3, 40, 40) * 0.8
    full = color.match_color(source, destination, mask, mode="covariance")
    half = color.match_color(source, destination, mask, mode="covariance", strength=0.5)
    assert torch.allclose(half, (source + full) / 2, atol=1e-6)
    assert not torch.allclose(half, full, atol=1e-2)
    assert torch.equal(color.match_color(source, destination, mask, strength=0.0), source)


def test_flat_colours_give_no_contrast() -> None:
    mask = square_hole()
    flat, textured = torch.full((1, 3, 40, 40), 0.4), noise(15, 1, 3, 40, 40)
    assert torch.allclose(
        color.match_color(flat, flat + 0.1, mask, mode="covariance")[..., 14:26, 14:26], torch.tensor(0.5), atol=1e-6
    )
    # A flat band says nothing about how to stretch: a fill with a little texture stays within the greatest gain.
    source = flat.clone()
    source[..., 14:26, 14:26] += 0.01 * (torch.rand(1, 3, 12, 12) - 0.5)
    stretched = color.match_color(source, textured, mask, mode="covariance")[..., 14:26, 14:26]
    texture = source[..., 14:26, 14:26].flatten(2).std(dim=2)
    assert stretched.isfinite().all()
    assert (stretched.flatten(2).std(dim=2) <= color.MAX_GAIN * 1.2 * texture).all()
    squeezed = color.match_color(textured, flat, mask, mode="covariance")[..., 14:26, 14:26]
    assert (squeezed.flatten(2).std(dim=2) >= 0.8 / color.MAX_GAIN * textured.flatten(2).std(dim=2)).all()


def test_differences_of_less_than_a_level_are_not_stretched() -> None:
    mask = square_hole()
    source = 0.5 + 0.0005 * torch.randn(1, 3, 40, 40)
    destination = 0.5 + 0.0015 * torch.randn(1, 3, 40, 40)
    matched = color.match_color(source, destination, mask, mode="covariance")
    hole = (mask[0, 0] > 0.5).nonzero(as_tuple=True)
    assert matched[0, :, hole[0], hole[1]].std() < 1.3 * source[0, :, hole[0], hole[1]].std()


def test_grey_pictures_have_a_degenerate_covariance() -> None:
    mask = square_hole()
    source, destination = noise(16, 1, 1, 40, 40).repeat(1, 3, 1, 1), 0.1 + 0.7 * noise(17, 1, 1, 40, 40)
    matched = color.match_color(source, destination.repeat(1, 3, 1, 1), mask, mode="covariance")
    assert matched.isfinite().all()
    assert (matched[:, 0] - matched[:, 1]).abs().max() < 1e-5


def test_few_pixels_match_the_mean_only() -> None:
    for size, same in (((1, color.MIN_PIXELS), True), ((1, color.MIN_PIXELS + 1), False)):
        source, destination = noise(18, 1, 3, *size), noise(19, 1, 3, *size) ** 2
        mask = torch.zeros(1, 1, *size)
        mask[..., 0, 0] = 1
        by_mean = color.match_color(source, destination, mask, band=100, mode="mean")
        by_covariance = color.match_color(source, destination, mask, band=100, mode="covariance")
        assert torch.equal(by_mean, by_covariance) == same


@pytest.mark.parametrize("mode", MODES)
def test_each_picture_of_a_batch_is_for_itself(mode: str) -> None:
    source, destination = (
        noise(20, 3, 3, 40, 40),
        noise(21, 3, 3, 40, 40) * torch.tensor([0.6, 0.9, 1.2]).reshape(3, 1, 1, 1),
    )
    mask = torch.cat((square_hole(), square_hole(start=0, stop=9), square_hole(start=20, stop=40)))
    together = color.match_color(source, destination, mask, band=6, mode=mode)
    alone = [color.match_color(source[i : i + 1], destination[i : i + 1], mask[i : i + 1], 6, mode) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(color.match_color(source, destination[:1], mask[0, 0], 6, mode)[:1], together[:1])


def test_values_are_clamped_inside_the_hole_only() -> None:
    mask, source = square_hole(), torch.full((1, 3, 40, 40), 1.1)
    matched = color.match_color(source, source + 0.3, mask)
    assert torch.equal(matched, torch.where(mask > 0.5, torch.tensor(1.0), source))


@pytest.mark.parametrize("mode", MODES)
def test_the_inputs_are_not_changed(mode: str) -> None:
    inputs = (noise(22, 2, 3, 40, 40), noise(23, 1, 3, 40, 40) * 0.5, square_hole())
    before = [tensor.clone() for tensor in inputs]
    for strength in (0.0, 1.0):
        color.match_color(*inputs, mode=mode, strength=strength).zero_()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"band": 0}, "band is 0, but .* 1 or more"),
        ({"band": 2.5}, "whole number"),
        ({"mode": "median"}, "'mean' or 'covariance'; it is 'median'"),
        ({"strength": 1.5}, "from 0 to 1; it is 1.5"),
        ({"strength": float("nan")}, "from 0 to 1"),
        ({"source": torch.rand(1, 3, 40, 41)}, "differ; resize"),
        ({"mask": torch.ones(40, 41)}, "differ; resize"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(changed: dict[str, object], message: str) -> None:
    job = {"source": noise(24, 1, 3, 40, 40), "destination": noise(25, 1, 3, 40, 40), "mask": square_hole()}
    with pytest.raises(ValueError, match=message) as refused:
        color.match_color(**{**job, **changed})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["source", "destination"])
def test_nan_in_the_band_is_refused_in_one_sentence(name: str) -> None:
    job = {"source": noise(26, 1, 3, 40, 40), "destination": noise(27, 1, 3, 40, 40)}
    job[name][0, 0, 20, 10] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite pixels around the hole"):
        color.match_color(**job, mask=square_hole(), band=5)
    color.match_color(**job, mask=square_hole(), band=3)
