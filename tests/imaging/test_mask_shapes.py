"""Masks such as people draw: what each shape promises for any mask, and where the random numbers come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from devtools.pack import pack_module
from truefill_testing.regions import one_sentence

shapes = pack_module("imaging.mask_shapes")
morphology = pack_module("imaging.morphology")
ALL = ("painternet", "box", "irregular", "convex hull", "scribble", "as it is")


def bean(height: int = 120, width: int = 160) -> torch.Tensor:
    """An ellipse with a bite, of about a tenth of the picture."""
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
    body = ((rows - 0.5) / 0.2) ** 2 + ((columns - 0.5) / 0.25) ** 2 < 1
    bite = ((rows - 0.35) / 0.15) ** 2 + ((columns - 0.6) / 0.12) ** 2 < 1
    return (body & ~bite).float()[None]


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    count, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    share = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    grey = torch.rand(count, height, width, generator=generator) + 0.01
    return grey.clamp(max=1.0) * (torch.rand(count, height, width, generator=generator) < share)


@settings(max_examples=150, deadline=None)
@given(masks(), st.sampled_from(ALL), st.integers(0, 2**64 - 1))
def test_every_shape_is_a_mask_of_the_same_size_and_empty_where_there_was_no_hole(
    mask: torch.Tensor, shape: Any, seed: int
) -> None:
    before = mask.clone()
    made = shapes.mask_shape(mask, shape, seed)
    assert made.shape == (len(mask), 1, *mask.shape[1:]) and made.dtype == torch.float32
    assert set(made.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(mask, before)
    has_hole = (mask > 0).flatten(1).any(1)
    assert torch.equal(made.flatten(1).any(1), has_hole)
    if shape != "scribble":
        assert (made[:, 0][mask > 0] == 1).all()
    assert torch.equal(shapes.mask_shape(mask, shape, seed), made)


def test_the_seed_and_the_place_in_the_batch_decide() -> None:
    batch = bean().expand(3, -1, -1)
    for shape in ("box", "irregular", "scribble"):
        made = shapes.mask_shape(batch, shape, seed=5)
        assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
        assert torch.equal(made[:1], shapes.mask_shape(batch[:1], shape, seed=5))
        assert not torch.equal(made, shapes.mask_shape(batch, shape, seed=6))


def test_a_box_grows_by_a_part_of_its_own_sides() -> None:
    mask = torch.zeros(1, 200, 300)
    mask[:, 80:120, 100:180] = 1.0
    reaches = []
    for seed in range(200):
        made = shapes.mask_shape(mask, "box", seed, growth=0.5)
        left, top, right, bottom = morphology.bounding_boxes(made)[0].tolist()
        assert torch.equal(made, morphology.box(made))
        reaches.append([(80 - top) / 40, (bottom - 120) / 40, (100 - left) / 80, (right - 180) / 80])
    spread = np.array(reaches)
    assert spread.min() >= 0 and spread.max() <= 0.5 + 0.5 / 40
    assert (spread.min(0) < 0.03).all() and (spread.max(0) > 0.47).all()
    assert np.abs(np.corrcoef(spread.T) - np.eye(4)).max() < 0.3
    assert torch.equal(shapes.mask_shape(mask, "box", 0, growth=0.0)[:, 0], mask)


@pytest.mark.parametrize("corner", [(0, 0), (190, 280)])
def test_a_box_at_the_border_stays_in_the_picture(corner: tuple[int, int]) -> None:
    mask = torch.zeros(1, 200, 300)
    mask[:, corner[0] : corner[0] + 10, corner[1] : corner[1] + 20] = 1.0
    made = shapes.mask_shape(mask, "box", seed=1, growth=2.0)
    assert torch.equal(made, morphology.box(made)) and made.sum() > 200


def test_without_strokes_an_irregular_mask_is_the_object_grown_within_bounds() -> None:
    mask = bean()
    unit, share = float(mask.sum()) ** 0.5, float(mask.mean())
    reaches = []
    for seed in range(60):
        made = shapes.mask_shape(mask, "irregular", seed, strokes=0)
        reach = float(morphology.distance_to_hole(mask)[made > 0].max())
        # Nothing but a disc around every pixel.
        assert torch.equal(made, morphology.grow(mask, reach + 1e-4))
        reaches.append(reach / unit / (1 - share))
    low, high = shapes.DILATION
    assert low - 1 / unit <= min(reaches) < low + 0.03 and high - 0.03 < max(reaches) <= high + 1e-6


def test_strokes_start_in_the_object_so_that_everything_hangs_together() -> None:
    mask = bean()
    areas = []
    for seed in range(40):
        made = shapes.mask_shape(mask, "irregular", seed, strokes=4)[0, 0].numpy()
        assert ndimage.label(made, np.ones((3, 3)))[1] == 1
        areas.append(made.sum())
    bare = [float(shapes.mask_shape(mask, "irregular", seed, strokes=0).sum()) for seed in range(40)]
    assert np.mean(areas) > 1.05 * np.mean(bare)
    assert len(set(areas)) > 30


@pytest.mark.parametrize("shape", ["irregular", "scribble"])
def test_shapes_look_the_same_at_every_resolution(shape: Any) -> None:
    small = [float(shapes.mask_shape(bean(120, 160), shape, seed).mean()) for seed in range(40)]
    large = [float(shapes.mask_shape(bean(360, 480), shape, seed).mean()) for seed in range(40)]
    assert np.mean(large) == pytest.approx(np.mean(small), rel=0.1)


def test_a_scribble_runs_over_most_of_the_object_in_one_stroke() -> None:
    mask = bean(240, 320)
    for seed in range(20):
        made = shapes.mask_shape(mask, "scribble", seed)
        assert ndimage.label(made[0, 0].numpy(), np.ones((3, 3)))[1] == 1
        left, _, right, _ = morphology.bounding_boxes(made)[0].tolist()
        ours = morphology.bounding_boxes(mask)[0].tolist()
        assert left <= ours[0] + 20 and right >= ours[2] - 20
        assert 0.2 < float((made[:, 0] * mask).sum() / mask.sum()) < 0.98
        assert float((made[:, 0] * (1 - mask)).sum() / made.sum()) < 0.4


def test_painternet_draws_a_quarter_boxes_half_irregular_and_the_rest_as_it_is() -> None:
    mask = bean(40, 60)
    batch = mask.expand(600, -1, -1)
    made = shapes.mask_shape(batch, "painternet", seed=3)
    as_is = (made == mask).flatten(1).all(1)
    boxes = (made == torch.cat([morphology.box(one) for one in made.split(1)])).flatten(1).all(1)
    counts = [int(boxes.sum()), int((~boxes & ~as_is).sum()), int(as_is.sum())]
    for count, share in zip(counts, (0.25, 0.5, 0.25), strict=True):
        assert abs(count / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "blob"}, "no mask shape 'blob'"),
        ({"shape": "box", "growth": -1}, "negative"),
        ({"shape": "irregular", "strokes": -1}, "negative"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        shapes.mask_shape(bean(), **settings)
    assert one_sentence(refused)
