"""Segmenters and detectors that are not on the CPU, but on a device without float64: see `truefill_testing.other_device`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.other_device import other_device, placed

Prompt = pack_module("selection.segmenters").Prompt


def picture() -> torch.Tensor:
    return torch.rand(90, 120, 3, generator=torch.Generator().manual_seed(2))


def copied(network: Any) -> Any:
    """A network of its own: moving one to the other device replaces its weights."""
    made = type(network)(network.config).eval().requires_grad_(False)
    made.load_state_dict(network.state_dict())
    return made


def there(of: Any) -> Any:
    # In the real inference mode, which both run in.
    with torch.autograd.grad_mode.inference_mode():
        placed(of.patcher)
    return of


def test_a_detector_finds_the_same(small_detector: Any) -> None:
    expected = small_detector.detect(picture(), ["red cup", "spoon"])
    network = copied(small_detector.patcher.model.network)
    with other_device():
        found = there(type(small_detector).of(network, small_detector.tokenizer)).detect(
            picture(), ["red cup", "spoon"]
        )
    assert len(found) == len(expected) > 100
    # Attention is computed in other parts there, and a random network makes much of the last digit.
    for one, other in zip(found, expected, strict=True):
        assert one.box == pytest.approx(other.box, abs=0.1) and one.score == pytest.approx(other.score, abs=1e-3)


def test_a_segmenter_finds_the_same(small_sam2: Any) -> None:
    prompts = [Prompt(include=[(60.0, 45.0)]), Prompt(box=(20.0, 10.0, 90.0, 70.0))]
    expected = small_sam2.segment(picture(), prompts)
    network = copied(small_sam2.patcher.model.network)
    with other_device():
        found = there(type(small_sam2).of(network)).segment(picture(), prompts)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.logits, other.logits, atol=1e-4) and torch.allclose(
            one.scores, other.scores, atol=1e-5
        )
