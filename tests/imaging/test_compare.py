"""Heat map and figures of what changed, against a plain loop over pixels."""

from __future__ import annotations

import pytest
import torch

from devtools.pack import pack_module

pytestmark = pytest.mark.quick

comparing = pack_module("imaging.compare")
compare, heat_map = comparing.compare, comparing.heat_map


def luminance(colours: torch.Tensor) -> torch.Tensor:
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return linear @ torch.tensor([0.2126, 0.7152, 0.0722])


def eight_bit(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape).float() / 255


def counted(before: torch.Tensor, after: torch.Tensor, inside: torch.Tensor | None, where: bool) -> tuple:
    """Pixels, changed ones, largest and mean difference of two pictures [H, W, C] where the mask [H, W] is `where`."""
    levels = []
    for y in range(before.shape[0]):
        for x in range(before.shape[1]):
            if inside is None or bool(inside[y, x] > 0) == where:
                pairs = zip(before[y, x].tolist(), after[y, x].tolist(), strict=True)
                levels.append(max(255 * abs(a - b) for a, b in pairs))
    return len(levels), sum(level > 0 for level in levels), max(levels, default=0), sum(levels) / max(len(levels), 1)


def same(extent, expected: tuple) -> bool:
    assert (extent.pixels, extent.changed) == expected[:2]
    return (extent.maximum, extent.mean) == pytest.approx(expected[2:], abs=1e-4)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_figures_are_those_of_a_loop_over_pixels(channels: int, masked: bool) -> None:
    before = eight_bit(3, 7, 9, channels)
    after = torch.where(torch.rand(3, 7, 9, 1) < 0.4, eight_bit(3, 7, 9, channels), before)
    mask = torch.where(torch.rand(3, 7, 9) < 0.5, torch.rand(3, 7, 9), 0.0) if masked else None
    heat, figures = compare(before, after, mask)
    assert heat.shape == (3, 7, 9, 3)
    for index, found in enumerate(figures):
        part = None if mask is None else mask[index]
        assert same(found.outside, counted(before[index], after[index], part, False))
        if mask is None:
            assert found.inside is None
        else:
            assert same(found.inside, counted(before[index], after[index], part, True))
        different = (before[index] != after[index]).any(dim=-1)
        assert torch.equal(heat[index].amax(dim=-1) > 0, different)


def test_the_heat_map_is_of_the_channel_that_differs_most() -> None:
    before = eight_bit(1, 6, 5, 4)
    after = eight_bit(1, 6, 5, 4)
    heat, _ = compare(before, after)
    for y in range(6):
        for x in range(5):
            level = 255 * (before - after)[0, y, x].abs().max()
            torch.testing.assert_close(heat[0, y, x], heat_map(level), atol=1e-4, rtol=0)


def test_no_difference_is_black_and_the_smallest_is_seen() -> None:
    colours = heat_map(torch.tensor([0.0, 1e-6, 1.0, 3.0, 15.0, 63.0, 255.0, 400.0]))
    assert colours.dtype == torch.float32
    assert torch.equal(colours[0], torch.zeros(3))
    # A contrast of 1.7 to black, and violet.
    assert luminance(colours[1]) > 0.035
    assert colours[1, 2] > colours[1, 0] > colours[1, 1]
    for place, ramp in ((3, 1), (4, 2), (5, 3), (6, 4), (7, 4)):
        torch.testing.assert_close(colours[place], torch.tensor(comparing.RAMP[ramp]) / 255)


def test_a_larger_difference_is_lighter() -> None:
    levels = torch.arange(256.0)
    colours = heat_map(levels)
    assert (luminance(colours).diff() > 0).all()
    assert colours.min() >= 0 and colours.max() <= 1
    # Neighbours differ by steps that get smaller, so that small differences can be told apart.
    assert (colours[1] - colours[2]).abs().max() > 8 / 255


def test_a_single_pixel_of_one_level_counts() -> None:
    before = torch.full((1, 40, 30, 3), 100 / 255)
    after = before.clone()
    after[0, 17, 4, 1] = 101 / 255
    mask = torch.zeros(1, 40, 30)
    mask[:, 20:] = 1
    heat, (found,) = compare(before, after, mask)
    assert (found.outside.pixels, found.outside.changed) == (600, 1)
    assert found.outside.maximum == pytest.approx(1, abs=1e-4)
    assert found.outside.mean == pytest.approx(1 / 600, abs=1e-6)
    assert str(found) == (
        "Outside the mask: 1 of 600 pixels changed (0.167 %), max 1, mean <0.01 levels.\n"
        "Inside the mask: none of 600 pixels changed."
    )
    assert torch.nonzero(heat.amax(dim=-1)).tolist() == [[0, 17, 4]]


def test_less_than_a_level_is_a_difference_too() -> None:
    before = torch.full((1, 2, 3, 3), 0.5)
    heat, (found,) = compare(before, before + 1e-6)
    assert str(found) == "Whole picture: 6 of 6 pixels changed (100 %), max <0.01, mean <0.01 levels."
    assert (heat.amax(dim=-1) > 0.3).all()


