"""Random weights of subject adapters, under the names and in the shapes of the published files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from devtools.pack import pack_module

_TO_K = re.compile(
    r"model\.diffusion_model\.(\w+)_blocks?\.(\d+)\.(?:1\.)?transformer_blocks\.(\d+)\.attn2\.to_k\.weight"
)


def random_resampler(
    *, output: int, width: int = 128, queries: int = 4, depth: int = 2, features: int = 1280, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The tensors of a resampler, without the prefix `image_proj.`."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        draw = [0.2 * torch.randn(size, generator=generator) for _ in range(2)]
        return {f"{name}.weight": 1.0 + draw[0], f"{name}.bias": draw[1]}

    made = {
        "latents": torch.randn(1, queries, width, generator=generator),
        "proj_in.weight": matrix(width, features),
        "proj_in.bias": 0.1 * torch.randn(width, generator=generator),
        "proj_out.weight": matrix(output, width),
        "proj_out.bias": 0.1 * torch.randn(output, generator=generator),
        **norm("norm_out", output),
    }
    for layer in range(depth):
        attention, feed_forward = f"layers.{layer}.0", f"layers.{layer}.1"
        made |= {
            **norm(f"{attention}.norm1", width),
            **norm(f"{attention}.norm2", width),
            f"{attention}.to_q.weight": 1.5 * matrix(width, width),
            f"{attention}.to_kv.weight": 1.5 * matrix(2 * width, width),
            f"{attention}.to_out.weight": matrix(width, width),
            **norm(f"{feed_forward}.0", width),
            f"{feed_forward}.1.weight": matrix(4 * width, width),
            f"{feed_forward}.3.weight": matrix(width, 4 * width),
        }
    return made


def random_projections(
    crosses: Sequence[Any], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """to_k_ip and to_v_ip for cross-attentions of the host's, in the shapes of their to_k and to_v."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for cross in crosses:
        inner, width = cross.to_k.weight.shape
        pair = [torch.randn(inner, width, generator=generator) / width**0.5 for _ in range(2)]
        made.append((1.5 * pair[0].to(dtype), pair[1].to(dtype)))
    return made


def random_assign(unet: Any, beta: float = 0.5) -> Any:
    """Settings of Assign for a small UNet: a random subject of 5 tokens, and random weights."""
    crosses = {t.place: t.cross for t in pack_module("model_patches.core.unet_attention").transformer_places(unet)}
    width = next(iter(crosses.values())).to_k.weight.shape[1]
    generator = torch.Generator().manual_seed(21)
    subject, nothing = (torch.randn(1, 5, width, generator=generator) for _ in range(2))
    projections = dict(zip(crosses, random_projections(list(crosses.values())), strict=True))
    assign = pack_module("model_patches.lar_gen.decoupled_attention").Assign
    return assign(strength=beta, subject=subject, nothing=nothing, projections=projections)


def write_adapter(path: Path, checkpoint: Path) -> None:
    """An IP-Adapter-Plus file for a checkpoint's UNet, its numbers in the order of diffusers: down, up, middle."""
    found = {}
    with safe_open(checkpoint, framework="pt") as file:
        for key in file.keys():
            if match := _TO_K.fullmatch(key):
                part, block, depth = match.groups()
                found["input output middle".split().index(part), int(block), int(depth)] = file.get_slice(
                    key
                ).get_shape()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"image_proj.{name}": tensor for name, tensor in random_resampler(output=next(iter(found.values()))[1]).items()
    }
    for number, place in enumerate(sorted(found)):
        inner, width = found[place]
        for kind in "kv":
            tensors[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = (
                torch.randn(inner, width, generator=generator) / width**0.5
            )
    save_file(tensors, path)


def write_vision(path: Path) -> None:
    """CLIP ViT-H as tests/support/small_clip_h makes it; the host knows it by a layer that is left over."""
    width, hidden, tokens = 1280, 64, (224 // 56) ** 2 + 1
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = {
        "vision_model.embeddings.class_embedding": matrix(width),
        "vision_model.embeddings.patch_embedding.weight": matrix(width, 3, 56, 56) / 56,
        "vision_model.embeddings.position_embedding.weight": matrix(tokens, width),
        "visual_projection.weight": matrix(1024, width),
        "vision_model.encoder.layers.30.layer_norm1.weight": torch.ones(width),
    }
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for layer in range(3):
        name = f"vision_model.encoder.layers.{layer}"
        norms += [f"{name}.layer_norm1", f"{name}.layer_norm2"]
        sizes = {f"self_attn.{of}_proj": (width, width) for of in ("q", "k", "v", "out")}
        for part, size in {**sizes, "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}.items():
            tensors |= {f"{name}.{part}.weight": matrix(*size), f"{name}.{part}.bias": torch.zeros(size[0])}
    for name in norms:
        tensors |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    save_file(tensors, path)
