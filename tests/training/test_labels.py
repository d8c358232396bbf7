"""What text-to-image training is told about where things lie."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from devtools.pack import pack_module

attributes = pack_module("training.world.attributes")
backgrounds = pack_module("training.world.backgrounds")
scenes = pack_module("training.world.scenes")
text2image = pack_module("training.demo.text2image")


def test_cells_are_the_objects_whose_masks_they_lie_in():
    agreement = []
    for index in range(30):
        scene = scenes.make_scene("train", index)
        cells = scenes.object_cells(scene.layout, 16)
        assert cells.shape == (16, 16) and cells.max() <= len(scene.layout.objects)
        expected = np.zeros((16, 16), dtype=np.uint8)
        for number, mask in enumerate(scene.masks):
            expected[mask[8::16, 8::16]] = 1 + number
        agreement.append((cells == expected).mean())
    # A cell's middle may lie on an outline.
    assert np.mean(agreement) > 0.988


def test_labels_are_those_of_the_object_in_the_cell():
    labels = text2image.cell_labels(range(5))
    for row, index in zip(labels, range(5), strict=True):
        layout = scenes.plan_scene("train", index)
        cells = scenes.object_cells(layout, 16)
        assert (row[3] == backgrounds.BACKGROUNDS.index(layout.background)).all()
        for y in range(16):
            for x in range(16):
                if cells[y, x] == 0:
                    assert row[:3, y, x].tolist() == [8, 8, 4]
                else:
                    item = layout.objects[cells[y, x] - 1]
                    assert attributes.SHAPES[row[0, y, x]] == item.shape
                    assert list(attributes.COLOURS)[row[1, y, x]] == item.colour
                    assert attributes.PATTERNS[row[2, y, x]] == item.pattern
    assert not torch.equal(labels, text2image.cell_labels(range(5), "dev"))


def test_the_loss_weighs_objects_and_their_surroundings_alike():
    labels = text2image.cell_labels([0, 1])
    classes = (9, 9, 5, len(backgrounds.BACKGROUNDS))
    logits = torch.randn(2, sum(classes), 16, 16, generator=torch.Generator().manual_seed(0))
    there = labels[:, 0] != 8
    assert there.any() and not there.all()
    total = torch.zeros(2, 16, 16)
    for place, part in enumerate(logits.split(classes, dim=1)):
        total += F.cross_entropy(part, labels[:, place], reduction="none") / 4
    expected = (total[there].mean() + total[~there].mean()) / 2
    torch.testing.assert_close(text2image.label_loss(logits, labels), expected)
    # A batch without objects has their surroundings alone.
    empty = labels.clone()
    empty[:, :3] = torch.tensor([8, 8, 4])[:, None, None]
    assert text2image.label_loss(logits, empty).isfinite()