def test_equal_pictures_and_masks_of_everything_or_nothing() -> None:
    picture = eight_bit(1, 5, 8, 3)
    heat, (found,) = compare(picture, picture.clone())
    assert not heat.any()
    assert str(found) == "Whole picture: none of 40 pixels changed."
    full = compare(picture, 1 - picture, torch.ones(5, 8))[1][0]
    assert (full.outside.pixels, full.outside.mean, full.inside.pixels) == (0, 0, 40)
    assert str(full).startswith("Outside the mask: no pixels.\nInside the mask: ")
    empty = compare(picture, 1 - picture, torch.zeros(5, 8))[1][0]
    assert (empty.outside.pixels, empty.inside.pixels) == (40, 0)


@pytest.mark.parametrize(("value", "text"), [(1e-9, "<0.01"), (0.0104, "0.0104"), (38.44, "38.4"), (254.99999, "255")])
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert comparing._number(value) == text


def test_a_picture_without_alpha_is_opaque() -> None:
    colours = eight_bit(1, 4, 4, 3)
    opaque = torch.cat([colours, torch.ones(1, 4, 4, 1)], dim=-1)
    clear = torch.cat([colours, torch.zeros(1, 4, 4, 1)], dim=-1)
    for one, other in ((colours, opaque), (opaque, colours)):
        assert compare(one, other)[1][0].outside.changed == 0
    assert compare(colours, clear)[1][0].outside.maximum == pytest.approx(255)


def test_values_are_compared_as_they_are_seen() -> None:
    before = torch.tensor([2.0, -1.0, float("nan"), float("inf")])[None, None, :, None].expand(1, 1, 4, 3)
    after = torch.tensor([1.0, 0.0, 0.0, 1.0])[None, None, :, None].expand(1, 1, 4, 3)
    assert compare(before, after)[1][0].outside.changed == 0
    assert compare(before.half(), 1 - after)[1][0].outside.mean == pytest.approx(255)


@pytest.mark.parametrize(("before", "after", "masks"), [(1, 3, 1), (3, 1, 3), (1, 1, 3), (3, 3, 1)])
def test_one_goes_with_every_other(before: int, after: int, masks: int) -> None:
    old, new, mask = eight_bit(before, 6, 6, 3), eight_bit(after, 6, 6, 3), (torch.rand(masks, 6, 6) < 0.5).float()
    copies = old.clone(), new.clone(), mask.clone()
    heat, figures = compare(old, new, mask)
    repeated = [part.expand(3, *part.shape[1:]) for part in (old, new, mask)]
    for index in range(3):
        alone, (expected,) = compare(*(part[index : index + 1] for part in repeated))
        assert torch.equal(heat[index : index + 1], alone)
        assert figures[index] == expected
    assert all(torch.equal(one, other) for one, other in zip((old, new, mask), copies, strict=True))


def test_noise_in_the_mask_is_outside_and_spoken_of() -> None:
    before, after = torch.zeros(3, 12, 12, 3), torch.ones(3, 12, 12, 3)
    mask = torch.full((3, 12, 12), 1 / 255)
    mask[0] = 0.0
    mask[:2, 2:5, 2:6] = 3 / 255
    clean, noisy, vanished = compare(before, after, mask)[1]
    assert [found.inside.pixels for found in (clean, noisy, vanished)] == [12, 12, 0]
    assert str(clean).count("\n") == 1
    assert str(noisy).splitlines()[2].startswith("The mask has a background that is mostly not black")
    assert str(vanished).splitlines()[2].startswith("The mask is not black, but nothing in it is above 2/255")
    # One mask of two dimensions for all pictures.
    assert [found.inside.pixels for found in compare(before, after, mask[0])[1]] == [12, 12, 12]


def test_a_mask_of_another_size_is_resized_and_grey_counts() -> None:
    before, after = torch.zeros(1, 40, 60, 3), torch.ones(1, 40, 60, 3)
    mask = torch.zeros(1, 20, 30)
    mask[:, :10] = 0.2
    found = compare(before, after, mask)[1][0]
    assert found.inside.pixels == pytest.approx(1200, abs=61)
    assert found.inside.pixels + found.outside.pixels == 2400


@pytest.mark.parametrize(
    ("before", "after", "mask", "message"),
    [
        ((1, 8, 9, 3), (1, 8, 10, 3), None, r"'before' is 9x8 pixels and 'after' 10x8: they have to be of one size"),
        ((2, 8, 9, 3), (3, 8, 9, 3), None, r"2 in 'before', 3 in 'after'; each has to have 1 or 3\."),
        ((1, 8, 9, 3), (4, 8, 9, 3), (2, 8, 9), r"1 in 'before', 4 in 'after', 2 in 'mask'; each has to have 1 or 4\."),
        ((1, 8, 9, 2), (1, 8, 9, 3), None, r"'before' has the shape \[1, 8, 9, 2\]"),
        ((1, 8, 9, 3), (8, 9, 3), None, r"'after' has the shape \[8, 9, 3\]"),
        ((1, 8, 9, 3), (0, 8, 9, 3), None, r"'after' has the shape \[0, 8, 9, 3\]"),
        ((1, 8, 9, 3), (1, 8, 9, 3), (0, 8, 9), r"The mask is empty"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_sentence(before, after, mask, message) -> None:
    with pytest.raises(ValueError, match=message) as failed:
        compare(torch.zeros(before), torch.zeros(after), None if mask is None else torch.ones(mask))
    assert "\n" not in str(failed.value)
