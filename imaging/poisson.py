"""Gradient-domain blending: Pérez, Gangnet, Blake, "Poisson Image Editing", SIGGRAPH 2003.

The result f keeps the gradients of the source inside the hole and meets the destination at its edge. For every pixel p of
the hole and its neighbours q inside the picture (equation 7 of the paper):

    sum over q of (f_p - f_q)  =  sum over q of v_pq,     f_q = destination_q for q outside of the hole.

The unknown solved for is the correction u = f - source. Without mixing its right-hand side is zero except along the hole's
edge, so u is harmonic, and a few steps of multigrid-preconditioned conjugate gradients suffice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .masks import hole_of
from .morphology import bounding_boxes
from .pictures import common_count

MAX_STEPS = 100
"""Steps of the solver before it gives up. The default tolerance took at most 9 in trials of up to 2048 x 2048 pixels."""

# Of Jacobi's step in the smoother; above 1/2, and below 1 so that the finest checkerboard is damped too.
DAMPING = 0.85

# Largest error found over largest error estimated, when the estimate is met: up to 4.1, on hard holes of 64 to 512 pixels
# (all but one pixel unknown, thin walls, 1 to 3 pixels high) against solutions to 1e-8.
CAUTION = 4


@torch.no_grad()
def poisson_blend(
    source: torch.Tensor,
    destination: torch.Tensor,
    mask: torch.Tensor,
    mixed: bool = False,
    tolerance: float = 1e-3,
) -> torch.Tensor:
    """Blends `source` into the hole of `destination` so that no seam is left.

    `source` and `destination` are [B, C, H, W] in [0, 1], `mask` is as for `as_mask_batch`; a batch of 1 goes
    with every picture. The hole is all of the mask above its noise (`hole_of`), however gray.

    Outside of the hole the result equals `destination` bit for bit. Inside, it has the source's gradients; with `mixed`,
    for each pair of neighbours and each channel the stronger of both pictures' gradients (equation 13). The source's
    pixels right outside of the hole count: they give the gradients across the edge. Where the hole touches the picture's
    border there is no condition (natural, Neumann). A hole that covers the whole picture has no edge to meet: there the
    result is the source. Values inside the hole are clamped to [0, 1] at the end.

    `tolerance` is the largest error of a pixel against the exact solution, in units of the picture (1/255 is one level of
    8 bits; the default is a quarter of a level). The error is estimated, with a margin, not bounded by a proof.

    Computed in float32 (float64 where both pictures are), on the destination's device; the result has the destination's
    dtype. The inputs are not changed.

    Raises ValueError for shapes that do not fit together, for a tolerance that is not positive, and for pixels that are
    NaN or infinite; RuntimeError where the tolerance is not reached (one too small for float32, or absurd pixel values).
    """
    if not tolerance > 0:
        raise ValueError(f"The tolerance of Poisson blending must be above 0; it is {tolerance}.")
    source, destination, hole = matching_batches(source, destination, mask)
    for name, picture in (("source", source), ("destination", destination)):
        if not picture.isfinite().all():
            raise ValueError(
                f"The {name} of Poisson blending holds NaN or infinite pixels; it must be finite throughout."
            )
    double = source.dtype == destination.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    result = destination.clone()
    for index, inside in enumerate(hole[:, 0]):
        if not inside.any():
            continue
        rows, columns = _surroundings(inside)
        box = (index, slice(None), rows, columns)
        # The host's pictures have the channels last; the solver is faster on planes.
        inside, fill = inside[rows, columns], source[box].to(dtype).contiguous()
        if not inside.all():
            known = destination[box].to(dtype).contiguous()
            fill = fill + _correction(fill, known, inside, mixed, tolerance)
        result[box] = torch.where(inside, fill.clamp(0, 1).to(result.dtype), destination[box])
    return result


def matching_batches(
    source: torch.Tensor, destination: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns source and destination as [B, C, H, W] and the mask's hole as bool [B, 1, H, W], on one device.

    A batch of 1 is repeated (as a view); the device is the destination's. Raises ValueError where the pictures are not
    4-dimensional and floating point, or where sizes, channels or batches do not fit together.
    """
    hole = hole_of(mask).to(destination.device)
    for name, picture in (("source", source), ("destination", destination)):
        if picture.ndim != 4 or 0 in picture.shape or not picture.is_floating_point():
            raise ValueError(
                f"The {name} must be a picture [B, C, H, W] of floating point; it is {picture.dtype} {list(picture.shape)}."
            )
    if source.shape[1:] != destination.shape[1:] or hole.shape[2:] != destination.shape[2:]:
        raise ValueError(
            f"Source [C, H, W] = {list(source.shape[1:])}, destination {list(destination.shape[1:])} and mask "
            f"[H, W] = {list(hole.shape[2:])} differ; resize them to one size."
        )
    batch = common_count(source=len(source), destination=len(destination), mask=len(hole))
    source = source.to(destination.device)
    return (
        source.expand(batch, -1, -1, -1),
        destination.expand(batch, -1, -1, -1),
        hole.expand(batch, -1, -1, -1),
    )


