"""Pictures one pixel wide or high, and very long ones: everything that the nodes do with them. No host needed."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from devtools.pack import pack_module

morphology = pack_module("imaging.morphology")
shapes = pack_module("imaging.mask_shapes")
fill = pack_module("imaging.fill")
harmonizing = pack_module("imaging.harmonize")
region = pack_module("imaging.region")
region_plan = pack_module("imaging.region_plan")
comparing = pack_module("imaging.compare")

SIZES = [(1, 1), (1, 7), (1, 700), (7, 1), (700, 1), (8, 4096), (4096, 7)]
thin = pytest.mark.parametrize("size", SIZES)


def scene(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture [1, H, W, 3] and a grey hole in the middle of it, of an eighth of its length."""
    height, width = size
    picture = 0.2 + 0.6 * torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, height, width)
    mask[:, height // 2 : height // 2 + max(1, height // 8), width // 2 : width // 2 + max(1, width // 8)] = 0.75
    return picture, mask


@thin
def test_masks_stay_masks_of_the_same_size(size: tuple[int, int]) -> None:
    _, mask = scene(size)
    made = [morphology.grow(mask, pixels) for pixels in (-2.5, -1.0, 1.0, 40.0, 5000.0)]
    made += [morphology.feather(mask, pixels, where) for pixels in (1.0, 40.0) for where in get_args(morphology.Where)]
    made += [
        morphology.clean(mask, 2, 5, smooth, shape) for smooth in (0.0, 3.0) for shape in get_args(morphology.Shape)
    ]
    made += [shapes.mask_shape(mask, shape, seed) for shape in get_args(shapes.Shape) for seed in range(3)]
    for result in made:
        assert result.shape == (1, 1, *size) and 0.0 <= result.min() and result.max() <= 1.0
    assert morphology.grow(mask, 5000.0).all() and morphology.feather(mask, 40.0, "outside")[:, 0][mask > 0].all()


@thin
@pytest.mark.parametrize("method", get_args(fill.Fill))
def test_holes_are_filled_and_the_rest_stays(size: tuple[int, int], method: str) -> None:
    picture, mask = scene(size)
    made = fill.fill_pictures(picture, mask, method)
    assert made.isfinite().all() and torch.equal(made[mask == 0], picture[mask == 0])
    assert not torch.equal(made[mask > 0], picture[mask > 0])


@thin
@pytest.mark.parametrize("color", get_args(harmonizing.ColorMode))
@pytest.mark.parametrize("mode", get_args(harmonizing.Mode))
def test_pictures_are_harmonized_and_compared(size: tuple[int, int], mode: str, color: str) -> None:
    picture, mask = scene(size)
    made = harmonizing.harmonize_pictures(1 - picture, picture, mask, harmonizing.Harmony(mode, color))
    assert made.isfinite().all() and torch.equal(made[mask == 0], picture[mask == 0])
    _, (figures,) = comparing.compare(picture, made, mask)
    assert figures.outside.changed == 0 and figures.inside.pixels == int((mask > 0).sum())


@thin
@pytest.mark.parametrize("feather", [0.0, 16.0])
@pytest.mark.parametrize("forced", [None, (64, 128)])
def test_crops_are_cut_and_go_back(size: tuple[int, int], feather: float, forced: tuple[int, int] | None) -> None:
    picture, mask = scene(size)
    settings = region_plan.RegionSettings(forced_size=forced)
    crops, crop_masks, made = region.crop(picture, mask, settings, None, feather)
    assert crops.shape[1:3] == crop_masks.shape[1:] == made.plan.size and crop_masks.any()
    result, changed = region.stitch(made, 1 - crops, harmonizing.FULL), region.may_change(made, 1)
    assert result.shape == picture.shape and result.isfinite().all()
    assert torch.equal(result[changed == 0], picture[changed == 0]) and (changed[mask > 0] == 1).all()
