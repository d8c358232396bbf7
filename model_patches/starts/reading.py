"""What cross-attention says about whether a noisy picture is going to have the prompt in its hole: a number for each picture.

A block's raw scores q k^T / sqrt(d) become probabilities, the softmax over the text; the mean over heads and over the blocks of a
grid is a map of each token. The score is how much higher the words' maps are in the hole than beside it. There are other ways to
read attention, HD-Painter's S among them: `python dev.py bench score` says which of them can tell, and this one tells best.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...imaging.masks import hole_cells
from ..core.autograd import full_precision
from ..core.call_rows import PromptRows
from ..core.protocol import MethodRun, UNetCall
from ..core.score_gradient import Grid
from ..core.unet_attention import Place, TransformerPlace, add_patch


def probabilities(raw: torch.Tensor) -> torch.Tensor:
    """Raw scores of a block [rows, heads, pixels, text] -> a map of each token [rows, pixels, text]: the mean over heads."""
    return raw.softmax(dim=-1).mean(dim=1)


def inside_less_outside(maps: torch.Tensor, tokens: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """[rows], higher is better: how much higher maps [rows, pixels, text] are in the hole than beside it, on average.

    The sum over `tokens` [rows, text] (bool); `hole` [rows, pixels] (bool). A part without pixels counts as 0.
    """
    shares = [part.to(maps.dtype) / part.sum(dim=1, keepdim=True).clamp(min=1) for part in (hole, ~hole)]
    return ((maps * (shares[0] - shares[1])[..., None]).sum(dim=1) * tokens).sum(dim=1)


class AttentionReader(MethodRun):
    """Hands the raw scores of chosen cross-attentions to `note`, for each group of rows of a positive prompt.

    `note` is called with the place, the grid (height, width), the rows, and raw scores [B, heads, pixels, text], in float32.
    """

    def __init__(
        self, factors: Collection[int], note: Callable[[TransformerPlace, Grid, PromptRows, torch.Tensor], None]
    ) -> None:
        self._factors = factors
        self._note = note

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        chosen = {t.place: t for t in call.places if t.factor in self._factors}

        def read(
            n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            place: Place = (*extra_options["block"], extra_options["block_index"])
            if place in chosen:
                height, width = extra_options["activations_shape"][-2:]
                pictures = len(n) // len(call.rows)
                for number, rows in enumerate(call.rows):
                    if rows.conditional:
                        here = slice(number * pictures, (number + 1) * pictures)
                        # What other packs have appended to the context is no text.
                        text = context[here, : call.text_tokens]
                        with torch.no_grad():
                            raw = raw_scores(chosen[place], n[here], text)
                        self._note(chosen[place], (height, width), rows, raw)
            return n, context, value

        add_patch(call.options, "attn2_patch", read)
        return nullcontext()


def raw_scores(place: TransformerPlace, n: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """q k^T / sqrt(d) [B, heads, pixels, text] of n [B, pixels, channels] and context [B, text, channels], in float32."""
    cross = place.cross
    query, key = (
        full_precision(part).unflatten(2, (cross.heads, -1)).transpose(1, 2)
        for part in (cross.to_q(n), cross.to_k(context))
    )
    return query @ key.transpose(-1, -2) * cross.dim_head**-0.5


def cells_of(hole: torch.Tensor, rows: PromptRows, grid: Grid) -> torch.Tensor:
    """Which cells of a grid, in the part of the picture that the rows see, are hole: bool [B, pixels] of `hole` [B, 1, h, w]."""
    return hole_cells(rows.cut(hole), grid).flatten(1)


class AttentionScore:
    """The score of each picture in one evaluation of the model: the sum over levels and positive prompts.

    `hole` is [B, 1, h, w], how much of each latent cell is hole. It reads the calls that its `reader` edits, or, as a
    `score_gradient.Score`, what it is given.
    """

    def __init__(self, hole: torch.Tensor, factors: Collection[int]) -> None:
        self._hole = hole
        # Levels of a very small picture may have the same grid.
        self._maps: dict[tuple[PromptRows, int, Grid], list[torch.Tensor]] = defaultdict(list)
        self.reader = AttentionReader(factors, self._note)

    def read(
        self, place: TransformerPlace, grid: Grid, rows: PromptRows, n: torch.Tensor, context: torch.Tensor
    ) -> None:
        self._note(place, grid, rows, raw_scores(place, n, context))

    def _note(self, place: TransformerPlace, grid: Grid, rows: PromptRows, raw: torch.Tensor) -> None:
        self._maps[rows, place.factor, grid].append(probabilities(raw))

    @property
    def has_read(self) -> bool:
        """Whether a positive prompt acted."""
        return bool(self._maps)

    def value(self) -> torch.Tensor:
        """[B]; raises RuntimeError where nothing was read."""
        found = []
        for (rows, _, grid), maps in self._maps.items():
            cells = cells_of(self._hole, rows, grid).to(maps[0].device)
            tokens = rows.tokens.words_and_ends.to(maps[0].device)
            # A prompt that is limited to a part of the picture without a hole has no say.
            found.append(inside_less_outside(torch.stack(maps).mean(dim=0), tokens, cells) * cells.any(dim=1))
        return torch.stack(found).sum(dim=0)
