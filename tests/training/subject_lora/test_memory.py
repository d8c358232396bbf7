"""What a step of the tuning is said to hold, against what it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.scene import forget_models, patcher_of, randn
from truefill_testing.small_models import small_conditioning

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
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    yield
    forget_models()


def settings(**changes: object) -> object:
    return tuning.Tuning(**{"steps": 1, "accumulate": 1, "rank": 2, **changes})


def example_of(family: str, size: tuple[int, int]) -> object:
    latent, masks = randn(1, 4, *size, seed=1).float(), torch.ones(1, 1, *size)
    return tuning.Example(latent=latent, masks=masks, concat=[], prompts=[small_conditioning(family, seed=1)])


def said(patcher: ModelPatcher, size: tuple[int, int], **changes: object) -> int:
    given = settings(**changes)
    return memory.step_memory(patcher.model, *size, _context(patcher), given.rank, given.outputs, given.recompute)


def _context(patcher: ModelPatcher) -> tuple[int, int]:
    return 77, patcher.model.model_config.unet_config["context_dim"]


@pytest.mark.quick
def test_the_peak_is_of_what_is_there_at_once() -> None:
    there = torch.zeros(64, KIB)
    with memory.Peak([there]) as peak:
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
    one_step, held = tuner._one_step, []

    def watched(*given: object) -> float:
        with memory.Peak([*patcher.model.parameters(), *patcher.model.buffers(), *tuner._weights]) as peak:
            loss = one_step(*given)
        held.append(peak.most)
        return loss

    tuner._one_step = watched
    tuner.run([example_of(family, size)], [], lambda step, loss: None)
    # In the second step the optimizer's two averages have been there before.
    averages = 2 * 4 * tuner.count
    assert tuner.memory([example_of(family, size)]) == pytest.approx(held[1] + averages, rel=0.1)


@pytest.mark.quick
def test_more_pixels_hold_more_and_recomputing_less() -> None:
    patcher = patcher_of("sd15", True, torch.float32)
    small, large = said(patcher, (16, 16)), said(patcher, (32, 64))
    assert 6.0 * small < large < 8.5 * small
    assert said(patcher, (16, 16), recompute=False) > 2 * small


def test_the_largest_picture_and_the_longest_prompt_count() -> None:
    patcher = patcher_of("sd15", False, torch.float32)
    tuner = tuning.Tuner(patcher, settings())
    small, large = example_of("sd15", (16, 8)), example_of("sd15", (16, 24))
    assert tuner.memory([small, large]) == tuner.memory([large, small]) == tuner.memory([large]) > tuner.memory([small])
    ((text, options),) = small.prompts[0]
    longer = tuning.Example(
        latent=small.latent, masks=small.masks, concat=[], prompts=[*small.prompts, [[text.repeat(1, 4, 1), options]]]
    )
    assert tuner.memory([longer]) > tuner.memory([small])


@pytest.mark.quick
def test_weights_that_are_cast_at_each_use_count() -> None:
    patcher = patcher_of("sd15", False, torch.float16)
    as_it_is = said(patcher, (16, 16), recompute=False)
    patcher.model.manual_cast_dtype = torch.float32
    try:
        assert said(patcher, (16, 16), recompute=False) > 2 * as_it_is
    finally:
        patcher.model.manual_cast_dtype = None
