"""DreamMix written out: the crop, the weights, the fill, attribute substitution, the two stages and the loss.

    crop          the square of the hole and 15 % more, grown until it has k of the picture's height and width
    local stage   steps 0 .. switch - 1 on the crop, its hole filled                                   eq. 3 to 5
    the switch    x^G = picture (1 - w) + decoded x0 w, in the crop's box; encoded as a whole
    global stage  steps switch .. on x^G                                                                     eq. 6
    in a step     x <- m x + (1 - m) (z_bg + sigma n);  x0 <- m x0 + (1 - m) z_bg;  m: the hole, pooled 8 x 8
    the end       y = picture (1 - w) + decoded w
    text          p <- p - strength (p . e / |e|) e / |e|                                                    eq. 9
    loss          mean of tau1 m err^2 + tau2 (1 - m) err^2                                                  eq. 7

Item numbers are those of "Checked against the released code" in shared/design/dreammix.md. Nothing is rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

ENLARGED = 1.15
CELL = 8
"""Pixels of a latent's cell."""
BLURS = ((512, 2), (256, 2), (128, 4), (64, 4), (33, 8), (15, 8), (5, 16), (3, 16))
"""(radius, repeats)"""

Stage = Literal["local", "global"]


# --- The crop


def local_box(hole: np.ndarray, k: float) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (the last two exclusive) of the local stage's crop ("Crop" and item 2).

    hole  [H, W] bool, not empty
    k     0 .. 1: the least share of the picture's height and of its width
    """
    if not hole.any():
        raise ValueError("there is no hole to crop to")
    if not 0.0 <= k <= 1.0:
        raise ValueError("k is a share")
    picture_height, picture_width = hole.shape
    first_row, last_row, first_column, last_column = picture_height, -1, picture_width, -1
    for row in range(picture_height):
        for column in range(picture_width):
            if hole[row, column]:
                first_row, last_row = min(first_row, row), max(last_row, row)
                first_column, last_column = min(first_column, column), max(last_column, column)

    # Item 2 does not say what h and w count. In the release: from the first to the last row, so one less than rows.
    h, w = last_row - first_row, last_column - first_column
    # As floats have it: 1.15 * 100 is 114.99..., so 114.
    half = int(ENLARGED * max(h // 2, w // 2))
    middle_row, middle_column = (first_row + last_row) // 2, (first_column + last_column) // 2
    # Clamped: cut off at the border, not shifted.
    top, bottom = max(middle_row - half, 0), min(middle_row + half + 1, picture_height)
    left, right = max(middle_column - half, 0), min(middle_column + half + 1, picture_width)

    # Rounded down twice, the square can lose the hole's last row or column: up to 14 pixels, an even number of them, on
    # the longer side. Ours holds it, before the growth.
    top, bottom = min(top, first_row), max(bottom, last_row + 1)
    left, right = min(left, first_column), max(right, last_column + 1)

    while bottom - top < k * picture_height or right - left < k * picture_width:
        # The shorter one even if it has its share already and the other has not.
        grow_height = bottom - top < right - left
        # "A side" that has hit the border is the whole height or width. Where only one edge of it has, that edge stays,
        # its opposite moves by its own pixel, and nothing is passed on.
        if bottom - top == picture_height:
            grow_height = False
        elif right - left == picture_width:
            grow_height = True
        if grow_height:
            top, bottom = max(top - 1, 0), min(bottom + 1, picture_height)
        else:
            left, right = max(left - 1, 0), min(right + 1, picture_width)
    return left, top, right, bottom


# --- Masks


def composite_weight(hole: np.ndarray, feather: int) -> np.ndarray:
    """[H, W] bool -> how much of the generated picture is taken, 1 in the hole (item 6, not truncated to 8 bits).

    Outside (256 - 256 / feather d) / 255, at least 0, at most 1; d: Chebyshev distance to the hole. 32 is the release.
    Feather 0 is the hole, and so is 1.
    """
    weight = hole.astype(np.float64)
    reached = hole.copy()
    for distance in range(1, feather):
        grown = _one_pixel_larger(reached)
        weight[grown & ~reached] = min(max((256 - (256 / feather) * distance) / 255, 0.0), 1.0)
        reached = grown
    return weight


def _one_pixel_larger(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    around = np.pad(mask, 1, constant_values=False)
    larger = np.zeros_like(mask)
    for down in range(3):
        for right in range(3):
            larger |= around[down : down + height, right : right + width]
    return larger


def pooled_mask(hole: np.ndarray, cell: int = CELL) -> np.ndarray:
    """[H, W] bool -> [ceil(H / cell), ceil(W / cell)], 1.0 where any pixel of the cell is hole ("At every step").

    Repeating the last row and column adds no hole to a cell that has none, so that cut-off cells are simply smaller.
    """
    height, width = hole.shape
    pooled = np.zeros((-(-height // cell), -(-width // cell)))
    for row in range(height):
        for column in range(width):
            if hole[row, column]:
                pooled[row // cell, column // cell] = 1.0
    return pooled


# --- The fill


def released_fill(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """[H, W, 3], [H, W] bool -> the hole filled by ever smaller box blurs ("Fill of the hole"), in float64."""
    picture, hole = np.asarray(picture, dtype=np.float64), np.asarray(hole)
    filled = picture
    for radius, repeats in BLURS:
        for _ in range(repeats):
            filled = np.where(hole[:, :, None], box_blur(filled, radius), picture)
    return filled


def box_blur(picture: np.ndarray, radius: int) -> np.ndarray:
    """[H, W, C]: the mean of (2 radius + 1)^2 pixels, the picture's edge repeated beyond its border."""
    rows, columns = (_line_mean(length, radius) for length in picture.shape[:2])
    return np.einsum("yi,xj,ijc->yxc", rows, columns, picture, optimize=True)


