"""DreamMix's training masks: the curves themselves, how far they reach, and what is always inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from devtools.pack import pack_module
from truefill_testing.regions import one_sentence

pytestmark = pytest.mark.quick

bezier = pack_module("imaging.bezier_masks")


def block(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    mask = torch.zeros(size)
    mask[top:bottom, left:right] = 1.0
    return mask


def reach(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, the last two exclusive."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def still(monkeypatch: pytest.MonkeyPatch, tenths: int) -> None:
    """One extension and no jitter."""
    monkeypatch.setattr(bezier, "EXTENSIONS", (tenths, tenths))
    monkeypatch.setattr(bezier, "JITTER", (0, 0))


@st.composite
def subjects(draw: st.DrawFn) -> torch.Tensor:
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    mask = (torch.rand(height, width, generator=generator) < draw(st.sampled_from([0.01, 0.3, 1.0]))).float()
    mask[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = draw(st.sampled_from([0.02, 0.5, 1.0]))
    return mask


@settings(max_examples=60, deadline=None)
@given(subjects(), st.integers(1, 3), st.integers(0, 2**64 - 1))
def test_every_mask_holds_the_subject_and_the_same_seed_draws_the_same(mask, count, seed) -> None:
    before = mask.clone()
    made = bezier.bezier_masks(mask, count, seed)
    assert made.shape == (count, *mask.shape) and made.dtype == torch.float32
    assert set(made.unique().tolist()) <= {0.0, 1.0}
    assert (made[:, mask > 0] == 1).all()
    assert torch.equal(mask, before)
    assert torch.equal(bezier.bezier_masks(mask, count + 1, seed)[:count], made)


def test_other_seeds_and_places_draw_other_masks() -> None:
    mask = block((200, 260), 80, 60, 150, 120)
    made = torch.cat([bezier.bezier_masks(mask, 5, seed) for seed in range(6)])
    assert len({of.numpy().tobytes() for of in made}) == 30


def test_the_curves_are_quadratic_beziers_from_corner_to_corner(monkeypatch) -> None:
    """Against de Casteljau and a ray for each pixel; the left and the lower control point are held by the picture's border."""
    still(monkeypatch, 8)
    left, top, right, bottom, width, height = 30, 60, 110, 130, 240, 150
    outline = []
    for start, control, end in [
        ((30, 60), (70, 60 - 0.8 * 70), (110, 60)),
        ((110, 60), (110 + 0.8 * 80, 95), (110, 130)),
        ((110, 130), (70, 150), (30, 130)),
        ((30, 130), (0, 95), (30, 60)),
    ]:
        for number in range(1, 20):
            t = number * 0.05
            first = [a + t * (b - a) for a, b in zip(start, control, strict=True)]
            second = [a + t * (b - a) for a, b in zip(control, end, strict=True)]
            outline.append([a + t * (b - a) for a, b in zip(first, second, strict=True)])
    expected = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            crossings = 0
            for (x0, y0), (x1, y1) in zip(outline, outline[1:] + outline[:1], strict=True):
                if (y0 <= y + 0.5) != (y1 <= y + 0.5):
                    crossings += x0 + (y + 0.5 - y0) / (y1 - y0) * (x1 - x0) > x + 0.5
            expected[y, x] = crossings % 2
    expected[top:bottom, left:right] = True
    made = bezier.bezier_masks(block((height, width), left, top, right, bottom), 1, 0)[0].numpy() > 0
    # How a polygon's outermost pixels are rounded is Pillow's.
    square = np.ones((3, 3))
    sure = ndimage.binary_dilation(expected, square) == ndimage.binary_erosion(expected, square)
    assert sure.mean() > 0.95 and np.array_equal(made[sure], expected[sure])


def test_sides_bulge_by_half_of_a_random_tenth_of_the_box(monkeypatch) -> None:
    monkeypatch.setattr(bezier, "JITTER", (0, 0))
    made = bezier.bezier_masks(block((400, 700), 300, 150, 500, 250), 150, seed=1)
    tenths = set()
    for mask in made:
        left, top, right, bottom = reach(mask)
        extension = round((300 - left) / 200 * 20)
        tenths.add(extension)
        # Outermost pixels, on either side.
        expected = (300 - 10 * extension, 150 - 5 * extension, 500 + 10 * extension, 250 + 5 * extension)
        assert np.abs(np.subtract((left, top, right, bottom), expected)).max() <= 1
    assert tenths == set(range(1, 11))


