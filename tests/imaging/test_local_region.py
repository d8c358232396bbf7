"""DreamMix's local region, its fill and its ramp, against the literal forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.literal_dreammix import composite_weight, local_box, released_fill

region_plan = pack_module("imaging.region_plan")
seam = pack_module("imaging.seam")
fill = pack_module("imaging.fill")


def holes(count: int, height: int, width: int, seed: int) -> list[np.ndarray]:
    """Boxes of any size and place: thin ones, ones at the border, single pixels, the whole picture."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        hole = np.zeros((height, width), bool)
        (top, bottom), (left, right) = (np.sort(generator.integers(0, side, 2)) for side in (height, width))
        hole[top : bottom + 1, left : right + 1] = True
        made.append(hole)
    single, whole = np.zeros((height, width), bool), np.ones((height, width), bool)
    single[height - 1, 0] = True
    return [*made, single, whole]


@pytest.mark.quick
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (64, 64), (9, 120)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.618, 1.0])
def test_the_box_is_the_literal_one(size: tuple[int, int], share: float) -> None:
    for hole in holes(12, *size, seed=size[0]):
        rows, columns = np.where(hole.any(axis=1))[0], np.where(hole.any(axis=0))[0]
        tight = region_plan.Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        assert tuple(region_plan.local_box(tight, size, share)) == local_box(hole, share)


@pytest.mark.quick
@pytest.mark.parametrize("multiple", [8, 64])
def test_the_crop_holds_the_box_at_about_the_native_area(multiple: int) -> None:
    """In the region's own shape, within the multiple: the release's is only nearly that."""
    settings = region_plan.RegionSettings.local(512, 0.618, multiple)
    for hole in holes(20, 700, 433, seed=2):
        rows, columns = np.where(hole.any(axis=1))[0], np.where(hole.any(axis=0))[0]
        tight = region_plan.Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        local = region_plan.local_box(tight, (700, 433), 0.618)
        plan = region_plan.plan([tight], (700, 433), settings)
        (box,) = plan.boxes
        assert box.left <= local.left and box.top <= local.top
        assert box.right >= local.right and box.bottom >= local.bottom
        height, width = plan.size
        assert height % multiple == width % multiple == 0
        assert 0.75 < height * width / 512**2 < 1.34
        assert abs(np.log(height / width * plan.box_size[1] / plan.box_size[0])) < 0.01


@pytest.mark.quick
def test_a_share_that_is_none_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"picture_share is 1\.5, but must be from 0 to 1"):
        region_plan.RegionSettings.local(512, 1.5)


@pytest.mark.quick
@pytest.mark.parametrize("feather", [0, 1, 5, 32])
def test_the_ramp_is_the_literal_one(feather: int) -> None:
    made = holes(4, 50, 70, seed=feather)
    ours = seam.square_ramp(torch.from_numpy(np.stack(made)).float(), feather)
    assert ours.shape == (len(made), 1, 50, 70) and ours.dtype == torch.float32
    for hole, ramp in zip(made, ours[:, 0], strict=True):
        assert float(np.abs(ramp.numpy() - composite_weight(hole, feather)).max()) < 1e-6
        assert bool((ramp.numpy()[hole] == 1.0).all())


@pytest.mark.quick
def test_no_hole_has_no_ramp_and_gray_is_hole() -> None:
    assert not seam.square_ramp(torch.zeros(2, 8, 9), 4).any()
    gray = torch.zeros(1, 8, 9)
    gray[:, 2:4, 3:5] = 0.1
    assert torch.equal(seam.square_ramp(gray, 4), seam.square_ramp((gray > 0).float(), 4))


@pytest.mark.parametrize("size", [(40, 56), (70, 33)])
def test_box_blurs_are_the_released_fill(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).random((*size, 3))
    for hole in holes(3, *size, seed=4)[:4]:
        ours = fill.fill_pictures(torch.from_numpy(picture)[None], torch.from_numpy(hole).float()[None], "box blurs")
        assert float(np.abs(ours[0].numpy() - released_fill(picture, hole)).max()) < 1e-6
        assert torch.equal(ours[0][~torch.from_numpy(hole)], torch.from_numpy(picture)[~torch.from_numpy(hole)])
