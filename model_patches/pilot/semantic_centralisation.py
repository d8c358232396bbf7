"""Semantic centralisation: the prompt's cross-attention belongs into the hole.

PILOT (arXiv 2407.08019), section 4.1.1, equations 10 to 14, as in the released code: in each cross-attention but those of the
finest level the probabilities of the prompt's words (without the end of the text), before semantic boundary control, are summed
over tokens and averaged over heads and pixels, in the known part and in the hole; the loss is the mean over layers of the first
less the second.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from ..core.prompt_tokens import prompt_attention
from ..core.protocol import MethodRun, UNetCall
from ..core.unet_attention import Place, add_patch, use_differentiable_attention
from .semantic_boundary import KnownPixels


class Centralisation(MethodRun):
    """Reads the loss from the calls of the UNet that make up one evaluation, of which a graph is recorded.

    `hole` is [B, 1, h, w], 0 or 1.
    """

    def __init__(self, hole: torch.Tensor):
        self._known = KnownPixels(hole)
        self._sums: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
        self._calls = 0

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        self._calls += 1
        add_patch(call.options, "attn2_patch", _Call(self, self._calls, call, self._known).read)
        use_differentiable_attention(call.options)
        return nullcontext()

    def call_unet(self, call_next: Callable[[UNetCall], torch.Tensor], call: UNetCall) -> torch.Tensor:
        return call_next(call.ordinary())

    def add(self, call: int, prompt: int, value: torch.Tensor) -> None:
        """Notes one layer's difference [B] for the rows of one prompt of a call."""
        total, layers = self._sums.get((call, prompt), (0.0, 0))
        self._sums[call, prompt] = (total + value, layers + 1)

    @property
    def has_read(self) -> bool:
        """Whether any prompt acted: one that is limited in time may not."""
        return bool(self._sums)

    def loss(self) -> torch.Tensor:
        """L_sc of each picture, [B]: the mean over layers, and over prompts where there are several."""
        of_prompts = [total / layers for total, layers in self._sums.values()]
        return torch.stack(of_prompts).mean(dim=0)


class _Call:
    """One call of the UNet."""

    def __init__(self, reader: Centralisation, number: int, call: UNetCall, known: KnownPixels):
        self._reader = reader
        self._number = number
        self._cross = {t.place: t.cross for t in call.places if t.factor > 1}
        self._read: set[Place] = set()
        self._rows = call.rows
        self._known = known

    def read(
        self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """An `attn2_patch`: n [rows, pixels, channels] and the context as they are."""
        place: Place = (*extra_options["block"], extra_options["block_index"])
        cross = self._cross.get(place)
        if cross is None:
            return n, context, value
        height, width = extra_options["activations_shape"][-2:]
        known = self._known.of(self._rows, (height, width), n.device)[..., 0]
        pictures = len(n) // len(self._rows)
        for number, of_prompt in enumerate(self._rows):
            here = slice(number * pictures, (number + 1) * pictures)
            query, key = cross.to_q(n[here]), cross.to_k(context[here])
            # What other packs have appended to the context are no tokens of the prompt.
            words = of_prompt.tokens.words
            tokens = F.pad(words, (0, key.shape[1] - words.shape[1])).to(n.device)
            difference = _difference(prompt_attention(query, key, cross.heads, tokens), known[here])
            # Blocks that run again for the backward pass compute it again.
            if place not in self._read:
                self._reader.add(self._number, number, difference)
        self._read.add(place)
        return n, context, value


def _difference(heard: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The mean of [B, pixels] over known pixels less that over the hole's, [B]; 0 where there are none of one kind."""
    inside = known.to(heard.dtype)
    counts = inside.sum(dim=1), (1.0 - inside).sum(dim=1)
    both = (counts[0] > 0) & (counts[1] > 0)
    weights = inside / counts[0].clamp(min=1.0)[:, None] - (1.0 - inside) / counts[1].clamp(min=1.0)[:, None]
    return (heard * weights).sum(dim=1) * both
