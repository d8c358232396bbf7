"""Cropping regions around holes and stitching them back. No host needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module
from truefill_testing.regions import one_sentence, sliced

pytestmark = pytest.mark.quick

region = pack_module("imaging.region")
masks = pack_module("imaging.masks")
plans = pack_module("imaging.region_plan")
Box, Settings = plans.Box, plans.RegionSettings


def random_pictures(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def mask_of(size: tuple[int, int], *holes: tuple[int, int, int, int] | None) -> torch.Tensor:
    mask = torch.zeros(len(holes), *size)
    for index, hole in enumerate(holes):
        if hole:
            left, top, right, bottom = hole
            mask[index, top:bottom, left:right] = 1.0
    return mask


@st.composite
def jobs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and masks: odd and one pixel wide sizes, empty, full, one-pixel, grey and scattered holes."""
    height, width = draw(st.integers(1, 33)), draw(st.integers(1, 33))
    counts = draw(st.sampled_from([(1, 1), (3, 1), (1, 3), (2, 2)]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for _ in range(counts[1]):
        noise = torch.rand(height, width, generator=generator)
        kind = draw(st.sampled_from(["empty", "full", "pixel", "corners", "sparse", "grey"]))
        mask = torch.zeros(height, width)
        if kind == "full":
            mask[:] = 1.0
        elif kind == "pixel":
            mask.view(-1)[noise.argmax()] = 1.0
        elif kind == "corners":
            mask[0, 0] = mask[-1, -1] = 1.0
        elif kind == "sparse":
            mask = (noise < 0.02).float()
        elif kind == "grey":
            # Above the noise, as after the door that every mask comes through.
            mask = torch.where(noise > 0.75, noise - 0.7, 0.0)
        masks.append(mask)
    pictures = random_pictures(counts[0], height, width, draw(st.sampled_from([3, 4])), seed)
    return pictures, torch.stack(masks)


tensor_rules = st.builds(
    Settings,
    native_size=st.sampled_from([16, 24, 4096]),
    context_percent=st.sampled_from([0, 50]),
    context_pixels=st.integers(0, 5),
    min_side=st.sampled_from([1, 9]),
    max_aspect=st.sampled_from([1, 2, 100]),
    max_upscale=st.sampled_from([1, 3]),
)


def padded(picture: np.ndarray, plan: Any) -> np.ndarray:
    """What numpy makes of the padding of a picture [H, W, ...], axis by axis."""
    top, bottom, left, right = plan.padding
    for axis, pad in enumerate(((top, bottom), (left, right))):
        widths = [(0, 0)] * picture.ndim
        widths[axis] = pad
        picture = np.pad(picture, widths, mode="reflect" if max(pad) < picture.shape[axis] else "edge")
    return picture


def inside(box: Any, plan: Any) -> tuple[slice, slice]:
    """Where a box lies in the padded picture."""
    top, left = box.top + plan.padding[0], box.left + plan.padding[2]
    return slice(top, top + box.height), slice(left, left + box.width)


@settings(max_examples=150, deadline=None)
@given(jobs(), tensor_rules)
def test_at_scale_one_a_crop_is_a_slice_of_its_own_picture_mirrored_beyond_the_border(job: Any, rule: Any) -> None:
    pictures, mask = job
    crops, crop_masks, made = region.crop(pictures, mask, rule)
    count = max(len(pictures), len(mask))
    assert crops.shape == (count, *made.plan.size, pictures.shape[-1])
    assert crop_masks.shape == (count, *made.plan.size)
    assert 0.0 <= crops.min() and crops.max() <= 1.0
    assert 0.0 <= crop_masks.min() and crop_masks.max() <= 1.0
    assume(made.plan.size == made.plan.box_size)
    for index, box in enumerate(made.plan.boxes):
        where = inside(box, made.plan)
        source = padded(pictures[index % len(pictures)].numpy(), made.plan)
        assert np.array_equal(crops[index].numpy(), source[where])
        assert np.array_equal(crop_masks[index].numpy(), padded(mask[index % len(mask)].numpy(), made.plan)[where])


@pytest.mark.parametrize(
    ("size", "kind"), [((20, 23), "reflect"), ((9, 13), "reflect"), ((8, 13), "edge"), ((1, 1), "edge")]
)
def test_padding_mirrors_as_numpy_does_and_repeats_the_edge_where_the_picture_is_too_small(
    size: tuple[int, int], kind: str
) -> None:
    pictures = random_pictures(1, *size)
    target = (size[0] + 16 - size[0] % 2, size[1] + 16 - size[1] % 2)
    rule = sliced(forced_size=tuple(math.ceil(side / 8) * 8 for side in target))
    crops, _, made = region.crop(pictures, torch.ones(1, *size), rule)
    top, bottom, left, right = made.plan.padding
    assert top >= 7 and right >= 7
    rows = np.pad(pictures[0].numpy(), ((top, bottom), (0, 0), (0, 0)), mode=kind)
    columns = "reflect" if max(left, right) < size[1] else "edge"
    assert np.array_equal(crops[0].numpy(), np.pad(rows, ((0, 0), (left, right), (0, 0)), mode=columns))


def test_a_hole_at_the_border_goes_on_in_the_padding() -> None:
    mask = mask_of((30, 30), (0, 0, 30, 4))
    _, crop_masks, made = region.crop(random_pictures(1, 30, 30), mask, sliced(forced_size=(40, 40)))
    assert made.plan.padding == (5, 5, 5, 5)
    # The mirror starts at row 0, which isn't repeated: rows 1 to 3 of the hole show up once more above it.
    assert crop_masks[0, :, 20].tolist() == [0.0] * 1 + [0.0] + [1.0] * 7 + [0.0] * 31


@settings(max_examples=100, deadline=None)
@given(jobs(), tensor_rules)
def test_the_whole_hole_is_in_the_crop(job: Any, rule: Any) -> None:
    pictures, mask = job
    _, crop_masks, made = region.crop(pictures, mask, rule)
    for index, box in enumerate(made.plan.boxes):
        own = mask[index % len(mask)].clone()
        assert bool(crop_masks[index].any()) == bool(own.any())
        own[max(0, box.top) : box.bottom, max(0, box.left) : box.right] = 0.0
        assert not own.any()


def test_the_hole_is_every_pixel_above_the_noise() -> None:
    mask = torch.full((1, 40, 40), 2 / 255)
    mask[0, 10, 12] = 3 / 255
    mask[0, 17, 35] = 1.0
    for context in (None, mask_of((40, 40), (20, 14, 21, 15))):
        _, _, made = region.crop(random_pictures(1, 40, 40), mask, sliced(), context)
        assert made.plan.boxes == (Box(12, 10, 36, 18),)


def test_mask_values_out_of_range_are_cut() -> None:
    mask = torch.full((1, 16, 16), -3.0)
    mask[:, 4:12, 4:12] = 7.0
    crop_masks, made = region.crop(random_pictures(1, 16, 16), mask, sliced(context_pixels=4))[1:]
    assert torch.equal(made.mask, mask_of((16, 16), (4, 4, 12, 12))) and torch.equal(crop_masks, made.mask)


def test_each_picture_of_a_batch_gets_the_region_around_its_own_hole() -> None:
    pictures = random_pictures(3, 40, 48)
    mask = mask_of((40, 48), (0, 0, 8, 8), None, (40, 30, 48, 38))
    crops, crop_masks, made = region.crop(pictures, mask, sliced())
    assert made.plan.boxes == (Box(0, 0, 8, 8), Box(20, 16, 28, 24), Box(40, 30, 48, 38))
    expected = [pictures[0, 0:8, 0:8], pictures[1, 16:24, 20:28], pictures[2, 30:38, 40:48]]
    assert torch.equal(crops, torch.stack(expected))
    assert crop_masks.flatten(1).sum(1).tolist() == [64.0, 0.0, 64.0]


def test_the_context_mask_widens_the_region_and_is_no_hole() -> None:
    pictures = random_pictures(1, 40, 48)
    mask = mask_of((40, 48), (8, 8, 12, 12), None)
    context = mask_of((40, 48), (24, 10, 32, 24))
    crops, crop_masks, made = region.crop(pictures, mask, sliced(), context)
    assert made.plan.boxes == (Box(8, 8, 32, 24), Box(16, 9, 40, 25))
    assert torch.equal(crops[0], pictures[0, 8:24, 8:32])
    assert crop_masks.flatten(1).sum(1).tolist() == [16.0, 0.0]
    each = region.crop(pictures, mask[:1], sliced(), torch.cat((context, mask[:1])))[2]
    assert len(each.plan.boxes) == 2 and each.plan.box_size == (16, 24)


@pytest.mark.parametrize("size", [(97, 101), (5, 3), (26, 14), (13, 8)])
def test_a_mask_of_another_size_is_stretched_and_keeps_its_hole(size: tuple[int, int]) -> None:
    pictures = random_pictures(1, 13, 7)
    pixel = torch.zeros(1, *size)
    pixel[0, 1, 2] = 1.0
    made = region.crop(pictures, pixel, sliced())[2]
    assert made.mask.shape == (1, 13, 7) and made.mask.any()
    left_half = torch.ones(1, 20, 40)
    left_half[:, :, 20:] = 0.0
    stretched = region.crop(random_pictures(1, 30, 60), left_half, sliced())[2].mask[0]
    assert (stretched[:, :28] == 1.0).all() and (stretched[:, 32:] == 0.0).all()
    assert torch.allclose(stretched + stretched.flip(1), torch.ones(30, 60))
    full = region.crop(pictures, torch.ones(1, *size), sliced())[2].mask
    assert (full == 1.0).all()


@pytest.mark.parametrize("native", [24, 96])
def test_a_resampled_mask_overshoots_nowhere(native: int) -> None:
    grey = mask_of((48, 48), (16, 16, 32, 32)) / 2
    rule = sliced(native_size=native, context_pixels=16, max_upscale=2)
    crop_masks = region.crop(random_pictures(1, 48, 48), grey, rule)[1]
    assert crop_masks.shape == (1, native, native)
    assert crop_masks.max() == pytest.approx(0.5, abs=1e-6)


def test_a_full_mask_stays_full_however_it_is_resampled() -> None:
    for native in (16, 24, 40, 104):
        _, crop_masks, made = region.crop(
            random_pictures(1, 50, 50), torch.ones(1, 50, 50), sliced(native_size=native, max_upscale=9)
        )
        assert made.plan.size == (native, native)
        assert (crop_masks == 1.0).all()


@settings(max_examples=150, deadline=None)
@given(jobs(), st.integers(0, 5), st.sampled_from([1, 2, 100]))
def test_crop_then_stitch_is_the_identity_at_scale_one(job: Any, context: int, aspect: float) -> None:
    pictures, mask = job
    crops, _, made = region.crop(pictures, mask, sliced(context_pixels=context, max_aspect=aspect))
    assert made.plan.scale == (1, 1)
    assert torch.equal(region.stitch(made, crops), pictures.expand(len(crops), -1, -1, -1))


@settings(max_examples=150, deadline=None)
@given(jobs(), tensor_rules, st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
def test_outside_the_mask_nothing_changes_whatever_comes_back(
    job: Any, rule: Any, times: int, height: int, width: int
) -> None:
    pictures, mask = job
    crops, _, made = region.crop(pictures, mask, rule)
    new = random_pictures(times * len(crops), height, width, seed=1)
    result = region.stitch(made, new)
    assert result.shape == (len(new), *pictures.shape[1:]) and result.dtype == pictures.dtype
    assert 0.0 <= result.min() and result.max() <= 1.0
    for index, picture in enumerate(result):
        known = mask[index % len(mask)] == 0.0
        assert torch.equal(picture[known], pictures[index % len(pictures)][known])


def on_canvas(box: Any, new: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [h, w, C] of a box in a picture of another size, and whether each pixel of that picture [H, W] is one."""
    # A canvas as large as everything, so that no offset has to be cut off.
    canvas, covered = torch.zeros(200, 200, new.shape[-1]), torch.zeros(200, 200, dtype=torch.bool)
    canvas[80 + box.top : 80 + box.bottom, 80 + box.left : 80 + box.right] = new
    covered[80 + box.top : 80 + box.bottom, 80 + box.left : 80 + box.right] = True
    picture = slice(80, 80 + size[0]), slice(80, 80 + size[1])
    return canvas[picture], covered[picture]


@settings(max_examples=150, deadline=None)
@given(jobs(), st.integers(0, 5), st.integers(1, 3))
def test_inside_the_mask_the_new_pixels_come_to_their_own_place(job: Any, context: int, times: int) -> None:
    pictures, mask = job
    crops, _, made = region.crop(pictures, mask, sliced(context_pixels=context))
    new = random_pictures(times * len(crops), *made.plan.size, pictures.shape[-1], seed=1)
    for index, picture in enumerate(region.stitch(made, new)):
        old, weight = pictures[index % len(pictures)], mask[index % len(mask)][..., None]
        box = made.plan.boxes[index % len(crops)]
        placed, _ = on_canvas(box, new[index], old.shape[:2])
        assert torch.allclose(picture, old * (1 - weight) + placed * weight, atol=1e-6)
        hole = weight[..., 0] == 1.0
        assert torch.equal(picture[hole], placed[hole])


@settings(max_examples=150, deadline=None)
@given(jobs(), st.integers(0, 5), st.integers(1, 3))
def test_placing_covers_the_whole_box_whatever_the_mask_and_nothing_else(job: Any, context: int, times: int) -> None:
    pictures, mask = job
    crops, _, made = region.crop(pictures, mask, sliced(context_pixels=context))
    new = random_pictures(times * len(crops), *made.plan.size, pictures.shape[-1], seed=1)
    result = region.place(made, new)
    assert result.shape == (len(new), *pictures.shape[1:])
    for index, picture in enumerate(result):
        box = made.plan.boxes[index % len(crops)]
        placed, covered = on_canvas(box, new[index], picture.shape[:2])
        assert torch.equal(picture[covered], placed[covered])
        assert torch.equal(picture[~covered], pictures[index % len(pictures)][~covered])


def test_what_is_placed_gets_the_size_of_the_box_and_the_type_of_the_original() -> None:
    pictures = random_pictures(1, 40, 48).half()
    made = region.crop(pictures, mask_of((40, 48), (16, 8, 40, 24)), sliced())[2]
    for size in ((7, 9), (16, 24), (64, 96)):
        result = region.place(made, torch.full((1, *size, 3), 0.25, dtype=torch.float64))
        assert result.dtype == torch.float16 and (result[:, 8:24, 16:40] == 0.25).all()
        result[:, 8:24, 16:40] = pictures[:, 8:24, 16:40]
        assert torch.equal(result, pictures)


def test_placing_writes_to_nothing_that_it_was_given() -> None:
    pictures, new = random_pictures(1, 8, 8), random_pictures(1, 8, 8, seed=1)
    made = region.crop(pictures, torch.ones(1, 8, 8), sliced())[2]
    given_values = [pictures.clone(), new.clone()]
    region.place(made, new).fill_(0.5)
    assert torch.equal(pictures, given_values[0]) and torch.equal(new, given_values[1])


def test_repeated_results_belong_to_the_crops_in_the_order_of_the_batch() -> None:
    pictures = random_pictures(2, 16, 16)
    mask = mask_of((16, 16), (0, 0, 8, 8), (8, 8, 16, 16))
    made = region.crop(pictures, mask, sliced())[2]
    new = torch.stack([torch.full((8, 8, 3), value) for value in (0.1, 0.2, 0.3, 0.4)])
    result = region.stitch(made, new)
    for index, corner in enumerate([result[0, :8, :8], result[1, 8:, 8:], result[2, :8, :8], result[3, 8:, 8:]]):
        assert torch.equal(corner, new[index])
    assert torch.equal(result[2, 8:], pictures[0, 8:]) and torch.equal(result[3, :8], pictures[1, :8])


def test_one_original_takes_any_number_of_results() -> None:
    made = region.crop(random_pictures(1, 16, 16), mask_of((16, 16), (4, 4, 12, 12)), sliced())[2]
    new = random_pictures(5, 8, 8, seed=1)
    assert torch.equal(region.stitch(made, new)[:, 4:12, 4:12], new)


@pytest.mark.parametrize(("old", "new"), [(3, 3), (3, 4), (4, 3), (4, 4)])
def test_alpha_is_carried_along_and_never_invented(old: int, new: int) -> None:
    pictures = random_pictures(1, 16, 16, old)
    crops, _, made = region.crop(pictures, mask_of((16, 16), (4, 4, 12, 12)), sliced())
    assert torch.equal(crops, pictures[:, 4:12, 4:12])
    made_of_it = random_pictures(1, 8, 8, new, seed=1)
    result = region.stitch(made, made_of_it)
    assert result.shape == pictures.shape
    assert torch.equal(result[:, 4:12, 4:12, :3], made_of_it[..., :3])
    if old == 4:
        expected = made_of_it if new == 4 else pictures[:, 4:12, 4:12]
        assert torch.equal(result[:, 4:12, 4:12, 3], expected[..., 3])
        assert torch.equal(result[:, :4, :, 3], pictures[:, :4, :, 3])


def test_nothing_given_is_written_to_and_nothing_returned_shares_its_memory() -> None:
    pictures, mask, new = (
        random_pictures(1, 16, 16),
        mask_of((16, 16), (4, 4, 12, 12)),
        random_pictures(1, 8, 8, seed=1),
    )
    given_values = [tensor.clone() for tensor in (pictures, mask, new)]
    crops, crop_masks, made = region.crop(pictures, mask, sliced())
    result = region.stitch(made, new)
    assert made.picture is pictures
    for own in (crops, crop_masks, made.mask, result):
        own.fill_(0.5)
    for tensor, value in zip((pictures, mask, new), given_values, strict=True):
        assert torch.equal(tensor, value)


def test_the_region_cannot_be_changed() -> None:
    made = region.crop(random_pictures(1, 16, 16), mask_of((16, 16), (4, 4, 12, 12)), sliced())[2]
    with pytest.raises(AttributeError):
        made.plan = None
    with pytest.raises(AttributeError):
        made.plan.size = (8, 8)


def test_half_precision_is_kept() -> None:
    pictures = random_pictures(1, 20, 20).half()
    crops, crop_masks, made = region.crop(
        pictures, mask_of((20, 20), (4, 4, 12, 12)), sliced(native_size=16, max_upscale=2)
    )
    assert made.plan.scale == (2, 2)
    assert crops.dtype == torch.float16 and crop_masks.dtype == torch.float32
    result = region.stitch(made, torch.zeros(1, 16, 16, 3))
    assert result.dtype == torch.float16
    assert torch.equal(result[:, :4], pictures[:, :4]) and not result[:, 4:12, 4:12].any()


def ramps(size: int) -> torch.Tensor:
    """Every pixel holds the position of its centre, in parts of the side: x in the first channel, y in the second."""
    position = (torch.arange(size) + 0.5) / size
    x, y = position.expand(size, size), position[:, None].expand(size, size)
    return torch.stack((x, y, torch.zeros(size, size)), -1)[None]


@pytest.mark.parametrize("native", [24, 32, 40, 64, 96, 120, 144])
def test_resampling_moves_nothing(native: int) -> None:
    size = 80
    mask = mask_of((size, size), (16, 8, 64, 56))
    crops, _, made = region.crop(ramps(size), mask, sliced(native_size=native, max_upscale=4))
    assert made.plan.boxes == (Box(16, 8, 64, 56),) and made.plan.size == (native, native)
    step = 48 / native
    centres = (torch.arange(native) + 0.5) * step
    # In pixels of the picture. Only the last few pixels of a line may see its end.
    inner = slice(max(2, native // 8), -max(2, native // 8))
    off_x = (crops[0, :, :, 0] * size - (16 + centres)).abs()
    off_y = (crops[0, :, :, 1] * size - (8 + centres)[:, None]).abs()
    for off in (off_x, off_y):
        assert off[inner, inner].max() < 0.03
        assert off.max() < 0.3
    back = region.stitch(made, crops)
    assert (back - ramps(size))[0, 16:48, 24:56].abs().max() * size < 0.06


@pytest.mark.parametrize("native", [24, 32, 40, 64, 88, 136])
def test_a_centred_dot_stays_centred(native: int) -> None:
    size = 51
    pictures = torch.zeros(1, size, size, 3)
    pictures[:, 24:27, 24:27] = 0.5
    crops, _, made = region.crop(pictures, torch.ones(1, size, size), sliced(native_size=native, max_upscale=4))
    assert made.plan.boxes == (Box(0, 0, size, size),) and made.plan.size == (native, native)
    back = region.stitch(made, crops)
    for picture in (crops[0, ..., 0], back[0, ..., 0]):
        position = (torch.arange(len(picture)) + 0.5) / len(picture)
        for axis in (0, 1):
            weight = picture.sum(axis)
            assert abs(float((weight * position).sum() / weight.sum()) - 0.5) * size < 1e-3


def test_a_result_of_another_size_comes_back_to_the_same_place() -> None:
    made = region.crop(ramps(80), mask_of((80, 80), (16, 8, 64, 56)), sliced())[2]
    for size in (40, 47, 96, 200):
        centres = (torch.arange(size) + 0.5) * 48 / size
        new = torch.zeros(1, size, size, 3)
        new[..., 0] = (16 + centres) / 80
        new[..., 1] = ((8 + centres) / 80)[:, None]
        back = region.stitch(made, new)
        assert (back - ramps(80))[0, 16:48, 24:56].abs().max() * 80 < 0.06


def test_reducing_averages_and_enlarging_stays_in_range() -> None:
    checkered = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float()[None, ..., None].expand(1, 64, 64, 3)
    crops, _, _ = region.crop(checkered, torch.ones(1, 64, 64), sliced(native_size=16))
    # Without anti-aliasing every crop pixel would be black or white.
    assert (crops[0, 2:-2, 2:-2] - 0.5).abs().max() < 0.02
    enlarged, _, _ = region.crop(checkered, torch.ones(1, 64, 64), sliced(native_size=128, max_upscale=2))
    assert enlarged.min() >= 0.0 and enlarged.max() <= 1.0


NAN = torch.full((1, 8, 8, 3), float("nan"))


@pytest.mark.parametrize(
    ("pictures", "mask", "context", "message"),
    [
        (torch.zeros(8, 8, 3), torch.ones(1, 8, 8), None, r"'image'.*\[8, 8, 3\].*\[B, H, W, C\]"),
        (torch.zeros(1, 8, 8, 2), torch.ones(1, 8, 8), None, r"'image'.*\[1, 8, 8, 2\].*3 or 4 channels"),
        (torch.zeros(0, 8, 8, 3), torch.ones(1, 8, 8), None, r"'image'.*\[0, 8, 8, 3\]"),
        (torch.zeros(1, 0, 8, 3), torch.ones(1, 8, 8), None, r"'image'.*\[1, 0, 8, 3\]"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.ones(1, 8, 8), None, r"'image'.*uint8.*floating point"),
        (NAN, torch.ones(1, 8, 8), None, r"'image'.*NaN"),
        (torch.zeros(1, 8, 8, 3), torch.ones(1, 0, 8), None, r"mask.*\[1, 1, 0, 8\]"),
        (torch.zeros(1, 8, 8, 3), NAN[..., 0], None, r"'mask'.*NaN"),
        (torch.zeros(1, 8, 8, 3), torch.ones(1, 8, 8), NAN[..., 0], r"'context_mask'.*NaN"),
        (torch.zeros(2, 8, 8, 3), torch.ones(3, 8, 8), None, r"2 in 'image', 3 in 'mask'; each has to have 1 or 3\.$"),
        (
            torch.zeros(1, 8, 8, 3),
            torch.ones(2, 8, 8),
            torch.ones(3, 8, 8),
            r"1 in 'image', 2 in 'mask', 3 in 'context_mask'; each has to have 1 or 3\.$",
        ),
    ],
)
def test_what_cannot_be_cropped_is_refused_in_one_sentence(
    pictures: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        region.crop(pictures, mask, Settings(), context)
    assert one_sentence(refused)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (torch.zeros(3, 8, 8, 3), r"batch of 3.*2 crops.*batch of 2.*or of a multiple"),
        (torch.zeros(1, 8, 8, 3), r"batch of 1.*2 crops"),
        (torch.zeros(0, 8, 8, 3), r"new picture.*\[0, 8, 8, 3\]"),
        (torch.zeros(8, 8, 3), r"new picture.*\[8, 8, 3\]"),
        (NAN, r"new picture.*NaN"),
    ],
)
def test_what_cannot_be_stitched_is_refused_in_one_sentence(new: torch.Tensor, message: str) -> None:
    made = region.crop(random_pictures(2, 8, 8), torch.ones(1, 8, 8), sliced())[2]
    with pytest.raises(ValueError, match=message) as refused:
        region.stitch(made, new)
    assert one_sentence(refused)


@pytest.mark.parametrize("feather", [-1.0, math.nan, math.inf])
def test_a_senseless_feather_is_refused_by_its_own_name(feather: float) -> None:
    with pytest.raises(ValueError, match=rf"^feather is {feather}, but must be 0 or more, and finite") as refused:
        region.crop(random_pictures(1, 8, 8), torch.ones(1, 8, 8), Settings(), feather=feather)
    assert one_sentence(refused)


def test_a_mask_of_two_dimensions_is_one_mask() -> None:
    pictures, mask, context = random_pictures(1, 30, 20), mask_of((30, 20), (4, 6, 12, 14)), torch.zeros(1, 30, 20)
    expected = region.crop(pictures, mask, sliced(), context)
    for part, same in zip(region.crop(pictures, mask[0], sliced(), context[0])[:2], expected[:2], strict=True):
        assert torch.equal(part, same)


GREY_HOLE, WHITE_HOLE = (8, 10, 24, 26), (44, 40, 56, 50)


def grey_and_white(grey: float, white: bool, background: float = 0.0) -> torch.Tensor:
    mask = torch.full((1, 60, 64), background)
    left, top, right, bottom = GREY_HOLE
    mask[0, top:bottom, left:right] = grey
    if white:
        mask = torch.maximum(mask, mask_of((60, 64), WHITE_HOLE))
    return mask


@pytest.mark.parametrize("background", [0.0, 1 / 255, 2 / 255])
@pytest.mark.parametrize("white", [False, True], ids=["alone", "beside a white hole"])
@pytest.mark.parametrize("grey", [3 / 255, 0.25, 0.498, 0.5, 0.502])
def test_without_a_feather_grey_is_the_weight_of_the_new_and_with_one_all_of_the_hole_is_new(
    grey: float, white: bool, background: float
) -> None:
    pictures, mask = random_pictures(1, 60, 64), grey_and_white(grey, white, background)
    left, top, right, bottom = GREY_HOLE
    here, around = np.s_[0, top:bottom, left:right], np.s_[0, top - 6 : bottom + 6, left - 6 : right + 6]
    for feather, weight in ((0.0, grey), (6.0, 1.0)):
        crops, crop_masks, made = region.crop(pictures, mask, sliced(context_pixels=8), feather=feather)
        result, changed = region.stitch(made, 1.0 - crops), region.may_change(made, 1)
        expected = torch.lerp(pictures, 1.0 - pictures, weight)
        torch.testing.assert_close(result[here], expected[here])
        reach = made.mask[0, : bottom + 8, : right + 8]
        assert reach.max() == pytest.approx(weight) and (changed[here] == 1).all()
        # Nothing but the hole and its edge, whatever the background is.
        kept = torch.ones(1, 60, 64, dtype=torch.bool)
        kept[around if feather else here] = False
        kept[:, WHITE_HOLE[1] - 6 : WHITE_HOLE[3] + 6, WHITE_HOLE[0] - 6 : WHITE_HOLE[2] + 6] = False
        assert torch.equal(result[kept], pictures[kept]) and not changed[kept].any()
        assert (crop_masks > 0).any() and made.plan.boxes[0].left <= left - (8 if not white else 0)


@settings(max_examples=100, deadline=None)
@given(
    jobs(), tensor_rules, st.sampled_from([0.0, 0.5, 3.0, 12.0]), st.integers(1, 2), st.sampled_from(["off", "both"])
)
def test_what_may_change_is_all_that_changes(job: Any, rule: Any, feather: float, times: int, harmonize: str) -> None:
    pictures, mask = job
    crops, crop_masks, made = region.crop(pictures, mask, rule, feather=feather)
    new = random_pictures(times * len(crops), *made.plan.size, seed=1)
    changed = region.may_change(made, len(new))
    assert torch.equal(masks.as_mask_batch(made.mask)[:, 0], made.mask)
    assert changed.shape == (len(new), *pictures.shape[1:3]) and set(changed.unique().tolist()) <= {0.0, 1.0}
    result = region.stitch(made, new, region.Harmony(harmonize))
    for index, picture in enumerate(result):
        kept, before = changed[index] == 0, pictures[index % len(pictures)]
        assert torch.equal(picture[kept], before[kept])
        assert (changed[index][mask[index % len(mask)] > 0] == 1).all()
    assert torch.equal(crop_masks.flatten(1).any(1), changed[: len(crops)].flatten(1).any(1))


def test_the_box_of_a_hole_may_be_hole_as_well() -> None:
    """Each picture's own box, before the soft edge; an empty mask stays empty; what is outside comes back bit for bit."""
    pictures = random_pictures(2, 60, 80)
    mask = torch.zeros(2, 60, 80)
    mask[0, 20, 30:50], mask[0, 20:40, 49] = 1.0, 0.5
    settings = Settings(native_size=64, context_pixels=8)
    crops, masks_of_crops, taken = region.crop(pictures, mask, settings, fill_box=True)
    expected = mask_of((60, 80), (30, 20, 50, 40), None)
    assert torch.equal(taken.mask, expected)
    assert taken.plan == region.crop(pictures, mask, settings)[2].plan
    assert masks_of_crops[0].sum() > 0 and masks_of_crops[1].sum() == 0
    stitched = region.stitch(taken, 1.0 - crops)
    known = expected == 0
    assert torch.equal(stitched[known], pictures[known]) and not torch.equal(stitched, pictures)
    soft = region.crop(pictures, mask, settings, feather=6.0, fill_box=True)[2].mask
    assert torch.equal(soft == 1.0, expected == 1.0) and (soft > 0).sum() > expected.sum()
