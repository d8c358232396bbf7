"""Contrast between the two views of many subjects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ..world.subjects import Look, look_of

SUBJECTS = 1_000_000
"""Subjects of a split to draw from."""
_ALIKE = 4
_TEMPERATURE = 0.07


def alike_looks(split: str, numbers: np.ndarray) -> list[Look]:
    """The looks of some of a split's subjects, but four in a row have the tones and the shape of the first of them.

    Without, tones would tell nearly all subjects apart, and nothing else would be learned.
    """
    looks = [look_of(split, int(number)) for number in numbers]
    firsts = [looks[place - place % _ALIKE] for place in range(len(looks))]
    return [replace(look, tones=first.tones, shape=first.shape) for look, first in zip(looks, firsts, strict=True)]


def _likeness(seen: torch.Tensor) -> torch.Tensor:
    first, second = F.normalize(seen.float(), dim=-1)
    return first @ second.T


def contrast_loss(seen: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of finding each view's other view in a batch, both ways, as CLIP's loss of pictures and texts.

    `seen` is [2, B, C], the vectors of two views of B subjects; likeness is their cosine.
    """
    logits = _likeness(seen) / _TEMPERATURE
    wanted = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted))


def share_found(seen: torch.Tensor) -> float:
    """How often a first view's likest second view is its own subject's; `seen` as above."""
    likest = _likeness(seen).argmax(dim=1).cpu()
    return float((likest == torch.arange(len(likest))).float().mean())
