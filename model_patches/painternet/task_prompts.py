"""PowerPaint's tasks as prompts of its branch: a learned token says what to do, the model's own prompt what shall be seen.

As in the released code (version 2.1): the branch's prompts are a token alone; fitting the mask's shape is a mixture of two, after
the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import comfy.sd
import torch

from ...weights.powerpaint import TaskEncoder
from ..core.prompt_tokens import CHUNK


class Task(NamedTuple):
    """Tokens of the positive and the negative prompt; `fitted` is what the positive's is mixed from where it fits the mask."""

    positive: str
    negative: str
    fitted: str | None = None


TASKS: Mapping[str, Task] = {
    "text": Task("P_obj", "P_obj"),
    "shape": Task("P_ctxt", "P_ctxt", "P_shape"),
    "removal": Task("P_ctxt", "P_obj"),
    "outpainting": Task("P_ctxt", "P_obj"),
    "context": Task("P_ctxt", ""),
}
"""A prompt in words; one that fits the mask's shape; nothing but what lies around; the picture goes on; as around, undirected."""


class TaskClip:
    """The branch's text encoder as the host runs it."""

    def __init__(self, encoder: TaskEncoder) -> None:
        self._clip: Any = comfy.sd.load_text_encoder_state_dicts([dict(encoder.state)])
        self._vectors = encoder.vectors

    def conditioning(self, token: str) -> list[list[Any]]:
        """CONDITIONING of a token alone, or of nothing ("")."""
        tokens = self._clip.tokenize("")
        if token:
            (start, *rest) = tokens["l"][0]
            vectors = [(vector, 1.0) for vector in self._vectors[token].float()]
            tokens["l"] = [[start, *vectors, *rest][:CHUNK]]
        return self._clip.encode_from_tokens_scheduled(tokens)

    def prompts(self, task: str, fitting: float) -> tuple[list[list[Any]], list[list[Any]]]:
        """Positive and negative CONDITIONING of a task of TASKS. `fitting` in [0, 1]: how closely "shape" fits the mask."""
        of = TASKS[task]
        sides = []
        for token in (of.positive, of.negative):
            side = self.conditioning(token)
            if of.fitted is not None:
                side = _mixed(self.conditioning(of.fitted), side, fitting)
            sides.append(side)
        positive, negative = sides
        return positive, negative


def _mixed(first: list[list[Any]], second: list[list[Any]], share: float) -> list[list[Any]]:
    """`share` of the first's embedding and the rest of the second's."""
    ((one, options),), ((other, _),) = first, second
    return [[torch.lerp(other, one, share), options]]
