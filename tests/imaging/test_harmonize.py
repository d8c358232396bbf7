"""Harmonizing: the tone shift goes, the picture outside of the mask stays."""

from __future__ import annotations

import pytest
import torch

from devtools.pack import pack_module

pytestmark = pytest.mark.quick

harmonizing = pack_module("imaging.harmonize")
masks = pack_module("imaging.masks")
MODES = ("off", "color", "poisson", "both")


def harmonize(source, destination, mask, mode="both", color="mean"):
    return harmonizing.harmonize(source, destination, mask, harmonizing.Harmony(mode, color))


def scene(size: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A textured picture, the same with another fill and a shifted tone, and the hole."""
    generator = torch.Generator().manual_seed(0)
    picture = 0.35 + 0.2 * torch.rand(1, 3, size, size, generator=generator)
    hole = torch.zeros(1, 1, size, size)
    hole[:, :, 14:33, 11:30] = 1.0
    fill = 0.35 + 0.2 * torch.rand(1, 3, size, size, generator=generator)
    return picture, torch.where(hole > 0, fill, picture), hole


@pytest.mark.parametrize("mode", MODES)
def test_the_picture_stays_where_the_mask_is_0(mode):
    picture, made, hole = scene()
    soft = pack_module("imaging.morphology").feather(hole, 6, "outside", "smooth")
    result = harmonize(made + 0.1, picture, soft, mode)
    known = (soft == 0).expand_as(picture)
    assert torch.equal(result[known], picture[known])
    assert not torch.equal(result[~known], picture[~known])
    assert torch.equal(harmonize(made, picture, torch.zeros_like(hole), mode), picture)


@pytest.mark.parametrize("mode", ["color", "poisson", "both"])
def test_a_shift_of_tone_vanishes(mode):
    picture, made, hole = scene()
    shift = torch.tensor([0.1, -0.05, 0.08])[:, None, None]
    result = harmonize(made + shift, picture, hole, mode)
    torch.testing.assert_close(result, made, atol=1.5e-3, rtol=0)
    assert (harmonize(made + shift, picture, hole, "off") - made).abs().max() > 0.09


def test_a_shift_of_contrast_needs_the_covariance():
    picture, made, hole = scene(96)
    flat = 0.45 + 0.5 * (made - 0.45)
    inside = (hole > 0).expand_as(picture)
    mean, both = (harmonize(flat, picture, hole, "both", color) for color in ("mean", "covariance"))
    assert (both - made)[inside].abs().mean() < 0.3 * (mean - made)[inside].abs().mean()


def test_both_matches_colors_on_both_sides_of_the_edge():
    """Poisson blending takes its gradients across the edge from the matched picture, so it has nothing left to do."""
    picture, made, hole = scene()
    shift = torch.tensor([0.1, -0.05, 0.08])[:, None, None]
    color = harmonize(made + shift, picture, hole, "color")
    torch.testing.assert_close(harmonize(made + shift, picture, hole, "both"), color, atol=2e-3, rtol=0)


def test_grey_values_blend_the_outcome():
    picture, made, hole = scene()
    half = harmonize(made + 0.1, picture, 0.25 * hole, "poisson")
    full = harmonize(made + 0.1, picture, hole, "poisson")
    torch.testing.assert_close(half, torch.lerp(picture, full, 0.25 * hole))


def test_one_picture_serves_a_batch_and_nothing_is_changed():
    picture, made, hole = scene()
    several = torch.cat([made, made + 0.1, 1 - made])
    before = several.clone(), picture.clone(), hole.clone()
    together = harmonize(several, picture, hole)
    assert together.shape == several.shape
    for index in range(3):
        alone = harmonize(several[index : index + 1], picture, hole)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-3, rtol=0)
    assert all(torch.equal(*pair) for pair in zip(before, (several, picture, hole), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [(1, 3, 1), (3, 1, 1), (1, 1, 3), (3, 3, 1)])
def test_a_batch_of_1_goes_with_every_picture_alpha_included(mode, counts):
    picture, made, hole = scene(24)
    alpha = torch.rand(1, 24, 24, 1)
    new, old = (torch.cat([one.movedim(1, -1), alpha], dim=-1) for one in (made + 0.1, picture))
    batches = [one.repeat(count, *[1] * (one.ndim - 1)) for one, count in zip((new, old, hole[0]), counts, strict=True)]
    harmony = harmonizing.Harmony(mode)
    together, alone = (
        harmonizing.harmonize_pictures(*three, harmony) for three in (batches, [one[:1] for one in batches])
    )
    assert torch.equal(together, alone.expand(3, -1, -1, -1))


def test_pictures_that_do_not_go_together_are_named_as_on_the_node():
    picture, made, hole = scene(24)
    new, old = made.movedim(1, -1), picture.movedim(1, -1)
    with pytest.raises(ValueError, match=r"3 in 'image', 2 in 'original', 1 in 'mask'; each has to have 1 or 3\.$"):
        harmonizing.harmonize_pictures(new.repeat(3, 1, 1, 1), old.repeat(2, 1, 1, 1), hole)
    with pytest.raises(ValueError, match=r"^'image' is 24x24 pixels and 'original' 20x24: they have to be of one size"):
        harmonizing.harmonize_pictures(new, old[:, :, :20], hole)
    # A mask of two dimensions is one mask, not as many as it has rows.
    assert harmonizing.harmonize_pictures(new, old, hole[0, 0]).shape == old.shape


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="harmonize 'magic'; choose one of off, color, poisson, both"):
        harmonizing.Harmony("magic")


@pytest.mark.parametrize("size", [(7, 5), (48, 31), (200, 96)])
def test_a_mask_is_resized_without_new_grey_inside(size):
    mask = torch.zeros(1, 48, 48)
    mask[:, 12:36, 12:36] = 1.0
    resized = masks.resize_mask(mask, size)
    assert resized.shape == (1, 1, *size) and resized.min() >= 0 and resized.max() == 1.0
    rows = torch.linspace(0, 1, 2 * size[0] + 1)[1::2]
    columns = torch.linspace(0, 1, 2 * size[1] + 1)[1::2]
    inside = ((rows - 0.5).abs() < 0.25 - 1.1 / min(*size, 48))[:, None] & (
        (columns - 0.5).abs() < 0.25 - 1.1 / min(*size, 48)
    )
    assert (resized[0, 0][inside] == 1.0).all()
    assert torch.equal(masks.resize_mask(mask, (48, 48))[0], mask)