def test_points_tremble_by_up_to_twenty_pixels_of_a_picture_of_1024(monkeypatch) -> None:
    monkeypatch.setattr(bezier, "EXTENSIONS", (0, 0))
    farthest = {}
    for side in (256, 512):
        box = (side // 4, side // 4, side // 2, side // 2)
        # The longer side counts.
        made = bezier.bezier_masks(block((side, 9 * side // 16), *box), 120, seed=3)
        sides = np.array([(box[0] - of[0], box[1] - of[1], of[2] - box[2], of[3] - box[3]) for of in map(reach, made)])
        farthest[side] = sides.max()
        assert sides.max(0).min() > 0.7 * 20 / 1024 * side and sides.max() <= 20 / 1024 * side + 1
        # One amplitude for each mask: many tremble little.
        assert (sides.max(1) <= 10 / 1024 * side).sum() > 30
    assert farthest[512] > 1.6 * farthest[256]


def test_nothing_lies_beyond_the_box_grown_by_extension_and_jitter() -> None:
    size, box = (150, 210), (90, 60, 110, 90)
    for mask in bezier.bezier_masks(block(size, *box), 100, seed=9):
        left, top, right, bottom = reach(mask)
        jitter = 20 * 210 / 1024
        assert left >= 90 - 10 - jitter - 1 and right <= 110 + 10 + jitter + 1
        assert top >= 60 - 15 - jitter - 1 and bottom <= 90 + 15 + jitter + 1


def test_each_connected_part_has_curves_of_its_own(monkeypatch) -> None:
    still(monkeypatch, 10)
    first, second = block((120, 200), 20, 30, 40, 60), block((120, 200), 140, 40, 170, 50)
    apart = bezier.bezier_masks(first + second, 1, 0)
    singly = [bezier.bezier_masks(of, 1, 0) for of in (first, second)]
    assert torch.equal(apart, torch.maximum(*singly))
    assert not apart[..., 60:120].any()
    # Parts that touch at a corner are one.
    corner = torch.maximum(block((120, 200), 50, 50, 60, 60), block((120, 200), 60, 60, 80, 80))
    whole = bezier.bezier_masks(block((120, 200), 50, 50, 80, 80), 1, 0)
    assert torch.equal(bezier.bezier_masks(corner, 1, 0), whole)


def test_what_lies_within_a_ring_has_no_curves_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(bezier, "EXTENSIONS", (0, 0))
    whole = block((120, 200), 50, 50, 80, 80)
    ring = whole - block((120, 200), 51, 51, 79, 79)
    island = block((120, 200), 52, 52, 78, 78)
    filled, empty = bezier.bezier_masks(ring + island, 20, 0), bezier.bezier_masks(ring, 20, 0)
    assert torch.equal(filled, torch.maximum(empty, island))


@pytest.mark.parametrize("box", [(0, 0, 30, 20), (61, 70, 91, 77), (0, 0, 91, 77), (45, 0, 46, 77)])
def test_a_subject_at_the_border_of_an_odd_picture(box) -> None:
    mask = block((77, 91), *box)
    made = bezier.bezier_masks(mask, 20, seed=4)
    assert made.shape == (20, 77, 91) and (made[:, mask > 0] == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (64, 64), (1024, 1024)])
def test_one_pixel(size) -> None:
    mask = torch.zeros(size)
    mask[size[0] // 2, size[1] // 2] = 1.0
    for made in bezier.bezier_masks(mask, 4, seed=0):
        assert made[mask > 0].all()
        left, top, right, bottom = reach(made)
        assert max(right - left, bottom - top) <= 2 * (20 * max(size) / 1024 + 0.5) + 3


def test_gray_counts_and_noise_does_not() -> None:
    mask = block((60, 60), 20, 20, 40, 40)
    expected = bezier.bezier_masks(mask, 2, 0)
    assert torch.equal(bezier.bezier_masks(0.1 * mask, 2, 0), expected)
    assert torch.equal(bezier.bezier_masks(mask.clamp(min=2 / 255)[None], 2, 0), expected)


@pytest.mark.parametrize(
    ("mask", "count", "says"),
    [
        (torch.zeros(8, 8), 1, "empty"),
        (torch.full((8, 8), 2 / 255), 1, "empty"),
        (torch.ones(2, 8, 8), 1, "batch of 2"),
        (torch.ones(8, 8), 0, "at least 1"),
    ],
)
def test_what_cannot_be_drawn_gets_one_sentence(mask, count, says) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        bezier.bezier_masks(mask, count, 0)
    assert one_sentence(refused)
