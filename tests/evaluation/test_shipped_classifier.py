"""The shipped classifier on pictures whose content is known."""

from __future__ import annotations

import numpy as np
import torch

from devtools.pack import pack_module

attributes = pack_module("training.world.attributes")
crops = pack_module("training.world.crops")
holes = pack_module("training.world.holes")
scenes = pack_module("training.world.scenes")
judges = pack_module("evaluation.judge")


def pixels(scene) -> torch.Tensor:
    return torch.from_numpy(scene.picture).permute(2, 0, 1).float() / 255


def test_it_names_shape_and_colour_of_held_out_crops():
    classifier = judges.Judge()._classifier
    count, right = 200, 0
    found = [crops.make_crop("test", index) for index in range(count)]
    logits = classifier(torch.stack([torch.from_numpy(crop.picture) for crop in found]).movedim(-1, 1).float() / 255)
    for crop, shape, colour in zip(found, logits[0].argmax(dim=1), logits[1].argmax(dim=1), strict=True):
        right += int(shape) == crop.shape and (crop.colour == crops.IGNORED or int(colour) == crop.colour)
    assert right >= 0.98 * count


def test_it_names_what_a_hole_shows_and_sees_that_there_is_nothing():
    judge = judges.Judge()
    right = []
    for index in range(40):
        scene = scenes.make_scene("test", index)
        item = scene.layout.objects[-1]
        hole = holes.polygon_mask(holes.grown_hull(item, 10.0))
        seen = judge.in_hole(pixels(scene), torch.from_numpy(hole).float())
        right.append((seen.shape, seen.colour) == (item.shape, item.colour))
    assert np.mean(right) >= 0.95
    hole = torch.zeros(256, 256)
    hole[60:180, 50:170] = 1.0
    for kind in ("wood", "grass", "checker", "sea"):
        empty = scenes.paint(scenes.Layout((), kind), np.random.default_rng(0))
        assert judge.in_hole(pixels(empty), hole).shape is None


def test_it_finds_the_object_of_a_whole_picture():
    judge = judges.Judge()
    right = []
    for index in range(100):
        scene = scenes.make_scene("test", index)
        if len(scene.layout.objects) == 1:
            (item,) = scene.layout.objects
            seen = judge.anywhere(pixels(scene))
            right.append((seen.shape, seen.colour) == (item.shape, item.colour))
    assert len(right) > 15 and np.mean(right) >= 0.95
