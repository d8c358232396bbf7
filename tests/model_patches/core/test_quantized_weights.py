"""Every method on weights that the host keeps in 8 bits: cast at each use, or in its own quantized tensors.

Stored in 8 bits they are other weights: what is right is what comes of the same numbers in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch

from devtools.pack import load_pack
from truefill_testing.methods import METHODS, TRANSFORMERS, sampled, sampled_by_transformer
from truefill_testing.scene import forget_models, relative_error
from truefill_testing.small_models import small_model
from truefill_testing.small_transformers import small_transformer

import comfy.model_management  # isort: skip
import comfy.ops  # isort: skip
from comfy.quant_ops import QuantizedTensor  # isort: skip

load_pack()

LARGEST = {"float8_e4m3fn": 448.0, "int8_tensorwise": 127.0}


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    pair.cache_clear()
    comfy.model_management.unload_all_models()
    forget_models()


def cast_at_each_use(patcher: Any) -> None:
    """As the host loads it with weight_dtype fp8_e4m3fn."""
    model = patcher.model
    unet = model.diffusion_model
    config = {**model.model_config.unet_config, "dtype": torch.float8_e4m3fn}
    cast = type(unet)(**config, operations=comfy.ops.manual_cast)
    cast.load_state_dict({name: weight.to(torch.float8_e4m3fn) for name, weight in unet.state_dict().items()})
    model.diffusion_model, model.manual_cast_dtype = cast.requires_grad_(False), torch.float32


def quantized(patcher: Any, form: str) -> None:
    """As the host loads a file whose linear layers are quantized, each with its scale."""
    model = patcher.model
    unet, config = model.diffusion_model, model.model_config
    said = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    state = dict(unet.state_dict())
    for name, layer in unet.named_modules():
        # The host has it in full precision in its files, too.
        if isinstance(layer, torch.nn.Linear) and "attn" in name:
            weight = state[f"{name}.weight"]
            scale = weight.abs().max() / LARGEST[form]
            stored = weight / scale
            state[f"{name}.weight"] = (
                stored.round().to(torch.int8) if form == "int8_tensorwise" else stored.to(torch.float8_e4m3fn)
            )
            state[f"{name}.weight_scale"], state[f"{name}.comfy_quant"] = scale, said
    config.quant_config = {"mixed_ops": True}
    operations = comfy.ops.pick_operations(torch.float32, torch.float32, patcher.load_device, model_config=config)
    # The host loads everything there.
    with torch.inference_mode():
        made = type(unet)(**config.unet_config, operations=operations)
        made.load_state_dict(state)
    model.diffusion_model = made.requires_grad_(False)


FORMS: dict[str, Callable[[Any], None]] = {
    "cast": cast_at_each_use,
    "fp8": lambda patcher: quantized(patcher, "float8_e4m3fn"),
    "int8": lambda patcher: quantized(patcher, "int8_tensorwise"),
}


@cache
def pair(form: str, make: Callable[[], Any]) -> tuple[Any, Any]:
    """A model of such weights, and one of the same numbers in float32."""
    stored = make()
    FORMS[form](stored)
    numbers = {
        name: value.dequantize() if isinstance(value.data, QuantizedTensor) else value.float()
        for name, value in stored.model.diffusion_model.named_parameters()
    }
    full = make()
    loaded = full.model.diffusion_model.load_state_dict(numbers, strict=False)
    assert not loaded.unexpected_keys
    return stored, full


UNETS = {inpainting: partial(small_model, "sd15", inpainting) for inpainting in (True, False)}
NETWORKS = {family: partial(small_transformer, family) for family in TRANSFORMERS}


FEW = ("PAIntA, RASG", "Noise Search", "Branch", "PILOT")
"""Those that take gradients, and one with a network of its own."""


@pytest.mark.parametrize(
    ("name", "form"), [(name, "fp8") for name in METHODS if name != "none"] + [(name, "cast") for name in FEW]
)
def test_it_does_what_it_does_with_the_same_numbers_in_full(name: str, form: str) -> None:
    stored, full = pair(form, UNETS[METHODS[name].inpainting])
    assert relative_error(sampled(name, stored), sampled(name, full)) < 1e-4


@pytest.mark.parametrize("form", ["fp8", "cast"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_so_does_one_without_a_unet(family: str, form: str) -> None:
    stored, full = pair(form, NETWORKS[family])
    ours, expected, plain = (
        sampled_by_transformer(family, model, acts) for model, acts in ((stored, True), (full, True), (full, False))
    )
    assert relative_error(plain, expected) > 1e-3
    assert relative_error(ours, expected) < 1e-4


@pytest.mark.parametrize("name", FEW)
def test_in_int8_it_changes_the_picture_as_it_does_in_full(name: str) -> None:
    """The host rounds what goes into a layer, too: the pictures differ, what the method does to them hardly does."""
    change, expected = (
        (sampled(name, model) - sampled("none", model)).flatten()
        for model in pair("int8", UNETS[METHODS[name].inpainting])
    )
    assert float(torch.cosine_similarity(change, expected, dim=0)) > 0.95
    assert float(change.norm() / expected.norm()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_they_are_other_weights(form: str) -> None:
    stored, _ = pair(form, UNETS[True])
    assert relative_error(sampled("none", stored), sampled("none", small_model("sd15", True))) > 1e-2
