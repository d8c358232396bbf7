"""How new and old are mixed around a hole, as Fooocus and DreamMix do it."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from .masks import hole_of


def square_ramp(mask: torch.Tensor, feather: int) -> torch.Tensor:
    """How much of the new picture shows: float32 [B, 1, H, W], 1 in the hole and less from pixel to pixel outside of it.

    `mask` is as for `as_mask_batch`; all that is gray is hole. Outside it is (256 - 256 d / feather) / 255, between 0 and 1,
    where d counts pixels as a king walks (DreamMix's released code has 32 for `feather`). 0: the hole itself.
    """
    hole = hole_of(mask)
    if not feather:
        return hole.float()
    ramps = []
    for own in hole[:, 0].cpu().numpy():
        # Without a hole there is nothing to be near to: scipy answers -1.
        steps = np.asarray(ndimage.distance_transform_cdt(~own, metric="chessboard")) if own.any() else own + feather
        ramps.append(torch.from_numpy((256.0 - 256.0 * steps / feather) / 255.0))
    return torch.stack(ramps)[:, None].clamp(0.0, 1.0).to(hole.device, torch.float32)
