"""Random weights of subject adapters, under the names and in the shapes of the published files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


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
