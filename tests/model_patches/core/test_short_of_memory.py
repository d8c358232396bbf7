"""Every method on a model that does not fit: the host leaves weights where they are and casts and patches them at each use.

So it loads one with --novram, or where less memory is free than the model takes; on a CPU it never does, unless it is told that
this one is no CPU. What comes out has to be what comes out of the same model, loaded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from devtools.pack import load_pack
from truefill_testing.methods import METHODS, TRANSFORMERS, sampled, sampled_by_transformer
from truefill_testing.scene import forget_models, patcher_of, relative_error
from truefill_testing.small_transformers import small_transformer
from truefill_testing.tuned_subject import learned

import comfy.model_management as host_memory  # isort: skip

load_pack()


@pytest.fixture(autouse=True)
def _nothing_is_loaded() -> Iterator[None]:
    host_memory.unload_all_models()
    forget_models()
    yield
    host_memory.unload_all_models()
    forget_models()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """From now on there is room for such a share of a model of such a size in bytes."""

    def begin(share: float, size: int) -> None:
        monkeypatch.setattr(host_memory, "is_device_cpu", lambda device: False)
        if not share:
            monkeypatch.setattr(host_memory, "vram_state", host_memory.VRAMState.NO_VRAM)
            return
        monkeypatch.setattr(host_memory, "vram_state", host_memory.VRAMState.NORMAL_VRAM)
        # None of it is kept for what is computed.
        monkeypatch.setattr(host_memory, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(host_memory, "MIN_WEIGHT_MEMORY_RATIO", 1.0)
        free = share * size

        def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
            return (free, free) if torch_free_too else free

        monkeypatch.setattr(host_memory, "get_free_memory", get_free_memory)

    return begin


def patched(patcher: Any) -> Any:
    """The model with a LoRA's like, which changes every layer."""
    own = patcher.clone()
    weights = own.model.state_dict()
    names = [name for name, weight in weights.items() if name.startswith("diffusion_model.") and weight.ndim > 1]
    own.add_patches({name: ("diff", (0.1 * weights[name].flip(0),)) for name in names}, 1.0)
    return own


def loaded_share(patcher: Any) -> float:
    """How much of a model's weights is loaded; the patches of the others are applied at each use."""
    modules = [module for module in patcher.model.modules() if hasattr(module, "weight_function")]
    assert any(module.weight_function for module in modules) == patcher.model.model_lowvram
    return patcher.model.model_loaded_weight_memory / patcher.model_size()


def assert_loaded(shares: list[float], share: float) -> None:
    """Of each step's: as much as there is room for."""
    assert shares and all(share - 0.4 < of <= share for of in shares), shares


@pytest.mark.parametrize(
    ("name", "share"), [(name, 0.0) for name in METHODS] + [("PAIntA, RASG", 0.5), ("Branch", 0.5), ("PILOT", 0.5)]
)
def test_it_does_what_it_does_where_there_is_enough(
    name: str, share: float, short: Callable[[float, int], None]
) -> None:
    def run(room: float) -> torch.Tensor:
        patcher, found = patcher_of("sd15", METHODS[name].inpainting, torch.float32), []
        made = sampled(name, patched(patcher), callback=lambda *_: found.append(loaded_share(patcher)))
        assert_loaded(found, room)
        return made

    expected = run(1.0)
    host_memory.unload_all_models()
    forget_models()
    short(share, patcher_of("sd15", False, torch.float32).model_size())
    assert relative_error(run(share), expected) < 1e-4


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["no memory", "half of it"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_so_does_one_without_a_unet(family: str, share: float, short: Callable[[float, int], None]) -> None:
    def run(room: float, acts: bool = True) -> torch.Tensor:
        patcher, found = small_transformer(family), []
        made = sampled_by_transformer(
            family, patched(patcher), acts, callback=lambda *_: found.append(loaded_share(patcher))
        )
        assert_loaded(found, room)
        return made

    expected = run(1.0)
    assert relative_error(run(1.0, acts=False), expected) > 1e-3
    host_memory.unload_all_models()
    short(share, small_transformer(family).model_size())
    assert relative_error(run(share), expected) < 1e-4


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["no memory", "half of it"])
def test_a_subject_is_learned_as_where_there_is_enough(share: float, short: Callable[[float, int], None]) -> None:
    def run(room: float) -> torch.Tensor:
        patcher, found = patched(patcher_of("sd15", False, torch.float32)), []
        made = learned(patcher, lambda step, loss: found.append(loaded_share(patcher)))
        assert_loaded(found, room)
        return made

    expected = run(1.0)
    host_memory.unload_all_models()
    forget_models()
    short(share, patcher_of("sd15", False, torch.float32).model_size())
    assert expected.any() and float((run(share) - expected).norm() / expected.norm()) < 1e-4
