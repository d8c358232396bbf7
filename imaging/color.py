"""Matches the colors of a generated fill to its surroundings.

Reinhard, Ashikhmin, Gooch, Shirley, "Color Transfer between Images", 2001, for the means; Pitié and Kokaram, "The Linear
Monge-Kantorovitch Linear Colour Mapping for Example-Based Colour Transfer", 2007, for the covariances.
"""

from __future__ import annotations

from typing import Literal

import torch

from .morphology import distance_to_hole
from .poisson import matching_batches

MIN_PIXELS = 64
"""With fewer pixels in the band, the covariance is not trusted, and only the means are matched."""

# A level of 8 bits as the least standard deviation: below it, colors differ by rounding alone.
QUANTUM = 1 / 255

MAX_GAIN = 4.0
"""The most, and its inverse the least, that the covariance match stretches any direction of color."""


@torch.no_grad()
def match_color(
    source: torch.Tensor,
    destination: torch.Tensor,
    mask: torch.Tensor,
    band: int = 32,
    mode: Literal["mean", "covariance"] = "mean",
    strength: float = 1.0,
    everywhere: bool = False,
) -> torch.Tensor:
    """Shifts the colors of `source` inside the hole by what its surroundings are off from `destination`.

    `source` and `destination` are [B, C, H, W] in [0, 1], `mask` is as for `as_mask_batch`; a batch of 1 goes with every
    picture. The hole is all of the mask above its noise, however gray. `source` is a whole generated picture: it shows the
    known content outside of the hole too, in its own tone. Statistics come from the band alone: the known pixels no farther
    than `band` pixels (Euclidean, centre to centre) from the nearest pixel of the hole. The map that takes the source's
    statistics there to the destination's is applied to the source inside the hole:

    - "mean": x + mean_d - mean_s, for each channel;
    - "covariance": T (x - mean_s) + mean_d with T = S^-1/2 (S^1/2 D S^1/2)^1/2 S^-1/2, the linear optimal transport
      between Gaussians of covariance S (source) and D (destination). One level of 8 bits is added to both as a least
      deviation, and T stretches by 1/4 to 4 (MAX_GAIN), so that flat colors do not turn noise into contrast. A band of
      fewer than 64 (MIN_PIXELS) pixels matches the means only.

    `strength` from 0 to 1 goes from the source to the full match. `everywhere` maps the whole source, also outside of the
    hole, for a blend that looks at both sides of the edge.

    Returns [B, C, H, W] in the source's dtype and on the destination's device: inside the hole the matched colors,
    clamped to [0, 1], outside the source bit for bit. The source comes back unchanged at strength 0, where there is no
    hole, where the hole covers the whole picture, and where source and destination are equal in the band (a source that
    was composited already has nothing to tell). The inputs are not changed.

    Raises ValueError for shapes that do not fit together, a band below 1, an unknown mode, a strength out of range, and
    NaN or infinite pixels in the band.
    """
    if band < 1 or band != int(band):
        raise ValueError(f"The band is {band}, but must be a whole number of pixels, 1 or more.")
    if mode not in ("mean", "covariance"):
        raise ValueError(f"The mode of color matching must be 'mean' or 'covariance'; it is '{mode}'.")
    if not 0 <= strength <= 1:
        raise ValueError(f"The strength of color matching must be from 0 to 1; it is {strength}.")
    source, destination, hole = matching_batches(source, destination, mask)
    result = source.clone()
    if strength == 0:
        return result
    for index, inside in enumerate(hole[:, 0]):
        near = seam_band(inside, int(band))
        # On the CPU in double precision: the same on every device, and the sum over a million pixels stays exact enough.
        known, wanted = (picture[index][:, near].cpu().double() for picture in (source, destination))
        if not (known.isfinite().all() and wanted.isfinite().all()):
            raise ValueError(
                "The pictures to match hold NaN or infinite pixels around the hole; they must be finite there."
            )
        if torch.equal(known, wanted):
            continue
        mean, target = known.mean(dim=1, keepdim=True), wanted.mean(dim=1, keepdim=True)
        part = torch.ones_like(inside) if everywhere else inside
        fill = source[index][:, part].cpu().double()
        matched = fill - mean
        if mode == "covariance" and known.shape[1] >= MIN_PIXELS:
            matched = _transport(_covariance(known - mean), _covariance(wanted - target)) @ matched
        matched = fill.lerp(matched + target, strength).clamp(0, 1)
        result[index][:, part] = matched.to(result)
    return result


def seam_band(inside: torch.Tensor, width: int) -> torch.Tensor:
    """The pixels outside of a hole that are at most `width` pixels from it (Euclidean, between centres).

    `inside` is bool [H, W], as is the result. Empty where there is no hole, or nothing else.
    """
    return distance_to_hole(inside.float(), width)[0, 0].isfinite() & ~inside


def _covariance(centred: torch.Tensor) -> torch.Tensor:
    """[C, C] from [C, N] of mean 0, with QUANTUM as the least standard deviation added."""
    least = QUANTUM**2 * torch.eye(len(centred), dtype=centred.dtype)
    return centred @ centred.T / centred.shape[1] + least


def _transport(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The symmetric T with T source T = target (before its gains are limited); both are positive definite [C, C]."""
    root, inverse = _power(source, 0.5), _power(source, -0.5)
    exact = inverse @ _power(root @ target @ root, 0.5) @ inverse
    gains, directions = torch.linalg.eigh(exact)
    return directions * gains.clamp(1 / MAX_GAIN, MAX_GAIN) @ directions.T


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of a symmetric matrix, whose eigenvalues are at least QUANTUM**4: those of the product of two covariances."""
    values, directions = torch.linalg.eigh(matrix)
    return directions * values.clamp_min(QUANTUM**4) ** exponent @ directions.T
