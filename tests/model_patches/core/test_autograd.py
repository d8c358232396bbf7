"""Gradients through modules that the host has loaded in inference mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.dynamic_patcher import DynamicPatcher
from truefill_testing.small_models import small_model

import comfy.model_management  # isort: skip
import comfy.model_patcher  # isort: skip
from comfy.model_patcher import ModelPatcher  # isort: skip

pytestmark = pytest.mark.quick

load_pack()
autograd = pack_module("model_patches.core.autograd")
demo = pack_module("weights.demo_dit")


def loaded_in_inference_mode() -> torch.nn.Module:
    with torch.inference_mode():
        module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten())
        module.append(torch.nn.Linear(8 * 4 * 4, 5))
    return module.eval().requires_grad_(False)


def test_weights_stay_where_they_are_and_can_be_differentiated_through() -> None:
    module = loaded_in_inference_mode()
    x = torch.randn(2, 3, 6, 6)
    with torch.inference_mode():
        expected = module(x)
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="Inference tensors"):
        module(x.clone().requires_grad_()).sum().backward()

    autograd.make_weights_ordinary(module)
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == places
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf).sum(), leaf)
    assert gradient.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with torch.inference_mode():
        assert torch.equal(module(x), expected)


def test_gradients_are_recorded_inside_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(3)
        with autograd.gradients_enabled():
            leaf = autograd.as_ordinary(x).clone().requires_grad_()
            (gradient,) = torch.autograd.grad(leaf.square().sum(), leaf)
        assert torch.allclose(gradient, 2 * x)


def test_nested_inference_tensors_become_ordinary_copies() -> None:
    with torch.inference_mode():
        inner = torch.ones(2)
    value = {"output": [inner, None], "pair": (inner, 3)}
    with torch.inference_mode(False):
        copied = autograd.as_ordinary(value)
    assert not copied["output"][0].is_inference() and not copied["pair"][0].is_inference()
    assert copied["output"][1] is None and copied["pair"][1] == 3
    assert value["output"][0] is inner


@pytest.mark.parametrize("on_cpu", [False, True])
def test_saved_copies_survive_a_write_into_the_original(on_cpu: bool) -> None:
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    with autograd.saving_copies(layer, on_cpu):
        y = layer(x)
        score = y.square().sum()
        with torch.no_grad():
            y.zero_()
    (gradient,) = torch.autograd.grad(score, x)
    assert torch.allclose(gradient, expected)


def test_weights_are_saved_without_a_copy() -> None:
    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    with autograd.saving_copies(layer, False):
        y = layer(torch.randn(2, 4, requires_grad=True))
    assert any(saved is layer.weight or saved.data_ptr() == layer.weight.data_ptr() for saved in _saved(y.grad_fn))


def _saved(node: torch.autograd.graph.Node) -> list[torch.Tensor]:
    names = [name for name in dir(node) if name.startswith("_saved_")]
    values = [getattr(node, name) for name in names]
    return [value for value in values if isinstance(value, torch.Tensor)]


class TestWeightsThatTheHostMoves:
    @pytest.fixture(autouse=True)
    def _the_hosts_is_dynamic(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", DynamicPatcher)
        yield
        comfy.model_management.unload_all_models()

    @pytest.mark.parametrize("kind", ["inpainting", "text-to-image", "transformer"])
    def test_the_demo_model_can_be_loaded_again(self, kind: str) -> None:
        model, *_ = demo.load_kind(kind)
        assert type(model) is DynamicPatcher
        own = autograd.staying(model)
        assert type(own) is ModelPatcher and own.model is not model.model
        weights = model.model.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in own.model.state_dict().items())

    def test_a_model_that_cant_be_gets_one_sentence(self) -> None:
        model = small_model("sd15", False)
        assert autograd.staying(model).model is model.model
        model.__class__ = DynamicPatcher
        with pytest.raises(ValueError, match=r"own loaders, or start ComfyUI with --disable-dynamic-vram\.") as refused:
            autograd.staying(model)
        assert "\n" not in str(refused.value)
