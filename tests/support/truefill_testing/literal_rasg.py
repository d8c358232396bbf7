"""RASG (HD-Painter, section 3.4, eq. 7 to 9) written out, on the scores `literal_unet(..., record=True)` returns.

    a_k = mean over layers and heads of the raw cross-attention scores at 1/32 of the image, k in ind(prompt)     eq. 8
    S   = - sum over k of mean over pixels of BCE_with_logits(a_k - 1, M)                                         eq. 9
    g   = dS / dx,   noise <- g / std(g) per picture                                                              eq. 7

The shift by 1 and the mean over pixels (eq. 9 has the sum) are the released code's. Here S is minus
the cross entropy, so that g, added as noise, lowers it; eq. 9 as printed is the cross entropy itself, which eq. 7 would
raise: a slip. The mean of g stays, nothing is masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .literal_painta import level_mask
from .literal_unet import CrossScores

SHIFT = 1.0


def mean_maps(recorded: list[CrossScores], row: int) -> torch.Tensor:
    """Eq. 8 for one batch row: the mean over layers and heads, [N, L]; all layers lie on the same grid."""
    return torch.stack([layer.scores[row].mean(dim=0) for layer in recorded]).mean(dim=0)


def objective(recorded: list[CrossScores], row: int, tokens: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """Eq. 9 for one conditional row: S, a scalar, <= 0. ind(prompt) `tokens` bool [L], `hole` [1, 1, h, w].

    Several conditional rows of one picture: the picture's S is the sum of theirs.
    """
    maps = mean_maps(recorded, row)
    mask = level_mask(hole, recorded[0].grid).flatten().to(maps.dtype)
    score = maps.new_zeros(())
    for k in tokens.nonzero().flatten().tolist():
        score = score - F.binary_cross_entropy_with_logits(maps[:, k] - SHIFT, mask, reduction="mean")
    return score


def normalised(gradient: torch.Tensor) -> torch.Tensor:
    """g / std(g) of each picture of [B, C, H, W]: unbiased, over channels and pixels, the mean not subtracted."""
    return torch.stack([g / g.std() for g in gradient])
