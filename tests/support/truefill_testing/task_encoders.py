"""The text encoder of PowerPaint's branch as released, with random weights: CLIP ViT-L and the tokens beside its embedding."""

from __future__ import annotations

from pathlib import Path

import torch

from devtools.pack import ensure_host

TOKENS = ("P_ctxt", "P_shape", "P_obj")
_EMBEDDING = "text_model.embeddings.token_embedding"


def random_task_encoder(seed: int = 0) -> dict[str, torch.Tensor]:
    """By the released file's names; what is zero takes no space in a file."""
    ensure_host()
    from truefill_testing.random_checkpoints import clip_l_entries

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for entry in clip_l_entries("text_model."):
        made = torch.zeros(1).expand(entry.shape) if entry.fill is None else entry.fill(entry.shape, generator)
        state[entry.name] = made
    state[f"{_EMBEDDING}.wrapped.weight"] = state.pop(f"{_EMBEDDING}.weight")
    for token in TOKENS:
        state[f"{_EMBEDDING}.trainable_embeddings.{token}"] = torch.randn(10, 768, generator=generator)
    return state


def write_task_encoder(path: Path) -> None:
    """Write it as a pickle of tensors."""
    torch.save(random_task_encoder(), path)
