"""Which positions of a prompt's embedding are the prompt's own words, and which are the ends of its text.

A text encoder of CLIP's reads the start-of-text token (SOT), the words, the end-of-text token (EOT) behind them, and padding. A
quality suffix is text, but not the user's. Methods differ in what they read: some the words alone, others the end of the text
with them. `PromptTokens` has both sets; each method's module says which of them its paper and its released code take.

T5 has no start of text. Language models (Qwen, Mistral, Gemma ...) read the prompt in the middle of a template: what it adds is
found by encoding nothing, so that no template has to be known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .autograd import full_precision

TOKENS_KEY = "truefill_prompt_tokens"
"""Key in a CONDITIONING's options: what each token is, [1 or B, tokens]: WORD, END, or 0 for all others."""

WORD, END = 1, 2

CHUNK = 77
"""Tokens that a CLIP text encoder reads at a time; a longer prompt is encoded in several chunks."""

QUALITY_SUFFIX = "Full HD, 4K, high quality, high resolution"
"""The suffix that HD-Painter's authors put behind every prompt."""

CLIPS = {"l", "g", "h"}
"""What the host calls CLIP's own text encoders."""

STREAMS = {
    frozenset({"l", "t5xxl"}): (("t5xxl",),),
    frozenset({"l", "g", "t5xxl"}): (("l", "g"), ("t5xxl",)),
    frozenset({"l", "g", "t5xxl", "llama"}): (("t5xxl",),),
    frozenset({"qwen3_06b", "t5xxl"}): (("t5xxl",),),
}
"""Whose tokens follow each other in the context, by the set of a CLIP's text encoders: Flux's, SD3's, HiDream's and Anima's."""

T5_IDS = "t5xxl_ids"
"""Key in Anima's CONDITIONING: T5's tokens, of which the model makes the rows of its context; the embedding is Qwen3's."""

_Chunks = list[list[tuple[Any, ...]]]


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """The tokens of one prompt's embedding that are the prompt's own; all bool [1, tokens], or [B, tokens] where the embedding
    is a batch of prompts that differ in them."""

    words: torch.Tensor
    ends: torch.Tensor
    """The end of the text of each chunk that holds one of the words, and the end of the whole text."""
    are_known: bool
    """Whether the conditioning says which they are; else they are guessed (`prompt_tokens`)."""

    @property
    def words_and_ends(self) -> torch.Tensor:
        return self.words | self.ends

    def of_batch(self, pictures: int) -> PromptTokens:
        """The same for so many pictures, over which the host repeats a batch of prompts."""
        if len(self.words) == 1:
            return self
        numbers = torch.arange(pictures) % len(self.words)
        return replace(self, words=self.words[numbers], ends=self.ends[numbers])


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

    Works with the text encoders of SD1.5, SD2 and SDXL, with any single one (Qwen-Image's, Z-Image's, Flux2's, Chroma's ...) and
    with the sets in STREAMS. Weights `(word:1.3)`, `embedding:name` and prompts of any length are the host's. Raises ValueError
    for another set of text encoders, and where those that have the words were not loaded.
    """
    text = f"{prompt}, {suffix}" if suffix else prompt
    tokens = clip.tokenize(text)
    streams = _streams_of(tokens)
    own, full = (clip.tokenize(of, return_word_ids=True) for of in (prompt, text))
    if set(tokens) <= CLIPS:
        (stream,) = streams
        kinds = _kinds_of_clips([token_kinds(own[encoder], full[encoder]) for encoder in stream])
        return clip.encode_from_tokens_scheduled(tokens, add_dict={TOKENS_KEY: kinds})
    empty = clip.tokenize("", return_word_ids=True)
    found: list[torch.Tensor] = []
    for stream in streams:
        if not any(_is_loaded(clip, encoder) for encoder in stream):
            continue
        if set(stream) <= CLIPS:
            kinds = _kinds_of_clips([token_kinds(own[encoder], full[encoder]) for encoder in stream])
        else:
            (encoder,) = stream
            kinds = _kinds_in_template(*(_flat(of[encoder]) for of in (empty, own, full)))
        found.append(kinds)
    if not found:
        wanted = ", ".join(encoder for stream in streams for encoder in stream)
        raise ValueError(
            f"This CLIP was loaded without the text encoder(s) {wanted}, whose tokens are the words of the prompt: load it with "
            "them, or use CLIP Text Encode."
        )
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    return [
        [embedding, {**options, TOKENS_KEY: _of_length(found, len(options.get(T5_IDS, embedding[0])))}]
        for embedding, options in conditioning
    ]


def _is_loaded(clip: Any, encoder: str) -> bool:
    """Whether a CLIP has the weights of a text encoder for which it has a tokenizer; SD3 and HiDream go without some."""
    model, name = getattr(clip, "cond_stage_model", None), f"clip_{encoder}" if encoder in CLIPS else encoder
    return not hasattr(model, name) or getattr(model, name) is not None


def _streams_of(tokens: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    if set(tokens) <= CLIPS:
        return (tuple(tokens),)
    if len(tokens) == 1:
        return ((next(iter(tokens)),),)
    streams = STREAMS.get(frozenset(tokens))
    if streams is None:
        raise ValueError(
            f"This CLIP has the text encoders {', '.join(sorted(tokens))}, and Encode Prompt does not know which of their tokens "
            "are whose: use CLIP Text Encode, or load the text encoders of SD1.5, SD2, SDXL, SD3, Flux, Qwen-Image or Z-Image."
        )
    return streams


def _kinds_of_clips(found: list[torch.Tensor]) -> torch.Tensor:
    """The kinds of text encoders whose embeddings of a place are one row of the context."""
    length = min(kinds.shape[1] for kinds in found)
    cut = torch.stack([kinds[:, :length] for kinds in found])
    # Where two encoders disagree a word counts as one.
    return torch.where((cut == WORD).any(dim=0), WORD, cut.amax(dim=0))


def _kinds_in_template(
    empty: Sequence[tuple[Any, ...]], own: Sequence[tuple[Any, ...]], full: Sequence[tuple[Any, ...]]
) -> torch.Tensor:
    """What each token of `full` is, [1, tokens]; all three are a text encoder's (token, weight, word id), for no prompt, for the
    prompt alone and for the whole text."""
    words = sum(own[place][2] != 0 for place in _inserted(empty, own))
    inserted = _inserted(empty, full)
    kinds = torch.zeros(1, len(full), dtype=torch.long)
    for place in [place for place in inserted if full[place][2] != 0][:words]:
        kinds[:, place] = WORD
    return kinds


def _inserted(empty: Sequence[tuple[Any, ...]], full: Sequence[tuple[Any, ...]]) -> range:
    """The places of `full` that are not the beginning or the end of `empty`; what pads a text at its end is passed over."""
    empty, full = _without_padding(empty), _without_padding(full)
    shortest = min(len(empty), len(full))
    start = next((i for i in range(shortest) if not _same(empty[i], full[i])), shortest)
    end = next((i for i in range(shortest - start) if not _same(empty[-1 - i], full[-1 - i])), shortest - start)
    return range(start, len(full) - end)


def _without_padding(tokens: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    return tokens[: max((place for place, token in enumerate(tokens) if token[2] != 0), default=-1) + 1]


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two tokens are the same; an embedding that a prompt names is a tensor, and none of the template's."""
    return isinstance(one[0], int) and isinstance(other[0], int) and one[0] == other[0]


