"""Every method on a model that does not fit: the host leaves weights where they are and casts and patches them at each use.

So it loads one with --novram, or where less memory is free than the model takes; on a CPU it never does, unless it is told that
this one is no CPU. What comes out has to be what comes out of the same model, loaded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.methods import METHODS, sampled
from truefill_testing.scene import forget_models, patcher_of, randn, relative_error
from truefill_testing.small_models import small_conditioning, small_model

import comfy.model_management as host_memory  # isort: skip

load_pack()
tuning = pack_module("training.subject_lora.tuning")

shares = pytest.mark.parametrize("share", [0.0, 0.5], ids=["no memory", "half of it"])


@pytest.fixture(autouse=True)
def _nothing_is_loaded() -> Iterator[None]:
    host_memory.unload_all_models()
    forget_models()
    yield
    host_memory.unload_all_models()
    forget_models()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """From now on there is room for such a share of any model."""

    def begin(share: float) -> None:
        monkeypatch.setattr(host_memory, "is_device_cpu", lambda device: False)
        if not share:
            monkeypatch.setattr(host_memory, "vram_state", host_memory.VRAMState.NO_VRAM)
            return
        size = small_model("sd15", inpainting=False, dtype=torch.float32).model_size()
        monkeypatch.setattr(host_memory, "vram_state", host_memory.VRAMState.NORMAL_VRAM)
        monkeypatch.setattr(host_memory, "minimum_inference_memory", lambda: 0)
        free = share * size

        def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
            return (free, free) if torch_free_too else free

        monkeypatch.setattr(host_memory, "get_free_memory", get_free_memory)

    return begin


def patched(patcher: Any) -> Any:
    """The model with a LoRA's like: it changes weights of attentions and of a convolution."""
    own = patcher.clone()
    weights = own.model.state_dict()
    names = [name for name in weights if name.endswith((".to_k.weight", ".to_v.weight", "in_layers.2.weight"))]
    own.add_patches({name: ("diff", (0.1 * weights[name].flip(0),)) for name in names}, 1.0)
    return own


def is_partly_loaded(model: Any) -> bool:
    return any(getattr(module, "weight_function", []) for module in model.model.modules())


@pytest.mark.parametrize(
    ("name", "share"), [(name, 0.0) for name in METHODS] + [("PAIntA, RASG", 0.5), ("Branch", 0.5), ("PILOT", 0.5)]
)
def test_it_does_what_it_does_where_there_is_enough(name: str, share: float, short: Callable[[float], None]) -> None:
    def run() -> tuple[torch.Tensor, bool]:
        patcher, where = patcher_of("sd15", METHODS[name].inpainting, torch.float32), []
        made = sampled(name, patched(patcher), callback=lambda *_: where.append(is_partly_loaded(patcher)))
        return made, all(where)

    expected, partly = run()
    assert not partly
    host_memory.unload_all_models()
    forget_models()
    short(share)
    made, partly = run()
    assert partly
    assert relative_error(made, expected) < 1e-4


@shares
def test_a_subject_is_learned_as_where_there_is_enough(share: float, short: Callable[[float], None]) -> None:
    def learned() -> tuple[torch.Tensor, bool]:
        patcher = patched(patcher_of("sd15", False, torch.float32))
        latent, masks = 5.0 * randn(1, 4, 16, 13, seed=30).float(), torch.ones(1, 1, 16, 13)
        prompts = [small_conditioning("sd15", seed=3)]
        example = tuning.Example(latent=latent, masks=masks, concat=[], prompts=prompts)
        tuner = tuning.Tuner(patcher, tuning.Tuning(steps=1, accumulate=2, rank=3, seed=5))
        # What Adam would divide away.
        tuner.optimizer = torch.optim.SGD(
            [weight for of in tuner.adapters.values() for weight in of.parameters()], lr=1.0
        )
        where: list[bool] = []
        with torch.inference_mode():
            tuner.run([example], [], lambda step, loss: where.append(is_partly_loaded(patcher)))
        return torch.cat([of.up.detach().flatten() for of in tuner.adapters.values()]), all(where)

    expected, partly = learned()
    assert not partly and expected.any()
    host_memory.unload_all_models()
    forget_models()
    short(share)
    made, partly = learned()
    assert partly
    assert float((made - expected).norm() / expected.norm()) < 1e-4
