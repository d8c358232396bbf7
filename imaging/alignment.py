"""Puts an edited picture back over its original, though an edit model has shifted and scaled it by a little.

A map of four numbers, a scale and a shift along each axis, is found by Gauss-Newton steps on the difference of the pictures,
from coarse to fine (Lucas and Kanade 1981; the gradient is the mean of both pictures', Malis 2004). What the edit has changed, up
to about half of the picture, is left out by Tukey's weights, and a gain and an offset for each channel take part, so that a tone
is not taken for a place. Where it starts is found by phase correlation (Kuglin and Hines 1975).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft, ndimage

from .pictures import resampled

FINEST = 1024
"""Pixels along the longer side of the level on which the last steps are taken."""
_COARSEST = 64
_COARSE_STEPS = (*(1.0,) * 4, *(0.5,) * 4, *(0.2,) * 4, *(0.1,) * 13)
_FINE_STEPS = (0.5, 0.2, *(0.1,) * 8)
"""What is allowed for in each step: so many pixels' shift. Less and less, so that what changed is told from what moved."""
_FARTHEST_STEP, _MOST = 4.0, 0.15
"""Of one step, in pixels; and by which part a scale may change, and twice that a shift in halves of a side."""
_TRIES = 4
_LEAST_SHARE = 0.1
"""Of the parts of a picture that show something, how many have to be found again."""


@dataclass(frozen=True)
class Alignment:
    """Where the original's pixels are in the edited picture: along x and y at scale * u + shift.

    u is -1 at the left or upper border of the picture and 1 at the opposite one, in both pictures.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    def pixels(self, size: tuple[int, int]) -> tuple[float, float]:
        """How far the middle of an edit of the original's `size` (height, width) has moved, in pixels along x and y."""
        return self.shift[0] * size[1] / 2, self.shift[1] * size[0] / 2

    def moves(self, size: tuple[int, int]) -> bool:
        """Whether any pixel of such an edit has moved by 0.02 pixels or more."""
        sides = (size[1], size[0])
        return any(
            (abs(scale - 1.0) + abs(shift)) * side / 2 >= 0.02
            for scale, shift, side in zip(self.scale, self.shift, sides, strict=True)
        )


def find_alignment(
    original: torch.Tensor, edited: torch.Tensor, changed: torch.Tensor | None = None
) -> Alignment | None:
    """The map from the original [3, H, W] to the edited picture [3, h, w], both in [0, 1]; None where they don't show the same.

    `changed` [H, W] is not 0 where nothing shall be looked at. Pictures without any detail are taken to lie over each other.
    """
    finest = min(1.0, FINEST / max(original.shape[-2:]))
    sizes = []
    height, width = (max(1, round(side * finest)) for side in original.shape[-2:])
    while not sizes or min(height, width) >= _COARSEST:
        sizes.append((height, width))
        height, width = height // 2, width // 2
    levels = [_Level(original, edited, changed, size) for size in reversed(sizes)]
    finer = levels[min(1, len(levels) - 1)]
    starts = _starts(levels[min(2, len(levels) - 1)])
    tried = [finer.refined(levels[0].refined(start, _COARSE_STEPS), _COARSE_STEPS) for start in starts]
    tried += [finer.refined(start, _COARSE_STEPS) for start in starts]
    for begun in _apart(sorted(tried, key=finer.disagreement), finer.size)[:_TRIES]:
        best = begun
        for level in levels[2:]:
            best = level.refined(best, _FINE_STEPS)
        shown, found = levels[-1].found_again(best)
        if not shown:
            return Alignment()
        if found >= _LEAST_SHARE * shown:
            return Alignment((float(best[0]), float(best[1])), (float(best[2]), float(best[3])))
    return None