def _surroundings(inside: torch.Tensor) -> tuple[slice, slice]:
    """The rows and columns of the hole's bounding box, one pixel wider where the picture goes on."""
    left, top, right, bottom = bounding_boxes(inside)[0].tolist()
    return slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)


def _correction(
    source: torch.Tensor, destination: torch.Tensor, inside: torch.Tensor, mixed: bool, tolerance: float
) -> torch.Tensor:
    """What is to be added to the source inside the hole. Pictures [C, H, W], `inside` bool [H, W], neither all nor none."""
    difference = destination - source
    edge = difference.masked_fill(inside, 0)
    right_side = torch.zeros_like(difference)
    for axis in (1, 2):
        last = difference.shape[axis] - 1
        before, after = right_side.narrow(axis, 0, last), right_side.narrow(axis, 1, last)
        before += edge.narrow(axis, 1, last)
        after += edge.narrow(axis, 0, last)
        if mixed:
            stronger = destination.diff(dim=axis).abs() > source.diff(dim=axis).abs()
            flow = difference.diff(dim=axis).mul_(stronger)
            before -= flow
            after += flow
    right_side *= inside
    return _solve(_levels(inside, right_side), right_side, tolerance)


@dataclass
class _Level:
    """A weighted graph Laplacian on a grid [H, W], zero outside of the hole, and room to work in."""

    inside: torch.Tensor
    diagonal: torch.Tensor
    right: torch.Tensor
    """[H, W - 1]: the link of each pixel to the one on its right."""
    down: torch.Tensor
    """[H - 1, W]"""
    jacobi: torch.Tensor
    """DAMPING / diagonal, zero outside of the hole."""
    correction: torch.Tensor
    residual: torch.Tensor


def _levels(inside: torch.Tensor, like: torch.Tensor) -> list[_Level]:
    """The Laplacian of the hole, and its coarser copies down to a single cell.

    A coarse cell belongs to the hole if any of its four does. Its links are half the sum of those it stands for (the
    same energy on twice the spacing). Its ties to the known pixels are the whole sum: these lie nearer to a coarse
    cell's centre than its neighbours do. With half the sum the solver takes twice the steps.
    """
    every = torch.ones_like(like[0])
    right = (inside[:, 1:] & inside[:, :-1]).to(like.dtype)
    down = (inside[1:] & inside[:-1]).to(like.dtype)
    ties = (_sum_of_links(every[:, 1:], every[1:]) - _sum_of_links(right, down)) * inside
    levels = []
    while True:
        diagonal = ties + _sum_of_links(right, down)
        inside = diagonal > 0
        jacobi = torch.where(inside, DAMPING / diagonal, 0)
        room = like.new_empty(2, len(like), *diagonal.shape)
        levels.append(_Level(inside.to(like.dtype), diagonal, right, down, jacobi, room[0], room[1]))
        if diagonal.numel() == 1:
            return levels
        right, down = _sum_of_pairs(right[:, 1::2], 0) / 2, _sum_of_pairs(down[1::2], 1) / 2
        ties = _sum_of_pairs(_sum_of_pairs(ties, 0), 1)


