"""The segmenter that ships with the pack, on held-out scenes: masks that mean something test the geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from devtools.pack import pack_module

demo_model = pack_module("weights.demo_model")
scenes = pack_module("training.world.scenes")
segment = pack_module("selection.segmenters")
segmenters = pack_module("weights.segmenters")

Prompt = segment.Prompt
FILE = demo_model.FOLDER / demo_model.SEGMENTER_FILE
SCENES = 24
# Of an object of which less can be seen nobody could say which one is meant.
LEAST_PIXELS = 150


@pytest.fixture(scope="module")
def segmenter():
    return segment.Segmenter.of(segmenters.read_segmenter(FILE))


@pytest.fixture(scope="module")
def things() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures [H, W, 3] of the test split and the mask [H, W] of one thing in each."""
    found = []
    for index in range(SCENES):
        scene = scenes.make_scene("test", index)
        masks = [mask for mask in scene.masks if mask.sum() >= LEAST_PIXELS]
        if masks:
            mask = torch.from_numpy(masks[index % len(masks)])
            found.append((torch.from_numpy(scene.picture).float() / 255.0, mask))
    assert len(found) > 0.9 * SCENES
    return found


def point_in(mask: torch.Tensor, seed: int) -> tuple[float, float]:
    rows, columns = torch.nonzero(mask, as_tuple=True)
    place = np.random.default_rng(seed).integers(len(rows))
    return float(columns[place]) + 0.5, float(rows[place]) + 0.5


def box_of(mask: torch.Tensor) -> tuple[float, float, float, float]:
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def overlap(found: torch.Tensor, true: torch.Tensor) -> float:
    """Intersection over union."""
    return float((found & true).sum() / (found | true).sum())


def best(segmenter, picture: torch.Tensor, *prompts) -> list[torch.Tensor]:
    masks = [found.pick("best")[0] for found in segmenter.segment(picture, prompts)]
    assert all(mask.shape == picture.shape[:2] for mask in masks)
    return masks


def test_the_file_is_small() -> None:
    assert FILE.stat().st_size < 5e6


@pytest.fixture(scope="module")
def overlaps(segmenter, things) -> dict[str, list[float]]:
    """How much of each thing is found by a point, by its box and by a rough mask, at one look."""
    found: dict[str, list[float]] = {"point": [], "box": [], "rough": []}
    for number, (picture, mask) in enumerate(things):
        prompts = {
            "point": Prompt([point_in(mask, number)]),
            "box": Prompt(box=box_of(mask)),
            # A thing's own mask, three pixels too large.
            "rough": Prompt(rough=F.max_pool2d(mask[None, None].float(), 7, stride=1, padding=3)[0, 0]),
        }
        for kind, answer in zip(prompts, best(segmenter, picture, *prompts.values()), strict=True):
            found[kind].append(overlap(answer, mask))
    return found


@pytest.mark.parametrize("kind", ["point", "box", "rough"])
def test_it_finds_the_thing_that_is_meant(overlaps, kind: str) -> None:
    found = overlaps[kind]
    assert sum(found) / len(found) >= 0.9, np.round(found, 2)


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (400, 256), (256, 400), (187, 256), (129, 91)], ids=lambda size: str(size)
)
def test_points_and_boxes_count_the_pictures_own_pixels(segmenter, things, height: int, width: int) -> None:
    """Landscape, portrait, larger, smaller and odd: a cut or scaled scene, and what is meant cut or scaled with it."""
    found = []
    for number, (picture, mask) in enumerate(things[::2]):
        scale = max(height, width) / 256
        pixels = picture.movedim(-1, 0)[None]
        if scale != 1:
            side = max(height, width)
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
            mask = F.interpolate(mask[None, None].float(), size=(side, side), mode="bilinear")[0, 0] > 0.5
        pixels, mask = pixels[0].movedim(0, -1)[:height, :width], mask[:height, :width]
        if mask.sum() < LEAST_PIXELS * scale**2:
            continue
        answers = best(segmenter, pixels, Prompt([point_in(mask, number)]), Prompt(box=box_of(mask)))
        found += [overlap(answer, mask) for answer in answers]
    assert len(found) >= SCENES // 2
    assert sum(found) / len(found) >= 0.85, np.round(found, 2)


def test_a_point_beside_it_takes_things_away(segmenter, things) -> None:
    """Two things in a box: a point on one, and one beside it on the other, leave the first."""
    kept, taken = [], []
    for number in range(SCENES):
        scene = scenes.make_scene("test", 1000 + number)
        masks = [torch.from_numpy(mask) for mask in scene.masks if mask.sum() >= LEAST_PIXELS]
        if len(masks) < 2:
            continue
        one, other = masks[:2]
        picture = torch.from_numpy(scene.picture).float() / 255.0
        (mask,) = best(segmenter, picture, Prompt([point_in(one, number)], [point_in(other, number)]))
        kept.append(float((mask & one).sum() / one.sum()))
        taken.append(float((mask & other).sum() / other.sum()))
    assert len(kept) > SCENES / 3
    assert sum(kept) / len(kept) > 0.85 and sum(taken) / len(taken) < 0.05
