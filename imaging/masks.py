"""Hole masks on the grids a model works on. 1 means hole, 0 means known, values between mean partly covered."""

import torch
import torch.nn.functional as F


def as_mask_batch(mask: torch.Tensor) -> torch.Tensor:
    """Returns a mask given as [H, W], [B, H, W] or [B, C, H, W] (first channel counts) as float32 [B, 1, H, W] in [0, 1].

    Raises ValueError for any other number of dimensions and for an empty batch. NaN counts as known.
    """
    if mask.ndim == 2:
        mask = mask[None, None]
    elif mask.ndim == 3:
        mask = mask[:, None]
    elif mask.ndim == 4:
        mask = mask[:, :1]
    else:
        raise ValueError(
            f"A mask needs 2 to 4 dimensions ([H, W], [B, H, W] or [B, C, H, W]); this one has {mask.ndim}."
        )
    if 0 in mask.shape:
        raise ValueError(f"The mask is empty: its shape is {list(mask.shape)}. Connect a mask with at least one pixel.")
    return mask.float().nan_to_num(nan=0.0).clamp(0.0, 1.0)


def resize_mask(mask: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """A mask as for `as_mask_batch`, at a picture's `size` (height, width): float32 [B, 1, height, width] in [0, 1].

    A mask of another size is resized, bilinear and anti-aliased.
    """
    mask = as_mask_batch(mask)
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    resized = F.interpolate(mask, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    # The weights add up to 1 only within rounding; inside the hole the mask shall stay 1.
    return torch.where(resized > 1 - 1e-5, 1.0, resized.clamp(min=0.0))


def coverage(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """How much of each cell of a grid of `size` (height, width) the hole covers: the area mean.

    `mask` is [B, 1, H, W]; the result [B, 1, height, width], in [0, 1]. A grid finer than the mask repeats its pixels.
    """
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    return F.adaptive_avg_pool2d(mask, size)


def hole_cells(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Which cells of a grid of `size` (height, width) belong to the hole: those of which at least half is hole.

    A cell that is exactly half hole counts, as in HD-Painter's released code. A hole too small to cover half of any cell keeps
    the cell (or cells) it covers most, so that no hole is lost at a coarse level. `mask` is [B, 1, H, W]; the result is a bool
    tensor [B, height, width].
    """
    covered = coverage(mask, size)[:, 0]
    # An area mean of exactly a half may come out a rounding below it.
    cells = covered >= 0.5 - 1e-6
    most = covered.amax(dim=(1, 2), keepdim=True)
    lost = ~cells.any(dim=2, keepdim=True).any(dim=1, keepdim=True) & (most > 0)
    return cells | (lost & (covered == most))
