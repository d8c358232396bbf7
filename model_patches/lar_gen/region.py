"""Where a subject is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..core.autograd import as_ordinary
from ..core.call_rows import PromptRows


def pixel_weights(region: torch.Tensor, rows: Sequence[PromptRows], grid: tuple[int, int]) -> torch.Tensor:
    """How much each pixel of a call's rows reads the subject on a grid (height, width), [rows, pixels, 1].

    `region` is [B, 1, h, w] on the latent grid; a pixel reads as much as the region covers of it.
    """
    # Ordinary tensors, not inference ones: RASG's backward pass goes through them.
    with torch.inference_mode(False):
        parts = [F.adaptive_avg_pool2d(of_prompt.cut(as_ordinary(region)), grid) for of_prompt in rows]
        return torch.cat(parts).flatten(2).transpose(1, 2)
