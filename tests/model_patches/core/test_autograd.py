"""Gradients through modules that the host has loaded in inference mode."""

from __future__ import annotations

import pytest
import torch

from devtools.pack import pack_module

pytestmark = pytest.mark.quick

autograd = pack_module("model_patches.core.autograd")


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