def _sum_of_links(right: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    total = right.new_zeros(right.shape[0], down.shape[1])
    total[:, 1:] += right
    total[:, :-1] += right
    total[1:] += down
    total[:-1] += down
    return total


def _sum_of_pairs(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums rows (axis 0) or columns (1) two by two; an odd last one stays alone."""
    if values.shape[axis] % 2:
        values = F.pad(values, (0, 0, 0, 1) if axis == 0 else (0, 1))
    return values.unflatten(axis, (-1, 2)).sum(axis + 1)


def _laplacian(level: _Level, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    torch.mul(level.diagonal, values, out=out)
    out[:, :, 1:].addcmul_(level.right, values[:, :, :-1], value=-1)
    out[:, :, :-1].addcmul_(level.right, values[:, :, 1:], value=-1)
    out[:, 1:].addcmul_(level.down, values[:, :-1], value=-1)
    out[:, :-1].addcmul_(level.down, values[:, 1:], value=-1)
    return out


def _coarsen(values: torch.Tensor, axis: int) -> torch.Tensor:
    """The transpose of `_refine`: conjugate gradients need a symmetric preconditioner."""
    values = values.transpose(axis, -1)
    even, odd = values[..., ::2], values[..., 1::2]
    cells, pairs = even.shape[-1], odd.shape[-1]
    coarse = even * 0.75
    coarse[..., :pairs].add_(odd, alpha=0.75)
    coarse[..., 1:].add_(odd[..., : cells - 1], alpha=0.25)
    coarse[..., :-1].add_(even[..., 1:], alpha=0.25)
    coarse[..., 0].add_(even[..., 0], alpha=0.25)
    coarse[..., cells - 1 : pairs].add_(odd[..., cells - 1 :], alpha=0.25)
    return coarse.transpose(axis, -1)


def _refine(coarse: torch.Tensor, axis: int, out: torch.Tensor) -> torch.Tensor:
    """Linear interpolation between the centres of the cells, constant beyond the outermost ones."""
    coarse, fine = coarse.transpose(axis, -1), out.transpose(axis, -1)
    before, after = coarse[..., :-1], coarse[..., 1:]
    fine[..., 0] = coarse[..., 0]
    fine[..., -1] = coarse[..., -1]
    torch.lerp(after, before, 0.25, out=fine[..., 2::2])
    torch.lerp(before, after, 0.25, out=fine[..., 1:-1:2])
    return out


def _precondition(levels: list[_Level], right_side: torch.Tensor) -> torch.Tensor:
    """One V-cycle: an approximate solution. It lies in the finest level's `correction`."""
    level, coarser = levels[0], levels[1:]
    values, residual = level.correction, level.residual
    torch.mul(right_side, level.jacobi, out=values)
    if not coarser:
        return values.div_(DAMPING)
    torch.sub(right_side, _laplacian(level, values, residual), out=residual)
    coarse = _precondition(coarser, _coarsen(_coarsen(residual, 1), 2))
    between = coarse.new_empty(*coarse.shape[:2], values.shape[2])
    values.addcmul_(_refine(_refine(coarse, 2, between), 1, residual), level.inside)
    torch.sub(right_side, _laplacian(level, values, residual), out=residual)
    return values.addcmul_(residual, level.jacobi)


def _solve(levels: list[_Level], right_side: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Preconditioned conjugate gradients, for each channel of [C, H, W] on its own.

    The preconditioner is close to the inverse, so its answer to the residual is an estimate of the error itself: where
    its largest value is within the tolerance the search ends, and it is added for a last step.
    """
    finest = levels[0]
    residual = right_side.clone()
    solution, direction, image = torch.zeros_like(residual), torch.zeros_like(residual), torch.empty_like(residual)
    old_progress = None
    estimate = float("inf")
    for _ in range(MAX_STEPS):
        error = _precondition(levels, residual)
        lowest, highest = error.aminmax()
        estimate = CAUTION * max(-lowest.item(), highest.item())
        if estimate <= tolerance:
            return solution.add_(error)
        progress = _dot(residual, error, finest.residual)
        # A channel that is solved already has no progress to divide by.
        if old_progress is not None:
            direction.mul_((progress / old_progress).nan_to_num(0.0))
        direction.add_(error)
        old_progress = progress
        _laplacian(finest, direction, image)
        length = (progress / _dot(direction, image, finest.residual)).nan_to_num(0.0)
        solution.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
    raise RuntimeError(
        f"Poisson blending stopped after {MAX_STEPS} steps with an estimated error of {estimate:.2g}, above {tolerance:.2g}: are "
        "there pixels far outside of 0 to 1 in the pictures?"
    )


def _dot(one: torch.Tensor, other: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """The inner product of each channel, [C, 1, 1]; not a matrix product, which a GPU may round to TF32."""
    return torch.mul(one, other, out=room).sum((1, 2), keepdim=True)
