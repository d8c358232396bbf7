"""Every method with the attention that the host takes on a CPU, and on GPUs without PyTorch's: it chooses one when it starts.

All other tests of this process have PyTorch's (`conftest.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.methods import METHODS, sampled
from truefill_testing.scene import forget_models, patcher_of, relative_error

import comfy.ldm.modules.attention as hosts  # isort: skip

load_pack()
unet_attention = pack_module("model_patches.core.unet_attention")


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    forget_models()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_the_same_with_sub_quadratic_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patcher_of("sd15", METHODS[name].inpainting, torch.float64)
    assert hosts.optimized_attention is hosts.attention_pytorch
    expected = sampled(name, model)
    calls = []

    def sub_quadratic(*arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(name)
        return hosts.attention_sub_quad(*arguments, **named)

    for module in (hosts, unet_attention):
        monkeypatch.setattr(module, "optimized_attention", sub_quadratic)
    monkeypatch.setattr(hosts, "optimized_attention_masked", sub_quadratic)
    made = sampled(name, model)
    assert calls
    assert relative_error(made, expected) < 1e-5
