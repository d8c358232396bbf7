"""The score of an attention, against loops over heads, pixels and tokens; and what a reader hears of a call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.scene import Scene, boxes, forget_models

import nodes as host_nodes  # isort: skip

load_pack()
reading = pack_module("model_patches.starts.reading")
sampling_run = pack_module("model_patches.core.sampling_run")
protocol = pack_module("model_patches.core.protocol")


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


def literal(blocks: list[torch.Tensor], tokens: list[int], hole: list[bool]) -> float:
    """The score of one picture; each block's raw scores are [heads, pixels, text]."""
    score = 0.0
    for token in tokens:
        of_pixels = []
        for pixel in range(len(hole)):
            values = []
            for block in blocks:
                for head in block:
                    row = [math.exp(float(value)) for value in head[pixel]]
                    values.append(row[token] / sum(row))
            of_pixels.append(sum(values) / len(values))
        inside = [value for value, is_hole in zip(of_pixels, hole, strict=True) if is_hole]
        outside = [value for value, is_hole in zip(of_pixels, hole, strict=True) if not is_hole]
        score += sum(inside) / max(len(inside), 1) - sum(outside) / max(len(outside), 1)
    return score


@pytest.mark.quick
def test_the_score_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = [2 * torch.randn(3, 2, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    tokens = torch.tensor(
        [[False, True, True, False, False], [False, True, False, False, True], [False, True, True, True, True]]
    )
    hole = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    maps = torch.stack([reading.probabilities(block) for block in blocks]).mean(dim=0)
    found = reading.inside_less_outside(maps, tokens, hole)
    for picture in range(3):
        own = tokens[picture].nonzero().flatten().tolist()
        right = literal([block[picture] for block in blocks], own, hole[picture].tolist())
        assert float(found[picture]) == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("hole", [None, boxes((2, 1), (slice(0, 1), slice(0, 1)), (slice(0, 2), slice(0, 1)))])
def test_prompts_and_levels_are_added_and_the_negative_one_has_no_say(hole: torch.Tensor | None) -> None:
    """One evaluation: with two positive prompts the score is the sum of theirs, whatever the negative prompt is.

    On a picture of 16x8 pixels both levels have a single cell."""
    scene = Scene("sd15", True, True, hole=hole)
    first, second = scene.positive, [[scene.negative[0][0].flip(1), dict(scene.positive[0][1])]]

    def score(positive: list[Any], negative: list[Any], factors: tuple[int, ...]) -> Any:
        scene.positive, scene.negative = positive, negative
        found: list[Any] = []

        class Reads(protocol.Method):
            name, order = "Reads", 0

            def begin(self, run: Any, hole: torch.Tensor) -> Any:
                found.append(reading.AttentionScore(hole, factors))
                return found[0].reader

        scene.host(scene.sigmas("simple", 1), sampling_run.with_method(scene.patcher, Reads()))
        return found[0].value() if found[0].has_read else None

    negative = scene.negative
    alone = {factor: [score(of, negative, (factor,)) for of in (first, second)] for factor in (2, 4)}
    assert not torch.equal(*alone[2])
    for factors in ((2,), (4,), (2, 4)):
        both = score(first + second, negative, factors)
        assert torch.allclose(both, sum(one for factor in factors for one in alone[factor]), atol=1e-5)
    assert torch.allclose(score(first, second, (2,)), alone[2][0], atol=1e-6)
    if hole is not None:
        return
    (limited,) = host_nodes.ConditioningSetArea().append(second, 24, 24, 0, 0, 1.0)
    # The corner has no hole.
    assert torch.allclose(score(first + limited, negative, (2,)), alone[2][0], atol=1e-5)
    assert score([], negative, (2,)) is None
