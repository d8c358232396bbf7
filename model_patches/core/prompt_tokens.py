"""Which positions of a prompt's embedding are the prompt's own words, and which are the ends of its text.

A text encoder of CLIP's reads the start-of-text token (SOT), the words, the end-of-text token (EOT) behind them, and padding. A
quality suffix is text, but not the user's. Methods differ in what they read: some the words alone, others the end of the text
with them. `PromptTokens` has both sets; each method's module says which of them its paper and its released code take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .autograd import full_precision

TOKENS_KEY = "truefill_prompt_tokens"
"""Key in a CONDITIONING's options: what each token is, [1, tokens]: WORD, END, or 0 for all others."""

WORD, END = 1, 2

CHUNK = 77
"""Tokens that a CLIP text encoder reads at a time; a longer prompt is encoded in several chunks."""

QUALITY_SUFFIX = "Full HD, 4K, high quality, high resolution"
"""The suffix that HD-Painter's authors put behind every prompt."""

_Chunks = list[list[tuple[Any, ...]]]


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """The tokens of one prompt's embedding that are the prompt's own; both bool [1, tokens], or [B, tokens] where the embedding
    is a batch of prompts that differ in them."""

    words: torch.Tensor
    ends: torch.Tensor
    """The end of the text of each chunk that holds one of the words, and the end of the whole text."""

    @property
    def words_and_ends(self) -> torch.Tensor:
        return self.words | self.ends

    def of_batch(self, pictures: int) -> PromptTokens:
        """The same for so many pictures, over which the host repeats a batch of prompts."""
        if len(self.words) == 1:
            return self
        numbers = torch.arange(pictures) % len(self.words)
        return PromptTokens(self.words[numbers], self.ends[numbers])


