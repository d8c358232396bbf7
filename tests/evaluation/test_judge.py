"""The judge: which parts of a picture its classifier is shown, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from devtools.pack import pack_module

attributes = pack_module("training.world.attributes")
classifiers = pack_module("training.demo.classifier_network")
crops = pack_module("training.world.crops")
judges = pack_module("evaluation.judge")
FILE = pack_module("weights.demo_model").FILES["classifier"]

SHAPES, COLOURS, NOTHING = attributes.SHAPES, tuple(attributes.COLOURS), crops.NOTHING
# What one crop is said to show: shape, how sure; colour, how sure.
Answer = tuple[int, float, int, float]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file(classifiers.Classifier(seed=3).state_dict(), folder / FILE)
    return folder


def logits(classes: int, chosen: int, sure: float) -> torch.Tensor:
    """What becomes a probability of `sure` for one class and the same for all others."""
    values = torch.full((classes,), (1.0 - sure) / (classes - 1)).log()
    values[chosen] = np.log(sure)
    return values


class Says:
    """A classifier that keeps the crops it is shown and answers for each, by its number and its pixels."""

    def __init__(self, answer: Callable[[int, torch.Tensor], Answer]) -> None:
        self._answer = answer

    def __call__(self, parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.parts = parts
        answers = [self._answer(number, part) for number, part in enumerate(parts)]
        shape = torch.stack([logits(NOTHING + 1, kind, sure) for kind, sure, _, _ in answers])
        colour = torch.stack([logits(len(COLOURS), kind, sure) for _, _, kind, sure in answers])
        return shape, colour, torch.zeros(len(parts), len(attributes.PATTERNS))


def judge_with(weights, answer: Callable[[int, torch.Tensor], Answer]):
    judge = judges.Judge(weights)
    judge._classifier = Says(answer)
    return judge, judge._classifier


def noise(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(seed))


def hole_of(top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    hole = torch.zeros(256, 256)
    hole[top:bottom, left:right] = 1.0
    return hole


@pytest.mark.parametrize(
    ("hole", "top", "left"),
    [
        (hole_of(40, 80, 104, 144), 40, 80),
        (hole_of(40, 80, 104, 100), 40, 58),
        (hole_of(230, 150, 250, 214), 192, 150),
    ],
    ids=["square", "tall", "at the border"],
)
def test_the_square_around_the_hole_is_shown_in_8_bits(weights, hole, top, left):
    judge, classifier = judge_with(weights, lambda *_: (0, 0.9, 0, 0.9))
    # A sampler's values may lie out of range.
    picture = 1.4 * noise() - 0.2
    judge.in_hole(picture, hole)
    # The square has the classifier's own size, so that nothing is resampled.
    expected = (255 * picture[:, top : top + 64, left : left + 64].clamp(0, 1)).round() / 255
    torch.testing.assert_close(classifier.parts, expected[None])


def test_a_larger_square_is_shown_at_the_size_that_the_classifier_was_trained_on(weights):
    judge, classifier = judge_with(weights, lambda *_: (0, 0.9, 0, 0.9))
    pixels = (255 * noise()).round().byte()
    judge.in_hole(pixels / 255, hole_of(30, 20, 130, 120))
    expected = crops.cut(pixels.permute(1, 2, 0).numpy(), (20, 30, 120, 130))
    torch.testing.assert_close(classifier.parts[0], torch.tensor(expected).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("kind", range(NOTHING + 1))
def test_the_most_probable_shape_and_colour_are_named(weights, kind):
    colour = (kind + 3) % len(COLOURS)
    judge, _ = judge_with(weights, lambda *_: (kind, 0.3, colour, 0.3))
    shape = None if kind == NOTHING else SHAPES[kind]
    assert judge.in_hole(noise(), hole_of(40, 40, 99, 99)) == judges.Seen(shape, COLOURS[colour])


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 160), (160, 0), (160, 160), (64, 96)])
def test_anywhere_in_a_picture_the_surest_window_is_believed(weights, top, left):
    def answer(number: int, part: torch.Tensor) -> Answer:
        sure = 0.3 + 0.6 * float(part.mean())
        return number % NOTHING, sure, number // NOTHING % len(COLOURS), sure

    judge, classifier = judge_with(weights, answer)
    picture = torch.zeros(3, 256, 256)
    picture[:, top : top + 96, left : left + 96] = 1.0
    seen = judge.anywhere(picture)
    # One window alone holds the white part and nothing else, but for what is resampled at its edge.
    (best,) = (classifier.parts[..., 1:-1, 1:-1] == 1.0).flatten(1).all(dim=1).nonzero()[:, 0].tolist()
    assert seen == judges.Seen(SHAPES[best % NOTHING], COLOURS[best // NOTHING % len(COLOURS)])


def test_windows_of_every_size_are_shown(weights):
    judge, classifier = judge_with(weights, lambda *_: (0, 0.9, 0, 0.9))
    # Where a window begins and how wide it is can be read from a ramp.
    ramp = (torch.arange(256) / 255).expand(3, 256, 256)
    judge.anywhere(ramp)
    across = [255 * (float(part[0, 0, -2]) - float(part[0, 0, 1])) * 64 / 61 for part in classifier.parts]
    assert {round(side / 32) * 32 for side in across} == {96, 128, 160, 192}


def test_a_window_that_is_sure_of_nothing_is_not_believed(weights):
    judge, _ = judge_with(weights, lambda number, _: (3, 0.4, 2, 0.5) if number == 7 else (NOTHING, 0.99, 0, 0.99))
    assert judge.anywhere(noise()) == judges.Seen(SHAPES[3], COLOURS[2])


def test_where_no_window_shows_anything_nothing_is_seen(weights):
    judge, _ = judge_with(weights, lambda *_: (NOTHING, 0.9, 0, 0.9))
    assert judge.anywhere(noise()).shape is None


def test_a_window_has_to_be_sure_of_shape_and_colour(weights):
    answers = {4: (1, 0.95, 1, 0.4), 5: (2, 0.8, 2, 0.8), 6: (3, 0.4, 3, 0.95)}
    judge, _ = judge_with(weights, lambda number, _: answers.get(number, (0, 0.3, 0, 0.3)))
    assert judge.anywhere(noise()) == judges.Seen(SHAPES[2], COLOURS[2])


def test_the_classifier_has_the_weights_of_the_folder(weights):
    judge, classifier = judges.Judge(weights), classifiers.Classifier(seed=3).eval()
    found, expected = [], []
    for seed in range(6):
        pixels = (255 * noise(seed) * torch.rand(3, 1, 1)).round().byte()
        part = pixels[:, 40:104, 80:144] / 255
        with torch.no_grad():
            shape, colour, _ = (int(head.argmax()) for head in classifier(part[None]))
        expected.append(judges.Seen(None if shape == NOTHING else SHAPES[shape], COLOURS[colour]))
        found.append(judge.in_hole(pixels / 255, hole_of(40, 80, 104, 144)))
    assert found == expected