def _flat(chunks: _Chunks) -> list[tuple[Any, ...]]:
    return [token for chunk in chunks for token in chunk]


def _of_length(found: list[torch.Tensor], length: int) -> torch.Tensor:
    """The kinds of an embedding of so many tokens: some families cut the beginning of the template off, or lack an encoder."""
    whole = torch.cat(found, dim=1)
    fitting = next((kinds for kinds in (whole, *found) if kinds.shape[1] == length), None)
    if fitting is not None:
        return fitting
    if len(found) > 1 or whole.shape[1] < length:
        raise ValueError(
            f"The text encoders made {length} tokens of a prompt that has {whole.shape[1]}, so that Encode Prompt does not know "
            "which are whose: use CLIP Text Encode."
        )
    return whole[:, -length:]


def require_clip(tokens: dict[str, Any]) -> None:
    """Raises ValueError for what a CLIP of a family without CLIP's own text encoders has tokenized."""
    unknown = set(tokens) - CLIPS
    if unknown:
        raise ValueError(
            f"This CLIP has the text encoder(s) {', '.join(sorted(tokens))}; this needs the CLIP of an SD1.5, SD2 or SDXL "
            "checkpoint."
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
    longer (Conditioning Concat), the tokens it appended are not the prompt's own. Flux2 gets its texts with others before them.

    Conditioning from any other node does not say it (`are_known`), and an embedding cannot be turned back into words. SD1.5's
    shows where its text ends: the pooled output is its EOT's row. Elsewhere, and in later chunks of 77, every token but the SOT
    counts as a word.
    """
    length = text.shape[1]
    known = options.get(TOKENS_KEY)
    kinds = torch.zeros(1 if known is None else len(known), length, dtype=torch.long)
    if known is not None:
        raw = options.get("cross_attn")
        before = 0 if raw is None or T5_IDS in options else max(length - raw.shape[1], 0)
        shared = min(length - before, known.shape[1])
        kinds[:, before : before + shared] = known[:, :shared]
    else:
        kinds[:, torch.arange(length) % CHUNK != 0] = WORD
        ends = _ends_of_texts(text, options.get("pooled_output"))
        kinds = kinds.repeat(len(ends), 1)
        for prompt, end in enumerate(ends):
            if end is not None:
                kinds[prompt, end] = END
                kinds[prompt, end + 1 : CHUNK] = 0
    return PromptTokens(kinds == WORD, kinds == END, known is not None)


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