def _line_mean(length: int, radius: int) -> np.ndarray:
    """[length, length]: how much every pixel of a line counts for every mean."""
    shares = np.zeros((length, length))
    for to in range(length):
        for offset in range(-radius, radius + 1):
            shares[to, min(max(to + offset, 0), length - 1)] += 1
    return shares / (2 * radius + 1)


# --- Textual attribute substitution


def substituted(
    tokens: np.ndarray, own: Sequence[int], attributes: Sequence[np.ndarray], strength: float, jointly: bool
) -> np.ndarray:
    """Section 3.4, eq. 9, and item 1: tokens [T, D] without what they share with the attributes' tokens [D] each.

    own       the positions of the prompt's own tokens; the others stay as they are
    strength  ours: 1 is the paper. One after another, it weakens every single step
    jointly   ours: away from everything the attributes span; the release takes one after another
    """
    result = np.array(tokens, dtype=np.float64)
    directions = [np.asarray(e, dtype=np.float64) for e in attributes]
    # As unit vectors, so that an attribute's length has no say in what counts as dependent on the others.
    directions = [e / np.linalg.norm(e) for e in directions if np.linalg.norm(e) > 0]
    if not directions:
        return result
    for position in own:
        p = result[position]
        if jointly:
            spanning = np.stack(directions, axis=1)
            coefficients = np.linalg.lstsq(spanning, p, rcond=None)[0]
            p = p - strength * (spanning @ coefficients)
        else:
            for e in directions:
                p = p - strength * np.dot(p, e) * e
        result[position] = p
    return result


def substituted_pooled(pooled: np.ndarray, attribute: np.ndarray, strength: float) -> np.ndarray:
    """The same for the pooled vector [D], once, with the pooled vector of the attributes' text [D] (item 1)."""
    return substituted(np.asarray(pooled)[None], [0], [attribute], strength, jointly=False)[0]


# --- The two stages


