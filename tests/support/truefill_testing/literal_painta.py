"""PAIntA (HD-Painter, section 3.3, eq. 5) written out: one attention matrix after the other, no shortcut.

For one batch row with raw self-attention scores A [heads, N, N], N = height * width of the level:

    s_j = sum over k in ind(prompt) of mean over heads of softmax(A_cross)_jk        relevance of pixel j
    s   = 3x3 smoothing of s as an image (released code, not in the paper)
    c_j = clip((s_j - median(s)) / max(s), 0, 1)                                     over all pixels, the hole included
    c'  = 1 - strength (1 - c)                                                       ours: strength 1 is the paper
    A_ij <- c'_j A_ij   where pixel i lies in the hole and pixel j does not, all heads     (eq. 5)

c is computed from a conditional row; the unconditional row of the same picture uses it on its own scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F

Place = tuple[str, int, int]
"""("input" | "middle" | "output", index of the block, index of the transformer block inside its SpatialTransformer)"""

PAINTA_FACTORS = (2, 4)
"""Latent to level downsampling: 1/16 and 1/32 of the image."""

SMOOTHING = (0.2119, 0.5761, 0.2119)


class Row(TypedDict):
    """What one row of a UNet batch is: its role, the picture it belongs to and, if conditional, ind(prompt) [L]."""

    role: Literal["cond", "uncond"]
    sample: int
    tokens: torch.Tensor | None


@dataclass
class Painta:
    """PAIntA for one sampling step: the rows of the next UNet call, the hole, and c as it is found.

    `hole` [pictures, 1, h, w] on the latent grid, 1 = to be filled. `c` maps (place, picture) to the list of c [N] of
    that picture's conditional rows, in the order they were evaluated (before `strength`). Where the conditional and
    the unconditional rows go through the UNet in separate calls, hand the `c` of the first call to the second; it must
    start empty in every step.
    """

    rows: list[Row]
    hole: torch.Tensor
    strength: float = 1.0
    smooth: bool = True
    c: dict[tuple[Place, int], list[torch.Tensor]] = field(default_factory=dict)

    def applies(self, place: Place, factor: int) -> bool:
        """Every transformer block of the input and output blocks at 1/16 and 1/32; never the middle block."""
        return place[0] != "middle" and factor in PAINTA_FACTORS

    def reweight(self, place: Place, grid: tuple[int, int], scores: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        """Steps 2 to 5: raw self scores [rows, heads, N, N], raw cross scores [rows, heads, N, L] -> new self scores.

        A conditional row uses its own c, an unconditional row the mean of its picture's (a KeyError if none came yet);
        the unconditional rows' entries of `cross` are not looked at.
        """
        own_c = {}
        for index, row in enumerate(self.rows):
            if row["role"] == "cond":
                own_c[index] = relevance_weights(cross[index], row["tokens"], grid, self.smooth)
                self.c.setdefault((place, row["sample"]), []).append(own_c[index])
        new_scores = []
        for index, row in enumerate(self.rows):
            sample = row["sample"]
            if row["role"] == "cond":
                c = own_c[index]
            else:
                c = torch.stack(self.c[place, sample]).mean(dim=0)
            hole = level_mask(self.hole[sample : sample + 1], grid).flatten()
            new_scores.append(scores[index] * score_factors(c, hole, self.strength))
        return torch.stack(new_scores)


def level_mask(hole: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Hole [B, 1, h, w] in [0, 1] -> bool [B, 1, *grid]: the area average, kept where >= 0.5.

    A hole too small to keep any cell keeps the one(s) with the greatest average (compared in float64); an empty hole
    stays empty.
    """
    average = F.adaptive_avg_pool2d(hole.double(), grid)
    kept = average >= 0.5
    for picture in range(hole.shape[0]):
        if not kept[picture].any() and (hole[picture] > 0).any():
            kept[picture] = average[picture] == average[picture].max()
    return kept


def smooth3x3(image: torch.Tensor) -> torch.Tensor:
    """Image [h, w] -> [h, w]: 3x3 kernel, the outer product of SMOOTHING with itself, zero padding."""
    height, width = image.shape
    padded = F.pad(image, (1, 1, 1, 1))
    smoothed = torch.zeros_like(image)
    for down, weight_down in enumerate(SMOOTHING):
        for right, weight_right in enumerate(SMOOTHING):
            smoothed = smoothed + weight_down * weight_right * padded[down : down + height, right : right + width]
    return smoothed


def relevance_weights(cross: torch.Tensor, tokens: torch.Tensor, grid: tuple[int, int], smooth: bool) -> torch.Tensor:
    """Raw cross scores [heads, N, L], ind(prompt) bool [L] -> c [N] in [0, 1).

    The median is torch's: the lower one of an even number of pixels. max(s) > 0 as every softmax weight is; only an
    empty ind(prompt) would give 0 / 0, and is refused.
    """
    if not tokens.any():
        raise ValueError("ind(prompt) is empty: c is 0 / 0")
    s = cross.softmax(dim=-1).mean(dim=0)[:, tokens].sum(dim=-1)
    if smooth:
        s = smooth3x3(s.reshape(grid)).flatten()
    return ((s - s.median()) / s.max()).clamp(0.0, 1.0)


def score_factors(c: torch.Tensor, hole: torch.Tensor, strength: float) -> torch.Tensor:
    """Eq. 5 as factors [N, N]: 1 - strength (1 - c_j) where pixel i is in the hole and j is not; elsewhere 1."""
    weakened = 1.0 - strength * (1.0 - c)
    hole_to_known = hole[:, None] & ~hole[None, :]
    return torch.where(hole_to_known, weakened[None, :], torch.ones_like(c)[None, :])
