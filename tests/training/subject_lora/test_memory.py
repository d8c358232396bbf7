"""What a step of the tuning is said to hold, against what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.scene import forget_models, patcher_of
from truefill_testing.tuned_subject import subject_example

import comfy.ldm.modules.attention  # isort: skip
from comfy.model_patcher import ModelPatcher  # isort: skip

load_pack()
memory = pack_module("training.subject_lora.memory")
tuning = pack_module("training.subject_lora.tuning")

KIB = 1024


@pytest.fixture(autouse=True)
def _attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU the host takes one that computes in parts."""
    attention = comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    yield
    forget_models()


def settings(**changes: object) -> object:
    return tuning.Tuning(**{"steps": 1, "accumulate": 1, "rank": 2, **changes})


def allocator_peak(profile: torch.profiler.profile) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at once since the profile began, by its own record."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def said(patcher: ModelPatcher, size: tuple[int, int], **changes: object) -> int:
    given = settings(**changes)
    return memory.step_memory(patcher.model, *size, _context(patcher), given.rank, given.outputs, given.recompute)


def _context(patcher: ModelPatcher) -> tuple[int, int]:
    return 77, patcher.model.model_config.unet_config["context_dim"]


@pytest.mark.quick
def test_the_peak_is_of_what_is_there_at_once() -> None:
    there = torch.zeros(64, KIB)
    with memory.LiveTensors([there]) as peak:
        view = there[1:]
        first = view + 1.0
        assert peak.now == 63 * 4 * KIB
        second = first.exp_().sum(0)
        del first
        third = torch.empty(10, 4 * KIB, dtype=torch.uint8)
    assert (peak.now, peak.most) == ((4 + 40) * KIB, (63 * 4 + 4) * KIB)
    del second, third
    assert peak.now == 0


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    ("family", "dtype"), [("sd15", torch.float32), ("sdxl", torch.float32), ("sdxl", torch.bfloat16)], ids=str
)
def test_a_step_holds_what_it_is_said_to(family: str, dtype: torch.dtype, recompute: bool) -> None:
    size, patcher = (32, 24), patcher_of(family, False, dtype)
    tuner = tuning.Tuner(patcher, settings(steps=2, recompute=recompute))
    example = subject_example(family, size)
    # The first step makes what stays: the optimizer's two averages of each weight.
    tuner.run([example], [], lambda step, loss: None, until=1)
    averages = 2 * 4 * tuner.count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tuner.run([example], [], lambda step, loss: None)
    assert tuner.memory([example]) == pytest.approx(allocator_peak(profile) + averages, rel=0.1)


def test_more_pixels_hold_more_and_recomputing_less() -> None:
    patcher = patcher_of("sd15", True, torch.float32)
    small, large = said(patcher, (16, 16)), said(patcher, (32, 64))
    assert 6.0 * small < large < 8.5 * small
    assert said(patcher, (16, 16), recompute=False) > 2 * small


def test_the_largest_picture_and_the_longest_prompt_count() -> None:
    patcher = patcher_of("sd15", False, torch.float32)
    tuner = tuning.Tuner(patcher, settings())
    small, large = subject_example("sd15", (16, 8)), subject_example("sd15", (16, 24))
    assert tuner.memory([small, large]) == tuner.memory([large, small]) == tuner.memory([large]) > tuner.memory([small])
    ((text, options),) = small.prompts[0]
    longer = tuning.Example(
        latent=small.latent, masks=small.masks, concat=[], prompts=[*small.prompts, [[text.repeat(1, 4, 1), options]]]
    )
    assert tuner.memory([longer]) > tuner.memory([small])


def test_weights_that_are_cast_at_each_use_count() -> None:
    patcher = patcher_of("sd15", False, torch.float16)
    as_it_is = said(patcher, (16, 16), recompute=False)
    patcher.model.manual_cast_dtype = torch.float32
    try:
        assert said(patcher, (16, 16), recompute=False) > 2 * as_it_is
    finally:
        patcher.model.manual_cast_dtype = None


@pytest.mark.quick
@pytest.mark.parametrize(
    ("needed", "saves", "cure"),
    [
        (12, True, None),
        (13, True, "That is more than there is, and will be slow or fail: take a smaller 'native_size'."),
        (13, False, "will be slow or fail: turn 'save_memory' on, or take a smaller 'native_size'."),
    ],
)
def test_where_it_does_not_fit_the_node_says_what_to_do(needed: int, saves: bool, cure: str | None) -> None:
    said = pack_module("nodes.subject_tuning").memory_notice(needed << 30, 12 << 30, saves)
    assert f"holds about {needed}.0 of 12.0 GB" in said and "\n" not in said
    assert said.endswith(cure) if cure else "more than there is" not in said
