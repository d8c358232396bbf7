"""The words of the world as tokens of the host's tokenizer, and as rows of a small embedding table."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

import torch

from ...weights.demo_model import TOKENS
from ..world.captions import all_phrases

_START, _END = 49406, 49407
# What CLIP's tokenizer splits plain lower-case text into before it looks for pieces of words.
_WORDS = re.compile(r"[a-z]+|[^\sa-z]+")


class Vocabulary:
    """A table from tokens of CLIP to rows of a small embedding: row 0 for every token that the world does not use.

    `token_ids` is int64 [rows - 1], in ascending order: row 1 + i belongs to token_ids[i].
    """

    def __init__(self, tokenize: Callable[[str], Sequence[int]]) -> None:
        words = sorted({word for phrase in all_phrases() for word in _WORDS.findall(phrase)})
        tokens = {word: tuple(tokenize(word)) for word in words}
        used = sorted({token for pieces in tokens.values() for token in pieces} | {_START, _END})
        self.token_ids = torch.tensor(used, dtype=torch.int64)
        row = {token: 1 + number for number, token in enumerate(used)}
        self._rows = {word: [row[token] for token in pieces] for word, pieces in tokens.items()}
        self._start, self._end = row[_START], row[_END]

    def rows(self, caption: str, unknown: bool = False) -> list[int]:
        """The 77 rows for a caption of the world, padded with the end token as the host does.

        Raises ValueError for a caption that is too long and KeyError for one with other words, unless `unknown`: then each of
        these is row 0.
        """
        if unknown:
            found = [row for word in _WORDS.findall(caption.lower()) for row in self._rows.get(word, [0])]
            found = found[: TOKENS - 2]
        else:
            found = [row for word in _WORDS.findall(caption) for row in self._rows[word]]
        if len(found) > TOKENS - 2:
            raise ValueError(f"A caption may have {TOKENS - 2} tokens; this one has {len(found)}: {caption!r}.")
        return [self._start, *found] + [self._end] * (TOKENS - 1 - len(found))

    def batch(self, captions: Sequence[str], unknown: bool = False) -> torch.Tensor:
        """The rows [B, 77] (int64) for several captions, as `rows`."""
        return torch.tensor([self.rows(caption, unknown) for caption in captions], dtype=torch.int64)


@cache
def world_vocabulary() -> Vocabulary:
    """The vocabulary over the host's tokenizer for SD1.5."""
    from comfy.sd1_clip import SDTokenizer

    tokenizer = SDTokenizer()
    return Vocabulary(lambda word: tokenizer.tokenizer(word)["input_ids"][1:-1])
