"""Which positions of a prompt's embedding are the prompt's own words: ind(prompt) of HD-Painter, section 3.3.

The set holds the words of the user's prompt and the end-of-text token (EOT) behind them, and leaves out the
start-of-text token (SOT), a quality suffix and the padding.
"""

from __future__ import annotations

from typing import Any

import torch

from .autograd import full_precision

TOKENS_KEY = "truefill_prompt_tokens"
"""Key in a CONDITIONING's options: a bool tensor [1, tokens], True where the token belongs to the prompt."""

CHUNK = 77
"""Tokens that a CLIP text encoder reads at a time; a longer prompt is encoded in several chunks."""

QUALITY_SUFFIX = "Full HD, 4K, high quality, high resolution"
"""The suffix that HD-Painter's authors put behind every prompt."""

_Chunks = list[list[tuple[Any, ...]]]


def prompt_attention(query: torch.Tensor, key: torch.Tensor, heads: int, tokens: torch.Tensor) -> torch.Tensor:
    """The attention that each pixel pays to the prompt's own tokens, all of them together, in [0, 1]: [rows, pixels].

    `query` [rows, pixels, channels] and `key` [rows, text, channels] are the projections of a cross-attention, `tokens` a bool
    tensor [1, text]. Softmax over all tokens, mean over heads.
    """
    rows, pixels, channels = query.shape
    q = full_precision(query).view(rows, pixels, heads, channels // heads).transpose(1, 2)
    k = full_precision(key).view(rows, -1, heads, channels // heads).transpose(1, 2)
    probabilities = ((q @ k.transpose(-1, -2)) * (channels // heads) ** -0.5).softmax(dim=-1)
    return probabilities[..., tokens[0]].sum(dim=-1).mean(dim=1)


def encode_prompt(clip: Any, prompt: str, suffix: str = "") -> list[list[Any]]:
    """Encodes `prompt` (and `suffix` behind it) into CONDITIONING that carries the prompt's token set.

    Works with the CLIP of SD1.5 and SD2 (one text encoder) and of SDXL (two). Weights `(word:1.3)`, `embedding:name` and
    prompts of any length are the host's. Raises ValueError for a CLIP of another family.
    """
    text = f"{prompt}, {suffix}" if suffix else prompt
    tokens = clip.tokenize(text)
    unknown = set(tokens) - {"l", "g", "h"}
    if unknown:
        raise ValueError(
            f"This CLIP has the text encoder(s) {', '.join(sorted(tokens))}; TrueFill's prompt nodes need the CLIP of an SD1.5, "
            "SD2 or SDXL checkpoint."
        )
    own = clip.tokenize(prompt, return_word_ids=True)
    full = clip.tokenize(text, return_word_ids=True)
    sets = [prompt_token_set(own[encoder], full[encoder]) for encoder in full]
    length = min(s.shape[1] for s in sets)
    token_set = torch.stack([s[:, :length] for s in sets]).any(dim=0)
    return clip.encode_from_tokens_scheduled(tokens, add_dict={TOKENS_KEY: token_set})


def prompt_token_set(own: _Chunks, full: _Chunks) -> torch.Tensor:
    """The token set of a prompt within a longer text that begins with it.

    `own` and `full` are the host tokenizer's chunks of (token, weight, word id) for the prompt alone and for the whole
    text; word id 0 marks SOT, EOT and padding. Returns a bool tensor [1, total tokens of `full`]: the first words of the
    text, as many as the prompt has, the EOT of each chunk that holds one of them, and the EOT of the whole text.
    """
    words_left = sum(token[2] != 0 for chunk in own for token in chunk)
    chosen: list[bool] = []
    for chunk in full:
        is_word = [token[2] != 0 for token in chunk]
        end = max((i for i, word in enumerate(is_word) if word), default=0) + 1
        has_eot = words_left > 0 or chunk is full[-1]
        for position, word in enumerate(is_word):
            if word:
                chosen.append(words_left > 0)
                words_left -= 1
            else:
                chosen.append(has_eot and position == end)
    return torch.tensor([chosen])


def token_set_of(options: dict[str, Any], length: int) -> torch.Tensor:
    """The token set of one CONDITIONING entry whose embedding has `length` tokens, as a bool tensor [1, length].

    Conditioning from `TrueFillEncodePrompt` says which tokens are its own. Conditioning from any other node does not, and
    an embedding cannot be turned back into words: then every token counts but the SOT of each chunk of 77. Where a node
    of the host has made the embedding longer (Conditioning Concat), the tokens it appended are not the prompt's own.
    """
    known = options.get(TOKENS_KEY)
    if known is None:
        return (torch.arange(length) % CHUNK != 0)[None]
    token_set = torch.zeros(1, length, dtype=torch.bool)
    shared = min(length, known.shape[1])
    token_set[:, :shared] = known[:1, :shared]
    return token_set
