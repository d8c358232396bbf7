"""The text encoder of PowerPaint 2.1's branch: CLIP ViT-L with learned tokens for its tasks.

Each of `P_ctxt` (what lies around), `P_shape` and `P_obj` (a thing) is 10 vectors. As released they lie beside the embedding,
under `token_embedding.trainable_embeddings`, and the embedding's own are `token_embedding.wrapped`; other copies have them as
the embedding's last 30 rows, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import read_tensors
from .painternet import POWERPAINT

TOKENS: tuple[str, ...] = ("P_ctxt", "P_shape", "P_obj")
VECTORS = 10
"""Of each token."""
VOCABULARY, WIDTH = 49408, 768
"""Of CLIP ViT-L's own embedding."""
_EMBEDDING = "text_model.embeddings.token_embedding"


@dataclass(frozen=True, eq=False)
class TaskEncoder:
    """state: CLIP's tensors by transformers' names. vectors: of each token of TOKENS, [10, width]."""

    state: Mapping[str, torch.Tensor]
    vectors: Mapping[str, torch.Tensor]


def read_task_encoder(path: str | Path) -> TaskEncoder:
    """The encoder in a file. Raises ValueError, one sentence, for one that can't be read or is another."""
    path = Path(path)
    return task_encoder(read_tensors(path, POWERPAINT), path.name)


def task_encoder(tensors: Mapping[str, torch.Tensor], name: str) -> TaskEncoder:
    """The encoder of a file's tensors. Raises ValueError that begins with the file's `name`."""
    state = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{_EMBEDDING}.")}
    own = {key.removeprefix(f"{_EMBEDDING}."): of for key, of in tensors.items() if key.startswith(f"{_EMBEDDING}.")}
    embedding = own.get("wrapped.weight", own.get("weight"))
    vectors = {
        token: own[f"trainable_embeddings.{token}"] for token in TOKENS if f"trainable_embeddings.{token}" in own
    }
    if embedding is not None and not vectors:
        rows = embedding[VOCABULARY:]
        embedding = embedding[:VOCABULARY]
        if len(rows) == VECTORS * len(TOKENS):
            vectors = dict(zip(TOKENS, rows.split(VECTORS), strict=True))
    if embedding is None or len(vectors) != len(TOKENS):
        what = "a branch" if "conv_in_condition.weight" in tensors else "a plain CLIP" if own else "no text encoder"
        raise ValueError(
            f"{name} is {what}, but the text encoder of PowerPaint's branch is needed, which has the tokens "
            f"{', '.join(TOKENS)}: PowerPaint_Brushnet/pytorch_model.bin of {POWERPAINT}."
        )
    if embedding.shape[1] != WIDTH:
        raise ValueError(
            f"{name} is a text encoder of width {embedding.shape[1]}, but the one of PowerPaint's branch, CLIP ViT-L, has "
            f"{WIDTH}: PowerPaint_Brushnet/pytorch_model.bin of {POWERPAINT}."
        )
    return TaskEncoder({**state, f"{_EMBEDDING}.weight": embedding}, vectors)