def aligned(edited: torch.Tensor, alignment: Alignment, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The edited picture [C, h, w] where the original's pixels are, [C, height, width], and where it has any, bool.

    Bicubic; a larger edit is first made smaller, anti-aliased. One that has not moved is not resampled.
    """
    if tuple(edited.shape[-2:]) == size and not alignment.moves(size):
        return edited, torch.ones(size, dtype=torch.bool, device=edited.device)
    planes = edited[None].float()
    if planes.shape[-2] > 1.2 * size[0] or planes.shape[-1] > 1.2 * size[1]:
        planes = resampled(planes, size, "bicubic")
    parameters = torch.tensor([*alignment.scale, *alignment.shift], dtype=torch.float64)
    grid = _grid(size, parameters)
    warped = F.grid_sample(planes, grid.to(planes), mode="bicubic", padding_mode="border", align_corners=False)[0]
    # Half a pixel beyond its outermost centres an edge is still its own.
    inside = (grid[0].abs() <= 1.0 + 1e-9).all(dim=-1)
    return warped.clamp(0.0, 1.0).to(edited), inside.to(edited.device)


def _centres(count: int) -> torch.Tensor:
    return (2.0 * torch.arange(count, dtype=torch.float64) + 1.0) / count - 1.0


def _grid(size: tuple[int, int], parameters: torch.Tensor) -> torch.Tensor:
    x = _centres(size[1]) * parameters[0] + parameters[2]
    y = _centres(size[0]) * parameters[1] + parameters[3]
    return torch.stack((x.expand(size[0], -1), y[:, None].expand(-1, size[1])), dim=-1)[None]


def _starts(level: _Level) -> list[torch.Tensor]:
    """One over the other, shifted by what phase correlation says, and a picture of another shape cut instead of stretched."""
    starts = [torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)]
    shift = _phase_shift(level.original.mean(dim=0).numpy(), level.edited.mean(dim=0).numpy())
    starts.append(torch.tensor([1.0, 1.0, *shift], dtype=torch.float64))
    ratio = level.shapes[1] / level.shapes[0]
    if abs(ratio - 1.0) > 0.003:
        for x, y in ((1.0, ratio), (1.0 / ratio, 1.0)):
            starts.append(torch.tensor([x, y, 0.0, 0.0], dtype=torch.float64))
    return starts


def _apart(places: list[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
    """Those that are half a pixel or more from all before them."""
    half = torch.tensor([size[1] / 2, size[0] / 2] * 2, dtype=torch.float64)
    kept: list[torch.Tensor] = []
    for place in places:
        if all(float(((place - other).abs() * half).max()) > 0.5 for other in kept):
            kept.append(place)
    return kept


def _phase_shift(original: np.ndarray, edited: np.ndarray) -> tuple[float, float]:
    """How far the edited picture has moved, as part of half of the width and of the height."""
    window = np.outer(*(np.hanning(side + 2)[1:-1] for side in original.shape))
    one, other = (np.asarray(fft.rfft2((plane - plane.mean()) * window)) for plane in (original, edited))
    product = other * one.conj()
    peaks = np.asarray(fft.irfft2(product / np.maximum(np.abs(product), 1e-12), s=original.shape))
    row, column = np.unravel_index(int(peaks.argmax()), peaks.shape)
    height, width = original.shape
    moved = [place - side if place > side / 2 else place for place, side in ((column, width), (row, height))]
    return 2.0 * moved[0] / width, 2.0 * moved[1] / height


@dataclass(frozen=True, eq=False)
class _Tone:
    """A gain and an offset for each channel, [3]."""

    gain: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Of the moved and toned picture with the original: error [3, h, w], how much each pixel counts [h, w], both parts."""

    error: torch.Tensor
    weight: torch.Tensor
    warped: torch.Tensor
    tone: _Tone


class _Level:
    """Both pictures at one size."""

    def __init__(
        self, original: torch.Tensor, edited: torch.Tensor, changed: torch.Tensor | None, size: tuple[int, int]
    ) -> None:
        self.size = size
        self.shapes = tuple(picture.shape[-1] / picture.shape[-2] for picture in (original, edited))
        self.original, self.edited = (
            resampled(picture[None].float().cpu(), size, "bilinear")[0] for picture in (original, edited)
        )
        self._looked_at = torch.ones(size)
        if changed is not None:
            plane = (changed > 0).float()[None, None].cpu()
            self._looked_at = (resampled(plane, size, "bilinear")[0, 0] <= 0).float()
        self._gradient = _gradient(self.original)
        self._steepness = self._gradient.square().sum(dim=(0, 1)).sqrt()

    def refined(self, parameters: torch.Tensor, steps: Sequence[float]) -> torch.Tensor:
        """Gauss-Newton from there, [4]: scale along x and y, shift along x and y. What goes astray stays where it was."""
        u = _centres(self.size[1])[None, :].float(), _centres(self.size[0])[:, None].float()
        half = torch.tensor([self.size[1] / 2, self.size[0] / 2] * 2, dtype=torch.float64)
        start = parameters
        tone: _Tone | None = None
        for off_by in steps:
            found = self._compared(parameters, off_by, tone)
            if found is None:
                break
            tone = found.tone
            # Both pictures' gradients: steps then go as far as they should (Malis 2004).
            slopes = 0.5 * (_gradient(found.warped) * tone.gain[:, None, None] + self._gradient)
            along = [slopes[axis] * (half[axis] / parameters[axis]).float() for axis in (0, 1)]
            jacobian = torch.stack([along[0] * u[0], along[1] * u[1], along[0], along[1]])
            weighted = (jacobian * found.weight).flatten(1)
            matrix = (weighted @ jacobian.flatten(1).T).double()
            wanted = (weighted @ found.error.flatten()).double()
            matrix += 1e-9 * matrix.diagonal().max().clamp_min(1e-12) * torch.eye(4, dtype=torch.float64)
            update = torch.linalg.solve(matrix, wanted)
            # Far away the steps are of little worth.
            update *= min(1.0, _FARTHEST_STEP / max(float((update.abs() * half).max()), 1e-9))
            parameters = parameters - update
            if not bool(
                ((parameters[:2] - start[:2]).abs() < _MOST).all() and (parameters[2:].abs() < 2 * _MOST).all()
            ):
                return start
            if float((update.abs() * half).max()) < 2e-3 and off_by == steps[-1]:
                break
        return parameters

    def disagreement(self, parameters: torch.Tensor) -> float:
        """How much of the slopes that are looked at has no counterpart there, 0 to 1."""
        found = self._compared(parameters, 0.5, None)
        slopes = self._steepness * self._looked_at
        return 1.0 if found is None else 1.0 - float((found.weight * slopes).sum() / slopes.sum().clamp_min(1e-9))

    def _compared(self, parameters: torch.Tensor, off_by: float, tone: _Tone | None) -> _Comparison | None:
        """The pictures against each other; a pixel may be off by what a shift of `off_by` pixels makes of the gradient there.

        `tone` is about the tone, from a place near by. None where next to nothing is left to compare.
        """
        grid = _grid(self.size, parameters)
        warped = self._moved(grid)
        inside = (grid[0].abs() < 1.0 - 2.0 / torch.tensor([self.size[1], self.size[0]])).all(dim=-1)
        base = self._looked_at * inside
        if float(base.sum()) < 64:
            return None
        among = base > 0
        every = max(1, int(among.sum()) // 50_000)
        slack = (self._steepness * off_by).square() / 3
        turns = 2
        if tone is None:
            # At first a change of brightness alone: what the edit has changed must not decide.
            tone = _Tone(torch.ones(3), (self.original - warped)[:, among].median(dim=1).values)
            turns = 5
        weight = error = base
        for turn in range(turns):
            if turn:
                tone = _tone(warped, self.original, weight)
            error = tone.gain[:, None, None] * warped + tone.offset[:, None, None] - self.original
            size = error.square().mean(dim=0)
            noise = max(1.2 * float(size[among][::every].quantile(0.3)) ** 0.5, 0.5 / 255)
            weight = base * (1.0 - size / (9.0 * (noise**2 + slack))).clamp_min(0.0).square()
            if float(weight.sum()) < 64:
                return None
        return _Comparison(error, weight, warped, tone)

    def _moved(self, grid: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(
            self.edited[None], grid.float(), mode="bicubic", padding_mode="border", align_corners=False
        )[0]

    def found_again(self, parameters: torch.Tensor) -> tuple[int, int]:
        """How many parts of the picture show any detail, and in how many of them the edit shows the same."""
        warped = self._moved(_grid(self.size, parameters))
        fine = [_detail(picture.mean(dim=0).numpy()) for picture in (self.original, warped)]
        side = max(8, round(max(self.size) / 32))
        height, width = (length // side * side for length in self.size)
        blocks = [
            plane[:height, :width].reshape(height // side, side, width // side, side).transpose(0, 2, 1, 3)
            for plane in fine
        ]
        one, other = (of.reshape(-1, side * side) for of in blocks)
        looked = self._looked_at[:height, :width].reshape(height // side, side, width // side, side)
        whole = (looked.amin(dim=3).amin(dim=1) > 0).numpy().ravel()
        power = [np.linalg.norm(of, axis=1) / side for of in (one, other)]
        shows = whole & (power[0] > 1.0 / 255)
        alike = (one * other).sum(axis=1) > 0.5 * np.maximum(power[0] * power[1] * side**2, 1e-12)
        return int(shows.sum()), int((shows & alike).sum())


def _detail(plane: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(plane, 1.0) - ndimage.gaussian_filter(plane, 4.0)


def _gradient(planes: torch.Tensor) -> torch.Tensor:
    """Of [C, h, w], along x and y, for each pixel: [2, C, h, w]."""
    padded = F.pad(planes[None], (1, 1, 1, 1), mode="replicate")[0]
    x = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) * 0.5
    y = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) * 0.5
    return torch.stack((x, y))


def _tone(moved: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor) -> _Tone:
    """What takes one picture's channels to the other's, by least squares."""
    of, to, w = moved.flatten(1), wanted.flatten(1), weight.flatten()
    total = w.sum()
    mean_of, mean_to = of @ w / total, to @ w / total
    centred = of - mean_of[:, None]
    weighted = centred * w
    spread, together = ((weighted * other).sum(dim=1) / total for other in (centred, to - mean_to[:, None]))
    # A flat channel has no gain of its own.
    least = (1.0 / 255) ** 2
    gain = (together + least) / (spread + least)
    return _Tone(gain, mean_to - gain * mean_of)
