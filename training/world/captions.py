"""Captions of scenes, in slightly varying words and order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .attributes import COLOURS, PATTERNS, SHAPES, SceneObject
from .backgrounds import BACKGROUNDS, PHRASES

_NOUNS = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _wordings(shape: str, colour: str, pattern: str) -> tuple[str, ...]:
    """All wordings of an object, the usual one first."""
    if pattern == "plain":
        return (_with_article(f"{colour} {shape}"), _with_article(f"plain {colour} {shape}"))
    return (
        _with_article(f"{colour} {pattern} {shape}"),
        _with_article(f"{pattern} {colour} {shape}"),
        _with_article(f"{colour} {shape} with {_NOUNS[pattern]}"),
    )


def local_caption(shape: str, colour: str, pattern: str, rng: np.random.Generator | None = None) -> str:
    """Words for one object, such as "a red striped star"; `rng` varies the wording.

    Raises ValueError for an attribute that the world does not have.
    """
    for value, known in ((shape, SHAPES), (colour, COLOURS), (pattern, PATTERNS)):
        if value not in known:
            raise ValueError(f"The world has no {value!r}; choose one of {', '.join(known)}.")
    wordings = _wordings(shape, colour, pattern)
    # The usual wording is the most frequent one: it is what a prompt says.
    if rng is None or rng.random() < 0.6:
        return wordings[0]
    return wordings[rng.integers(1, len(wordings))]


def global_caption(
    objects: Sequence[SceneObject], background: str, rng: np.random.Generator | None = None, omission: float = 0.0
) -> str:
    """Words for a scene, such as "a red striped star and a blue circle on a wooden table".

    `rng` varies order and wording. With it each object is left out with probability `omission`, though never all of
    them, as captions of real pictures leave things out.
    """
    shown = list(objects)
    phrase = PHRASES[background][0]
    if rng is not None:
        shown = [shown[i] for i in rng.permutation(len(shown))]
        kept = [item for item in shown if rng.random() >= omission]
        shown = kept or shown[:1]
        phrase = str(rng.choice(PHRASES[background]))
    words = [local_caption(item.shape, item.colour, item.pattern, rng) for item in shown]
    if not words:
        return phrase
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if rng is not None and rng.random() < 0.2:
        return f"{phrase}, {listed}"
    return f"{listed} {phrase}"


def all_phrases() -> Iterator[str]:
    """Phrases that together hold every word and every comma that a caption may hold."""
    for shape in SHAPES:
        for colour in COLOURS:
            for pattern in PATTERNS:
                yield from _wordings(shape, colour, pattern)
    for background in BACKGROUNDS:
        for phrase in PHRASES[background]:
            yield f"{phrase}, and"
