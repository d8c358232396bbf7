"""The resampler against loops over heads, and its tensors by the published files' names."""

from __future__ import annotations

import math

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.subject_weights import random_resampler

load_pack()
Resampler = pack_module("model_patches.lar_gen.resampler").Resampler

pytestmark = pytest.mark.quick


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def literal(tensors: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """IP-Adapter's resampler in float64, for one picture's features [n, width]."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = features.double() @ w["proj_in.weight"].T + w["proj_in.bias"]
    tokens = w["latents"][0]
    for layer in range(2):
        at = f"layers.{layer}.0."
        read = layer_norm(x, w[at + "norm1.weight"], w[at + "norm1.bias"])
        own = layer_norm(tokens, w[at + "norm2.weight"], w[at + "norm2.bias"])
        query = own @ w[at + "to_q.weight"].T
        both = torch.cat((read, own)) @ w[at + "to_kv.weight"].T
        inner = query.shape[1]
        heads = []
        for head in range(inner // 64):
            here = slice(64 * head, 64 * head + 64)
            scores = query[:, here] @ both[:, :inner][:, here].T / math.sqrt(64)
            heads.append(scores.softmax(dim=-1) @ both[:, inner:][:, here])
        tokens = tokens + torch.cat(heads, dim=1) @ w[at + "to_out.weight"].T
        at = f"layers.{layer}.1."
        hidden = layer_norm(tokens, w[at + "0.weight"], w[at + "0.bias"]) @ w[at + "1.weight"].T
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        tokens = tokens + hidden @ w[at + "3.weight"].T
    out = tokens @ w["proj_out.weight"].T + w["proj_out.bias"]
    return layer_norm(out, w["norm_out.weight"], w["norm_out.bias"])


def test_it_is_the_published_network() -> None:
    tensors = random_resampler(output=40)
    features = torch.randn(3, 9, 1280, generator=torch.Generator().manual_seed(1))
    made = Resampler.from_tensors({name: tensor.half() for name, tensor in tensors.items()})
    halves = {name: tensor.half().float() for name, tensor in tensors.items()}
    found = made(features)
    assert found.shape == (3, 4, 40) and found.dtype == torch.float32
    for picture in range(3):
        right = literal(halves, features[picture])
        assert float((found[picture] - right).abs().max()) < 1e-5 * float(right.abs().max())


def test_the_sizes_of_the_published_files() -> None:
    """Of ip-adapter-plus_sd15 and ip-adapter-plus_sdxl_vit-h, by their tensors' shapes."""
    for width, output in ((768, 768), (1280, 2048)):
        with torch.device("meta"):
            made = Resampler(
                features=1280, width=width, output=output, queries=16, depth=4, hidden=4 * width, inner=width
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        assert shapes["latents"] == (1, 16, width) and shapes["proj_out.weight"] == (output, width)
        assert shapes["layers.3.0.to_kv.weight"] == (2 * width, width)
        assert shapes["layers.3.1.1.weight"] == (4 * width, width) and "layers.3.1.1.bias" not in shapes
        assert len(shapes) == 7 + 4 * (7 + 4)


def test_a_missing_tensor_is_named() -> None:
    tensors = random_resampler(output=40)
    del tensors["layers.1.0.to_out.weight"]
    with pytest.raises(KeyError, match=r"layers\.1\.0\.to_out\.weight"):
        Resampler.from_tensors(tensors)
