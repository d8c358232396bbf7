"""What the rows of a model call are: the host batches several conditionings, in any order, into one call.

A `ChunkCond` rides along with each conditioning through the host's own batching and area cropping, so that the call
itself receives, for each chunk of its rows, the role, the token set and the area that belong to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .prompt_tokens import PromptTokens

CHUNKS_KEY = "truefill_chunks"
"""Name of the keyword argument under which a model call receives its tuple of `Chunk`."""

Area = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Chunk:
    """The rows of a model call that come from one conditioning entry: one row for each picture of the batch."""

    conditional: bool
    """False for the rows of a negative prompt."""
    tokens: PromptTokens
    area: Area | None = None
    """(height, width, top, left) in latent cells where the conditioning is set to a part of the picture, else None."""

    def cut(self, latent: torch.Tensor) -> torch.Tensor:
        """The part of `latent` [B, C, H, W] that the rows see (a view)."""
        if self.area is None:
            return latent
        height, width, top, left = self.area
        return latent[:, :, top : top + height, left : left + width]


class ChunkCond:
    """A host conditioning value (see the host's `comfy.conds`) whose batched form is a tuple of `Chunk`."""

    def __init__(self, chunk: Chunk, latent_size: tuple[int, int]):
        self.chunk = chunk
        self._latent_size = latent_size

    def process_cond(self, batch_size: int, area: Sequence[int] | None = None, **kwargs: object) -> ChunkCond:
        cut = None if area is None or tuple(area) == (*self._latent_size, 0, 0) else tuple(area)
        return ChunkCond(replace(self.chunk, area=cut), self._latent_size)

    def can_concat(self, other: ChunkCond) -> bool:
        return True

    def concat(self, others: Sequence[ChunkCond]) -> tuple[Chunk, ...]:
        return (self.chunk, *(other.chunk for other in others))

    def size(self) -> list[int]:
        """Its share in the host's memory estimate: none."""
        return [1]


def repeat_to_batch(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Cuts or repeats the rows of `tensor` to `batch` rows, as the host does with masks and latents."""
    if tensor.shape[0] < batch:
        repeats = -(-batch // tensor.shape[0])
        tensor = tensor.repeat(repeats, *[1] * (tensor.ndim - 1))
    return tensor[:batch]
