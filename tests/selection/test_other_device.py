"""Segmenters and detectors that are not on the CPU, but on a device without float64: see `truefill_testing.other_device`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from devtools.pack import ensure_host, pack_module
from truefill_testing.other_device import OTHER, Placed, other_device

ensure_host()

import comfy.model_management as host_memory  # noqa: E402

Prompt = pack_module("selection.segmenters").Prompt


def picture() -> torch.Tensor:
    return torch.rand(90, 120, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    free = (2**36, 2**36)
    monkeypatch.setattr(
        host_memory, "get_free_memory", lambda device=None, torch_free_too=False: free if torch_free_too else free[0]
    )
    yield
    host_memory.current_loaded_models.clear()


def copied(network: Any) -> Any:
    """A network of its own: moving one to the other device replaces its weights."""
    made = type(network)(network.config).eval().requires_grad_(False)
    made.load_state_dict(network.state_dict())
    return made


def placed(of: Any) -> Any:
    of.patcher.load_device = OTHER
    # In the real one, which they run in.
    with torch.autograd.grad_mode.inference_mode():
        host_memory.load_models_gpu([of.patcher])
    assert all(isinstance(weight, Placed) for weight in of.patcher.model.parameters())
    return of


def test_a_detector_finds_the_same(small_detector: Any) -> None:
    expected = small_detector.detect(picture(), ["red cup", "spoon"])
    network = copied(small_detector.patcher.model.network)
    with other_device():
        found = placed(type(small_detector).of(network, small_detector.tokenizer)).detect(
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
        found = placed(type(small_sam2).of(network)).segment(picture(), prompts)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.logits, other.logits, atol=1e-4) and torch.allclose(
            one.scores, other.scores, atol=1e-5
        )