def prompt_attention(query: torch.Tensor, key: torch.Tensor, heads: int, tokens: torch.Tensor) -> torch.Tensor:
    """The attention that each pixel pays to the prompt's own tokens, all of them together, in [0, 1]: [rows, pixels].

    `query` [rows, pixels, channels] and `key` [rows, text, channels] are the projections of a cross-attention, `tokens` a bool
    tensor [1 or rows, text]. Softmax over all tokens, mean over heads.
    """
    rows, pixels, channels = query.shape
    q = full_precision(query).view(rows, pixels, heads, channels // heads).transpose(1, 2)
    k = full_precision(key).view(rows, -1, heads, channels // heads).transpose(1, 2)
    probabilities = ((q @ k.transpose(-1, -2)) * (channels // heads) ** -0.5).softmax(dim=-1)
    return (probabilities * tokens[:, None, None]).sum(dim=-1).mean(dim=1)


def encode_prompt(clip: Any, prompt: str, suffix: str = "") -> list[list[Any]]:
    """Encodes `prompt` (and `suffix` behind it) into CONDITIONING that carries the prompt's token set.

    Works with the CLIP of SD1.5 and SD2 (one text encoder) and of SDXL (two). Weights `(word:1.3)`, `embedding:name` and
    prompts of any length are the host's. Raises ValueError for a CLIP of another family.
    """
    text = f"{prompt}, {suffix}" if suffix else prompt
    tokens = clip.tokenize(text)
    require_clip(tokens)
    own = clip.tokenize(prompt, return_word_ids=True)
    full = clip.tokenize(text, return_word_ids=True)
    found = [token_kinds(own[encoder], full[encoder]) for encoder in full]
    length = min(kinds.shape[1] for kinds in found)
    # Where two encoders disagree a word counts as one: both embeddings of a place are one row of the context.
    cut = torch.stack([kinds[:, :length] for kinds in found])
    kinds = torch.where((cut == WORD).any(dim=0), WORD, cut.amax(dim=0))
    return clip.encode_from_tokens_scheduled(tokens, add_dict={TOKENS_KEY: kinds})


def require_clip(tokens: dict[str, Any]) -> None:
    """Raises ValueError for what a CLIP of a family without CLIP's own text encoders has tokenized."""
    unknown = set(tokens) - {"l", "g", "h"}
    if unknown:
        raise ValueError(
            f"This CLIP has the text encoder(s) {', '.join(sorted(tokens))}; TrueFill's prompt nodes need the CLIP of an SD1.5, "
            "SD2 or SDXL checkpoint."
        )


def token_kinds(own: _Chunks, full: _Chunks) -> torch.Tensor:
    """What each token is of a longer text that begins with the prompt, [1, total tokens of `full`].

    `own` and `full` are the host tokenizer's chunks of (token, weight, word id) for the prompt alone and for the whole
    text; word id 0 marks SOT, EOT and padding. WORD: the first words of the text, as many as the prompt has. END: the EOT of each
    chunk that holds one of them, and the EOT of the whole text.
    """
    words_left = sum(token[2] != 0 for chunk in own for token in chunk)
    kinds: list[int] = []
    for chunk in full:
        is_word = [token[2] != 0 for token in chunk]
        end = max((i for i, word in enumerate(is_word) if word), default=0) + 1
        has_end = words_left > 0 or chunk is full[-1]
        for position, word in enumerate(is_word):
            if word:
                kinds.append(WORD if words_left > 0 else 0)
                words_left -= 1
            else:
                kinds.append(END if has_end and position == end else 0)
    return torch.tensor([kinds])


def prompt_tokens(options: dict[str, Any], text: torch.Tensor) -> PromptTokens:
    """The tokens of one CONDITIONING entry, of its options and its embedding `text` [B, tokens, channels].

    Conditioning from `TrueFillEncodePrompt` says which tokens are its own. Where a node of the host has made the embedding
    longer (Conditioning Concat), the tokens it appended are not the prompt's own.

    Conditioning from any other node does not say it, and an embedding cannot be turned back into words. SD1.5's shows where its
    text ends: the pooled output is its EOT's row. Elsewhere, and in later chunks of 77, every token but the SOT counts as a word.
    """
    length = text.shape[1]
    kinds = torch.zeros(1, length, dtype=torch.long)
    known = options.get(TOKENS_KEY)
    if known is not None:
        shared = min(length, known.shape[1])
        kinds[:, :shared] = known[:1, :shared]
    else:
        kinds[:, torch.arange(length) % CHUNK != 0] = WORD
        ends = _ends_of_texts(text, options.get("pooled_output"))
        kinds = kinds.repeat(len(ends), 1)
        for prompt, end in enumerate(ends):
            if end is not None:
                kinds[prompt, end] = END
                kinds[prompt, end + 1 : CHUNK] = 0
    return PromptTokens(kinds == WORD, kinds == END)


def _ends_of_texts(text: torch.Tensor, pooled: torch.Tensor | None) -> list[int | None]:
    """The places in the first chunk of `text` [B, tokens, channels] whose rows are `pooled` [1 or B, channels]; None without one.

    One for each text of the batch, or a single one where they are the same.
    """
    if pooled is None or pooled.shape[-1] != text.shape[-1] or len(pooled) not in (1, len(text)):
        return [None]
    ends = [_end_of_text(own, row) for own, row in zip(text, pooled.expand(len(text), -1), strict=True)]
    return ends if len(set(ends)) > 1 else ends[:1]


def _end_of_text(text: torch.Tensor, pooled: torch.Tensor) -> int | None:
    """The place in the first chunk of `text` [tokens, channels] whose row is `pooled` [channels]."""
    if not pooled.any():
        return None
    row = full_precision(pooled).to(text.device)
    apart = (full_precision(text[1:CHUNK]) - row).abs().amax(dim=1)
    # The padding behind it is near it, never equal; half precision rounds both alike.
    hits = (apart <= 1e-5 * row.abs().max()).nonzero()[:, 0].tolist()
    return 1 + hits[0] if hits else None