def two_stages(
    picture: torch.Tensor,
    hole: torch.Tensor,
    box: tuple[int, int, int, int],
    crop_size: tuple[int, int],
    encode: Callable[[torch.Tensor], torch.Tensor],
    decode: Callable[[torch.Tensor], torch.Tensor],
    resize: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
    denoise: Callable[[torch.Tensor, float, Stage], torch.Tensor],
    sigmas: Sequence[float],
    switch: int,
    noises: tuple[torch.Tensor | None, torch.Tensor | None],
    step: Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor],
    feather: int,
    background: Literal["intermediate", "original"],
    fill: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | np.ndarray],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Section 3.2 and items 4 to 6: the final picture and the picture at the switch (None without a local stage).

    picture     [H, W, 3] float64, and its hole [H, W] bool
    box         `local_box`'s; the crop is brought to `crop_size` = (height, width)
    encode      picture [h, w, 3], sides multiples of 8 -> latent [C, h / 8, w / 8]; `decode` the other way
    resize      picture [h, w, any], (height, width) -> picture
    denoise     x, sigma, stage -> x0
    sigmas      falling, the last one 0
    switch      the step at which the global stage begins: 0 global only, len(sigmas) - 1 local only
    noises      of the local and of the global stage, of their latents' shapes; None for a stage that is left out
    step        x, x0, sigma, next sigma -> x, first order
    background  of the global stage: the paper's intermediate picture or the release's original
    fill        picture, hole -> picture

    With no local stage there is nothing to paste, and the global stage has the filled whole picture for x^G. With no
    global stage the picture at the switch is the final one.
    """
    steps = len(sigmas) - 1
    if not 0 <= switch <= steps:
        raise ValueError("switch is the index of a step or the number of steps")
    if background not in ("intermediate", "original"):
        raise ValueError(background)
    picture = picture.double()
    left, top, right, bottom = box
    weight = torch.from_numpy(composite_weight(hole.numpy(), feather))[:, :, None]

    intermediate = None
    if switch > 0:
        # Resized first, filled after: the blurs' radii are pixels of the crop as the model gets it.
        crop = resize(picture[top:bottom, left:right], crop_size)
        crop_hole = resize(hole[top:bottom, left:right, None].double(), crop_size)[:, :, 0] > 0
        z = _encoded(torch.as_tensor(fill(crop, crop_hole)).double(), encode)
        x, x0 = _sampled(
            z, z, _cells(crop_hole), noises[0], sigmas[: switch + 1], step, lambda x, sigma: denoise(x, sigma, "local")
        )
        # After the last step of all the final latent, which a first-order step to sigma 0 makes the same.
        content = resize(_decoded(x0 if switch < steps else x, decode, crop_size), (bottom - top, right - left))
        intermediate = picture.clone()
        intermediate[top:bottom, left:right] = _composite(
            content, picture[top:bottom, left:right], weight[top:bottom, left:right]
        )
        if switch == steps:
            return intermediate, intermediate

    start = torch.as_tensor(fill(picture, hole)).double() if intermediate is None else intermediate
    z, m = _encoded(start, encode), _cells(hole)
    known = z if background == "intermediate" else m * z + (1 - m) * _encoded(picture, encode)
    x, _ = _sampled(z, known, m, noises[1], sigmas[switch:], step, lambda x, sigma: denoise(x, sigma, "global"))
    generated = _decoded(x, decode, (picture.shape[0], picture.shape[1]))
    return _composite(generated, picture, weight), intermediate


def _sampled(
    z: torch.Tensor,
    known: torch.Tensor,
    m: torch.Tensor,
    noise: torch.Tensor | None,
    sigmas: Sequence[float],
    step: Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor],
    denoise: Callable[[torch.Tensor, float], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One stage: its last x, which is not blended again (item 6), and its last x0, which is."""
    assert noise is not None
    noise = noise.double()
    # The noise is not scaled by sqrt(1 + sigma^2), as item 4 has it at full strength: noise from the first sigma on.
    x = z + sigmas[0] * noise
    x0 = z
    for sigma, following in pairwise(sigmas):
        x = m * x + (1 - m) * (known + sigma * noise)
        x0 = denoise(x, sigma)
        x0 = m * x0 + (1 - m) * known
        x = step(x, x0, sigma, following)
    return x, x0


def _cells(hole: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(pooled_mask(hole.numpy()))[None]


def _encoded(picture: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Continued by its last row and column to whole cells."""
    while picture.shape[0] % CELL:
        picture = torch.cat([picture, picture[-1:]], dim=0)
    while picture.shape[1] % CELL:
        picture = torch.cat([picture, picture[:, -1:]], dim=1)
    return encode(picture).double()


def _decoded(
    latent: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    return decode(latent).double()[: size[0], : size[1]]


def _composite(generated: torch.Tensor, original: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return generated * weight + original * (1 - weight)


# --- Training


def weighted_loss(
    error_squared: torch.Tensor, mask: torch.Tensor, inside: float = 1.5, outside: float = 0.7
) -> torch.Tensor:
    """Section 3.3, eq. 7, the weights as in the paper (item 8: the release squares its own); mean over all elements.

    The mask is broadcast to the error, [.., 1, h, w] for every channel.
    """
    return (inside * mask * error_squared + outside * (1 - mask) * error_squared).mean()
