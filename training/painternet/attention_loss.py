"""PainterNet's actual-token attention loss: the branch's cross-attentions shall look at the words in the hole, and only there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def actual_token_attention_loss(maps: Sequence[torch.Tensor], tokens: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """The mean over layers i of || mean over the tokens j of A_ij - m_i ||^2 (equation 4), and over the rows.

    maps: of each layer, after the softmax: [B, heads, h w, L]; the mean of the heads counts, which the paper does not say.
    tokens: bool [B, L], true for the prompt's own tokens, without start and end. A row without any counts 0.
    hole: [B, 1, h, w], 1 in the hole; on coarser grids it is each cell's share.
    """
    share = tokens.float() / tokens.sum(dim=1, keepdim=True).clamp(min=1)
    has_tokens = tokens.any(dim=1).float()
    losses = []
    for attention in maps:
        factor = round((hole.shape[-2] * hole.shape[-1] / attention.shape[2]) ** 0.5)
        wanted = F.avg_pool2d(hole, factor).flatten(1)
        looked = (attention.float().mean(dim=1) @ share[:, :, None])[..., 0]
        losses.append((looked - wanted).square().sum(dim=1) * has_tokens)
    return torch.stack(losses).mean()
