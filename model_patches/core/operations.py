"""The host's layers, for networks of our own."""

from __future__ import annotations

from typing import Any


def in_memory(operations: Any) -> Any:
    """The host's `operations` with layers whose weights are there at once, as in torch.

    With its dynamic VRAM, the default on an NVIDIA GPU, the host's linear layers have no weight before a file is loaded into
    them, and its embeddings one without memory: what looks at a fresh network (its state dict, its widths, its parameters) would
    find holes. They are as ever in subclasses that load in a way of their own.
    """

    class Linear(operations.Linear):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            super()._load_from_state_dict(*arguments)

    class Embedding(operations.Embedding):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            super()._load_from_state_dict(*arguments)

    return type(operations.__name__, (operations,), {"Linear": Linear, "Embedding": Embedding})
