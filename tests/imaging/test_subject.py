"""A subject on white: its box, its edge, and its place in the squares for CLIP and for the reference branch."""

from __future__ import annotations

import pytest
import torch

from devtools.pack import pack_module

subject = pack_module("imaging.subject")

pytestmark = pytest.mark.quick


def pictures(count: int = 1, size: tuple[int, int] = (20, 30), channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.8 * torch.rand(count, *size, channels, generator=generator)


def box_mask(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = (20, 30)) -> torch.Tensor:
    mask = torch.zeros(1, *size)
    mask[:, top:bottom, left:right] = 1.0
    return mask


def test_it_is_cut_to_its_mask_and_the_rest_is_white() -> None:
    scene, mask = pictures(), box_mask(3, 9, 10, 24)
    mask[0, 3, 10] = 0.0
    (cut,) = subject.cut_out(scene, mask)
    assert cut.shape == (6, 14, 3)
    expected = scene[0, 3:9, 10:24].clone()
    expected[0, 0] = 1.0
    assert torch.equal(cut, expected)


def test_gray_shows_through_and_noise_does_not_count() -> None:
    scene, mask = pictures(), box_mask(4, 8, 4, 8)
    mask[0, 4:8, 8] = 0.25
    mask[0, 0, 0] = 2 / 255
    (cut,) = subject.cut_out(scene, mask)
    assert cut.shape == (4, 5, 3)
    assert torch.allclose(cut[:, 4], 0.25 * scene[0, 4:8, 8] + 0.75)


def test_alpha_and_nothing_at_all() -> None:
    scene = pictures(channels=4)
    scene[..., 3] = box_mask(5, 6, 7, 8)
    (cut,) = subject.cut_out(scene)
    assert torch.equal(cut, scene[0, 5:6, 7:8, :3])
    # A mask counts before alpha.
    assert subject.cut_out(scene, box_mask(0, 2, 0, 3))[0].shape == (2, 3, 3)
    whole = pictures()
    assert torch.equal(subject.cut_out(whole)[0], whole[0])


def test_a_batch_with_one_mask_or_one_for_each_and_masks_of_other_sizes() -> None:
    scenes = pictures(2)
    one = subject.cut_out(scenes, box_mask(2, 8, 3, 9))
    each = subject.cut_out(scenes, torch.cat((box_mask(2, 8, 3, 9), box_mask(0, 20, 0, 30))))
    assert [cut.shape[:2] for cut in one] == [(6, 6), (6, 6)] and [cut.shape[:2] for cut in each] == [(6, 6), (20, 30)]
    assert torch.equal(one[0], each[0]) and torch.equal(each[1], scenes[1])
    # A mask that is resized has a soft edge.
    large = torch.nn.functional.interpolate(box_mask(2, 8, 3, 9)[None], scale_factor=4)[0]
    for cut, sharp in zip(subject.cut_out(scenes, large), one, strict=True):
        assert cut.shape == (8, 8, 3) and torch.allclose(cut[2:6, 2:6], sharp[1:5, 1:5])


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (50, 3), (60, 80), (500, 400), (51, 51)], ids=str)
def test_for_clip_it_lies_in_the_middle_of_white(size: tuple[int, int]) -> None:
    found = subject.for_clip(torch.zeros(*size, 3))
    assert found.shape == (224, 224, 3) and 0.0 <= float(found.min()) and float(found.max()) <= 1.0
    # Ink keeps its share of the square, and lies around its middle.
    side = round(1.02 * max(size))
    ink = (1.0 - found[..., 0]).double()
    assert float(ink.mean()) == pytest.approx(size[0] * size[1] / side**2, rel=0.05, abs=1e-3)
    for dim, own in ((0, size[0]), (1, size[1])):
        places = (torch.arange(224) + 0.5).double() / 224
        middle = float((ink.sum(dim=1 - dim) * places).sum() / ink.sum())
        assert middle == pytest.approx(((side - own) // 2 + own / 2) / side, abs=2e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (50, 3), (60, 80), (500, 400)], ids=str)
def test_for_the_branch_the_longer_side_fills_the_square(size: tuple[int, int]) -> None:
    found = subject.for_branch(torch.zeros(*size, 3), 64)
    assert found.shape == (64, 64, 3)
    ink = found[..., 0] < 0.5
    rows, columns = (int(ink.any(dim=dim).sum()) for dim in (1, 0))
    assert max(rows, columns) == 64
    assert min(rows, columns) == max(1, round(64 * min(size) / max(size)))
    assert bool(((found == 0.0) | (found == 1.0)).all())


def test_without_a_subject_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"^Picture 2 has no subject, since its mask is black: "):
        subject.cut_out(pictures(2), torch.cat((box_mask(0, 3, 0, 3), torch.zeros(1, 20, 30))))
    with pytest.raises(ValueError, match=r"^Picture 1 has no subject, since its alpha is 0 everywhere: "):
        subject.cut_out(torch.zeros(1, 8, 8, 4))
    with pytest.raises(ValueError, match=r"2 in 'image', 3 in 'mask'"):
        subject.cut_out(pictures(2), box_mask(0, 3, 0, 3).repeat(3, 1, 1))
