"""What the rows of a model call are: the host batches several conditionings, in any order, into one call.

A `RowsCond` rides along with each conditioning through the host's own batching and area cropping, so that the call itself
receives, for each group of its rows, the role, the tokens and the area that belong to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .prompt_tokens import PromptTokens, prompt_tokens

ROWS_KEY = "truefill_rows"
"""Name of the keyword argument under which a model call receives its tuple of `PromptRows`."""

Area = tuple[int, int, int, int]

Conds = list[list[dict[str, Any]] | None]
"""What the host evaluates at once: the conditioning entries of each role (positive, negative ...); None is left out."""


@dataclass(frozen=True, eq=False)
class PromptRows:
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


class RowsCond:
    """A host conditioning value (see the host's `comfy.conds`) whose batched form is a tuple of `PromptRows`."""

    def __init__(self, rows: PromptRows, latent_size: tuple[int, int]):
        self.rows = rows
        self._latent_size = latent_size

    def process_cond(self, batch_size: int, area: Sequence[int] | None = None, **kwargs: object) -> RowsCond:
        cut: Area | None = None
        if area is not None:
            # Latents with frames have an area of six numbers; a picture has one frame.
            (height, width), (top, left) = area[: len(area) // 2][-2:], area[-2:]
            cut = (height, width, top, left)
        if cut == (*self._latent_size, 0, 0):
            cut = None
        with torch.inference_mode(False):
            tokens = self.rows.tokens.of_batch(batch_size)
        return RowsCond(replace(self.rows, area=cut, tokens=tokens), self._latent_size)

    def can_concat(self, other: RowsCond) -> bool:
        return True

    def concat(self, others: Sequence[RowsCond]) -> tuple[PromptRows, ...]:
        return (self.rows, *(other.rows for other in others))

    def size(self) -> list[int]:
        """Its share in the host's memory estimate: none."""
        return [1]


def with_rows(role: str, entry: dict[str, Any], latent_size: tuple[int, int]) -> dict[str, Any]:
    """A copy of a guider's conditioning entry that says in each call which rows are its own; the entry itself without text.

    `role` is the guider's name for it ("positive", "negative" ...), `latent_size` (height, width) in cells. Guiders with more
    than two mark those that are as good as a negative prompt (Perp-Neg's empty one).
    """
    text = entry["model_conds"].get("c_crossattn")
    if text is None:
        return entry
    with torch.inference_mode(False):
        is_negative = "negative" in (role, entry.get("prompt_type"))
        rows = PromptRows(not is_negative, prompt_tokens(entry, text.cond))
    return {**entry, "model_conds": {**entry["model_conds"], ROWS_KEY: RowsCond(rows, latent_size)}}


def with_all_rows(conds: Conds, latent_size: tuple[int, int]) -> Conds:
    """What is evaluated at once, with the rows of entries that are none of the guider's own known as well.

    Those are negative prompts: of a second model (the host's Dual Model CFG Guider), of nodes that evaluate an empty prompt.
    """
    return [
        entries
        and [
            entry if ROWS_KEY in entry["model_conds"] else with_rows("negative", entry, latent_size)
            for entry in entries
        ]
        for entries in conds
    ]


def has_weight(entry: dict[str, Any]) -> bool:
    """Whether anything of a guider's conditioning entry counts: the host multiplies what it predicts by its strength and mask."""
    if "default" in entry:
        # It takes what the others leave, whatever its strength.
        return True
    mask = entry.get("mask")
    return entry.get("strength", 1.0) != 0 and (
        mask is None or (entry.get("mask_strength", 1.0) != 0 and bool(mask.any()))
    )


def by_role(conds: Conds) -> tuple[Conds | None, Conds | None]:
    """`conds` without the negative prompts', and the negative prompts' alone; None where nothing is left of them."""
    negative = [any(_is_negative(entry) for entry in entries or ()) for entries in conds]
    positives = [None if skip else entries for skip, entries in zip(negative, conds, strict=True)]
    negatives = [entries if take else None for take, entries in zip(negative, conds, strict=True)]
    return positives if any(positives) else None, negatives if any(negatives) else None


def joined(
    positives: Sequence[torch.Tensor], negatives: Sequence[torch.Tensor], of_negatives: Conds
) -> list[torch.Tensor]:
    """The answers to the two halves of `by_role` as one list; `of_negatives` is the second half."""
    return [
        first if entries is None else second
        for first, second, entries in zip(positives, negatives, of_negatives, strict=True)
    ]


def _is_negative(entry: dict[str, Any]) -> bool:
    cond = entry["model_conds"].get(ROWS_KEY)
    return cond is None or not cond.rows.conditional


def repeat_to_batch(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Cuts or repeats the rows of `tensor` to `batch` rows, as the host does with masks and latents."""
    if tensor.shape[0] < batch:
        repeats = -(-batch // tensor.shape[0])
        tensor = tensor.repeat(repeats, *[1] * (tensor.ndim - 1))
    return tensor[:batch]
