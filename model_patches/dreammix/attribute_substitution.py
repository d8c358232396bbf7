"""Textual attribute substitution (DreamMix, section 3.4, equation 9): a prompt's embedding loses what points along an attribute.

A subject that was tuned on a clay toy stays clay whatever the prompt says. Taking the direction of "clay" out of the embeddings
of "a glass toy" leaves the model nothing to hold on to. As in the released code, the direction is that of the attribute's words
as the text encoder embeds them behind a prefix, and what they are taken from are the prompt's own tokens; where the release
counts words, which goes wrong at a word of several tokens, tokens are counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.prompt_tokens import END, TOKENS_KEY, WORD, PromptTokens, prompt_tokens, require_clip, token_kinds

RAW_POOLED_KEY = "truefill_raw_pooled"
"""Key in a CONDITIONING's options: the pooled output before attributes were taken out of it."""

PREFIX = "a photo of a"


@dataclass(frozen=True, eq=False, kw_only=True)
class Attributes:
    """How a text encoder embeds attribute words.

    tokens: their contextual embeddings [n, channels], a row for each token, in the order of the words.
    pooled: that of the prefix and the words together, [channels]; None for a text encoder without one.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor | None


def attribute_words(text: str) -> list[str]:
    """The words of a list such as "red, light blue"; a comma is no attribute."""
    return text.replace(",", " ").split()


def embed_attributes(clip: Any, words: Sequence[str], prefix: str = PREFIX) -> Attributes:
    """Encodes `words` behind `prefix`, as in "a photo of a red clay".

    Raises ValueError for a CLIP of another family than SD1.5's, SD2's and SDXL's.
    """
    text = " ".join([*prefix.split(), *words])
    tokens = clip.tokenize(text)
    require_clip(tokens)
    encoder = next(iter(tokens))
    chunks, skipped = (clip.tokenize(of, return_word_ids=True)[encoder] for of in (text, prefix))
    before = sum(token[2] != 0 for chunk in skipped for token in chunk)
    own = (token_kinds(chunks, chunks)[0] == WORD).nonzero()[before:, 0]
    embedding, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return Attributes(tokens=embedding[0, own.to(embedding.device)], pooled=None if pooled is None else pooled[0])


def without_attributes(
    conditioning: Sequence[Sequence[Any]],
    attributes: Attributes,
    strength: float = 1.0,
    jointly: bool = False,
    pooled: bool = True,
) -> list[list[Any]]:
    """A new CONDITIONING whose own tokens have lost `attributes`.

    One attribute's token e after another: p <- p - strength (p . e / |e|) e / |e| for each token p of the prompt, never for the
    start, the end or the padding. `jointly` takes out the projection onto all of them at once, after which nothing of any is
    left. `pooled` does the same once with the pooled outputs, and keeps the raw one in the options for a sampler that wants it.

    Raises ValueError for attributes of another text encoder than the conditioning's.
    """
    return [_substituted(entry[0], dict(entry[1]), attributes, strength, jointly, pooled) for entry in conditioning]


def _substituted(
    text: torch.Tensor, options: dict[str, Any], attributes: Attributes, strength: float, jointly: bool, pooled: bool
) -> list[Any]:
    if text.shape[-1] != attributes.tokens.shape[-1]:
        raise ValueError(
            f"The conditioning has embeddings of {text.shape[-1]} channels, and this CLIP makes {attributes.tokens.shape[-1]}: "
            "connect the CLIP that the conditioning was encoded with."
        )
    found = prompt_tokens(options, text)
    # The rows that tell where the text ends are not what they were any more.
    options[TOKENS_KEY] = _kinds(found)
    own = found.words.to(text.device).expand(len(text), -1)
    changed = text.clone()
    changed[own] = _without(text[own], attributes.tokens.to(text.device), strength, jointly)
    before = options.get("pooled_output")
    if pooled and before is not None and attributes.pooled is not None:
        options.setdefault(RAW_POOLED_KEY, before)
        direction = attributes.pooled[None].to(before.device)
        options["pooled_output"] = _without(before, direction, strength, False)
    return [changed, options]


def _kinds(found: PromptTokens) -> torch.Tensor:
    # One row for all texts of a batch: `prompt_tokens` reads no more. A token counts if it is a word of any.
    words, ends = found.words.any(dim=0, keepdim=True), found.ends.any(dim=0, keepdim=True)
    return torch.where(words, WORD, END * ends)


def _without(vectors: torch.Tensor, directions: torch.Tensor, strength: float, jointly: bool) -> torch.Tensor:
    """Vectors [n, channels] less what they have of `directions` [m, channels]."""
    # On the CPU, where every host has double precision.
    result, along = vectors.cpu().double(), directions.cpu().double()
    lengths = along.norm(dim=1)
    along = along[lengths > 0] / lengths[lengths > 0, None]
    if jointly and len(along):
        # Words may repeat, and then the directions are not independent.
        basis, sizes, _ = torch.linalg.svd(along.T, full_matrices=False)
        along = basis.T[sizes > 1e-6 * sizes[0]]
    for direction in along:
        result = result - strength * (result @ direction)[:, None] * direction
    return result.to(vectors)
