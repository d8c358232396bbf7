"""Networks of our own where the host's layers have no weight before a file is loaded: its dynamic VRAM, as on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.branch_files import SMALL, random_branch
from truefill_testing.dynamic_patcher import DynamicPatcher
from truefill_testing.scene import forget_models, patcher_of

import comfy.memory_management  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.ops  # isort: skip

load_pack()
readers = pack_module("weights.painternet")
network = pack_module("model_patches.painternet.network")
memory = pack_module("training.subject_lora.memory")
in_memory = pack_module("model_patches.core.operations").in_memory

OPERATIONS = {"in place": comfy.ops.disable_weight_init, "cast": comfy.ops.manual_cast}


@pytest.fixture(autouse=True)
def _nothing_stays_loaded() -> Iterator[None]:
    yield
    forget_models()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True, raising=False)
    if comfy.ops.disable_weight_init.Linear(2, 3).weight is not None:
        pytest.skip("this ComfyUI's layers have weights at once")


@pytest.mark.parametrize("kind", OPERATIONS)
def test_layers_have_weights_and_do_what_the_hosts_do(lazy: None, kind: str) -> None:
    operations = in_memory(OPERATIONS[kind])
    linear, embedding = operations.Linear(4, 3), operations.Embedding(5, 4)
    assert (linear.weight.shape, linear.bias.shape, embedding.weight.shape) == ((3, 4), (3,), (5, 4))
    assert not any(weight.is_meta for weight in (linear.weight, linear.bias, embedding.weight))
    state = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    hosts = OPERATIONS[kind].Linear(4, 3)
    for layer in (linear, hosts):
        layer.load_state_dict(state)
    x = torch.randn(2, 4)
    assert torch.equal(linear(x), hosts(x))
    assert torch.equal(linear(x), torch.nn.functional.linear(x, state["weight"], state["bias"]))
    rows = torch.randn(5, 4)
    embedding.load_state_dict({"weight": rows})
    assert torch.equal(embedding(torch.tensor([3, 1])), rows[[3, 1]])


def test_a_branch_is_loaded_and_stays(lazy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", DynamicPatcher)
    weights = readers.branch_weights(random_branch(SMALL["sd15"], 3), "a file", 16)
    model = network.branch_model(weights)
    wanted = network.network_state(weights)
    found = model.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], of) for name, of in wanted.items())
    assert not model.is_dynamic()


def test_a_branch_that_does_not_fit_gets_its_sentence(lazy: None) -> None:
    weights = readers.branch_weights(random_branch(SMALL["sd15"], 3), "a file", 16)
    cut = {**weights.unet, "middle_block.0.emb_layers.1.weight": torch.zeros(3, 3)}
    with pytest.raises(
        ValueError, match=r"a file is a PainterNet branch whose tensors don't fit each other \(unet\.middle"
    ):
        network.branch_model(replace(weights, unet=cut))


@pytest.mark.parametrize("recompute", [True, False])
def test_a_training_step_holds_what_it_holds_otherwise(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    model = patcher_of("sd15", False, torch.float32).model

    def said() -> int:
        return memory.step_memory(model, 8, 8, (77, model.model_config.unet_config["context_dim"]), 2, True, recompute)

    expected = said()
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True, raising=False)
    assert said() == expected > 0
