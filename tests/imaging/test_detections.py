"""Which detections count, and the picture that shows them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.regions import one_sentence

pytestmark = pytest.mark.quick

detections = pack_module("imaging.detections")
Choice, Detection = detections.Choice, detections.Detection

SIDE = 100


def things(seed: int, count: int = 40) -> list:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        left, top = random.uniform(0, 70, 2)
        wide, high = random.uniform(2, 30, 2)
        label = str(random.choice(["cup", "spoon"]))
        found.append(Detection((left, top, left + wide, top + high), label, float(random.uniform(0, 1))))
    return found


def shared(one, other) -> float:
    """Intersection over union."""
    across = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
    down = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
    both = max(across, 0.0) * max(down, 0.0)
    return both / (one.area + other.area - both)


def literal(found, threshold: float, overlap: float, smallest: float, largest: float) -> list:
    kept = []
    for one in sorted(found, key=lambda one: one.score, reverse=True):
        right_size = smallest <= one.area / SIDE**2 <= largest
        if one.score > threshold and right_size and all(shared(one, other) <= overlap for other in kept):
            kept.append(one)
    return kept


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("threshold", "overlap", "smallest", "largest"), [(0.0, 1.0, 0.0, 1.0), (0.3, 0.3, 0.005, 0.05)]
)
def test_the_choice_is_the_literal_one(
    seed: int, threshold: float, overlap: float, smallest: float, largest: float
) -> None:
    found = things(seed)
    expected = literal(found, threshold, overlap, smallest, largest)
    assert len(expected) > 6
    choice = {"threshold": threshold, "overlap": overlap, "smallest": smallest, "largest": largest}
    assert Choice(**choice, count=99).of(found, SIDE, SIDE) == expected
    assert Choice(**choice, count=5).of(found, SIDE, SIDE) == expected[:5]
    assert Choice(**choice, pick="best").of(found, SIDE, SIDE) == expected[:1]
    assert Choice(**choice, pick="by index", index=3).of(found, SIDE, SIDE) == [expected[3]]
    assert Choice(**choice, pick="by index", index=99).of(found, SIDE, SIDE) == []
    assert Choice(**choice, pick="largest").of(found, SIDE, SIDE) == [max(expected, key=lambda one: one.area)]
    assert Choice(**choice, pick="smallest").of(found, SIDE, SIDE) == [min(expected, key=lambda one: one.area)]


@pytest.mark.parametrize("pick", detections.PICKS)
def test_of_nothing_nothing_is_picked(pick: str) -> None:
    assert Choice(pick=pick).of([], SIDE, SIDE) == []
    assert Choice(pick=pick, threshold=1.0).of(things(0), SIDE, SIDE) == []


def test_a_box_without_an_area_does_not_count() -> None:
    flat, line = (Detection(box, "cup", 0.9) for box in ((5.0, 5.0, 5.0, 9.0), (0.0, 100.0, 30.0, 100.0)))
    thing = Detection((0.0, 0.0, 1.0, 1.0), "cup", 0.5)
    assert Choice().of([flat, thing, line], SIDE, SIDE) == [thing]
    assert Choice(pick="best").of([flat, line], SIDE, SIDE) == []


def test_findings_are_handed_around_as_boxes_and_texts() -> None:
    cup, spoon = Detection((1.0, 2.0, 4.0, 8.0), "cup", 0.51239), Detection((0.0, 0.0, 1.0, 1.0), "spoon", 0.25)
    found = detections.Findings(["cup", "spoon"], [[cup, spoon], []])
    assert found.boxes == [
        [
            {"x": 1.0, "y": 2.0, "width": 3.0, "height": 6.0, "score": 0.51239, "label": "cup"},
            {"x": 0.0, "y": 0.0, "width": 1.0, "height": 1.0, "score": 0.25, "label": "spoon"},
        ],
        [],
    ]
    assert json.loads(found.labels) == [["cup", "spoon"], []] and json.loads(found.scores) == [[0.5124, 0.25], []]
    pictures, masks = torch.rand(2, 30, 40, 3), torch.rand(2, 30, 40)
    assert torch.equal(found.preview(pictures), detections.shown(pictures[0], [cup, spoon], ["cup", "spoon"]))
    tinted = detections.shown(pictures[0], [cup, spoon], ["cup", "spoon"], masks[0])
    assert torch.equal(found.preview(pictures, masks), tinted) and not torch.equal(found.preview(pictures), tinted)


@pytest.mark.parametrize(
    "text", ["red cup. spoon.", " Red  Cup .spoon", "red cup, spoon", "RED CUP;\nspoon...", "red cup.spoon.red cup"]
)
def test_phrases_are_parted(text: str) -> None:
    assert detections.split_phrases(text) == ["red cup", "spoon"]


@pytest.mark.parametrize("text", ["", "  ", ". , ;"])
def test_a_text_without_a_phrase_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="'text' says nothing to look for"):
        detections.split_phrases(text)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (4096, 8), (37, 210), (600, 400)])
def test_the_picture_shows_the_boxes_and_nothing_else_changes(size: tuple[int, int], channels: int) -> None:
    height, width = size
    picture = torch.full((height, width, channels), 0.25)
    box = (0.3 * width, 0.5 * height, 0.9 * width, 0.95 * height)
    drawn = detections.shown(picture, [Detection(box, "cup", 0.5)], ["cup"])
    assert drawn.shape == (1, height, width, 3) and 0.0 <= float(drawn.min()) <= float(drawn.max()) <= 1.0
    changed = (drawn[0] - 64 / 255).abs().amax(dim=-1) > 1e-3
    assert changed.any()
    if height > 100:
        # The frame's left side, and nothing in the middle or left of it.
        assert changed[int(0.8 * height), int(box[0])]
        assert (
            not changed[int(0.7 * height) :, : int(box[0]) - 8].any()
            and not changed[int(0.75 * height), int(0.6 * width)]
        )


def test_the_picture_says_that_nothing_was_found() -> None:
    picture = torch.zeros(200, 300, 3)
    drawn = detections.shown(picture, [], ["red cup"])
    assert (drawn[0, :20] > 0).any() and not (drawn[0, 60:] > 0).any()


def test_labels_say_which_mask_belongs_to_which_picture() -> None:
    each = detections.labels_of('[["cup", "spoon"], [], ["dog"]]', 3)
    assert each == [["cup", "spoon"], [], ["dog"]]
    mask = torch.zeros(4, 10, 10)
    for place in range(4):
        mask[place, place : place + 4, place : place + 4] = 1.0
    found = detections.masks_of(mask, each, (10, 10))
    assert [len(of) for of in found] == [2, 0, 1]
    assert torch.equal(torch.cat(found), mask[[0, 1, 3]])
    assert [of.shape[1:] for of in detections.masks_of(mask, each, (20, 30))] == [(20, 30)] * 3

    def refused(begins: str, masks: int, text: str, pictures: int) -> None:
        with pytest.raises(ValueError, match=re.escape(begins)) as found:
            detections.masks_of(mask[:masks], detections.labels_of(text, pictures), (10, 10))
        assert one_sentence(found)

    refused("'mask' has 3 masks, and there are 4 labels", 3, json.dumps(each), 3)
    refused("'labels' are of 3 pictures, and 'image' has 2", 4, json.dumps(each), 2)
    for text in ("cup", '["cup"]', "[[1]]", "{}", ""):
        refused("'labels' is ", 1, text, 1)
