"""What an edit has changed, and the original everywhere else.

Edit models shift, scale and recolor the whole picture besides. Place: `alignment`. Tone: a polynomial of second degree in the
three channels (Hong, Luo and Rhodes 2001), by least squares on what did not change. What changed: a difference by more than the
picture's own noise, with hysteresis (Canny 1986); at edges more is noise, since what is left of a shift, or of a VAE's blur, lies
there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage

from .alignment import Alignment, aligned, find_alignment
from .harmonize import Harmony, harmonize
from .masks import as_mask_batch, resize_mask
from .morphology import closing, feather, fill_holes, grow, remove_specks
from .pictures import common_count, resampled

LEVEL = 1.0 / 255
_CERTAIN, _POSSIBLE = 8.0, 3.0
"""Times the noise: where a change begins, and how far it goes on."""
_LEAST_NOISE, _LEAST_BLUR = 0.7 * LEVEL, 0.06
"""What counts as noise at least: rounding, and at an edge what a shift by so many pixels would make."""
_SAMPLES = 200_000
"""Pixels, about, by which a tone is found."""


@dataclass(frozen=True)
class EditSettings:
    """match_tone: whether the edit's tone is made the original's. sensitivity: 2 finds changes half as large.

    grow, feather: pixels by which what has been found is widened, and that its soft edge has beyond. harmony: what is done about
    a tone that is left.
    """

    match_tone: bool = True
    sensitivity: float = 1.0
    grow: int = 4
    feather: int = 8
    harmony: Harmony = field(default_factory=lambda: Harmony("color"))


@dataclass(frozen=True, eq=False)
class Edit:
    """aligned [3, H, W]: the edit over the original, in its tone. mask [H, W] in [0, 1]: how much of it is taken into composite.

    alignment: None where the pictures have nothing in common; then aligned is the edit as it was, of its own size, and composite
    the edit at the original's size.
    tone: by how many levels of 255 the edit's tone was off where nothing changed. changed: the share of the picture.
    """

    aligned: torch.Tensor
    mask: torch.Tensor
    composite: torch.Tensor
    alignment: Alignment | None
    tone: float
    changed: float


def take_edit(
    original: torch.Tensor, edited: torch.Tensor, mask: torch.Tensor | None = None, settings: EditSettings | None = None
) -> Edit:
    """Takes from `edited` [3, h, w] what it has changed of `original` [3, H, W], both in [0, 1].

    `mask`, as for `as_mask_batch`, says where the picture may change, and is then what is taken; without it that is found from
    the difference. Outside of the mask the composite is the original, bit for bit.
    """
    settings = settings or EditSettings()
    size = (original.shape[-2], original.shape[-1])
    given = None if mask is None else resize_mask(mask, size)[0, 0].to(original.device)
    alignment = find_alignment(original, edited, given)
    if alignment is None:
        return Edit(edited, torch.ones(size), _at_size(edited, size), None, 0.0, 1.0)
    moved, inside = aligned(edited.to(original), alignment, size)
    known = inside if given is None else inside & (given <= 0)
    tone = 0.0
    if settings.match_tone:
        moved, tone = match_tone(moved, original, known)
    if given is None:
        found = changes(moved, original, inside, settings.sensitivity)
        plane = as_mask_batch(feather(grow(found.float(), settings.grow), settings.feather, "outside"))
    else:
        plane = as_mask_batch(given)
    # Beyond its border the edit has nothing to say.
    plane = (plane * inside).to(original)
    composite = harmonize(moved[None], original[None], plane, settings.harmony)[0]
    return Edit(moved, plane[0, 0], composite, alignment, tone, float((plane > 0).float().mean()))


@dataclass(frozen=True, eq=False)
class Edits:
    """pictures and aligned [B, H, W, C], masks [B, H, W], and a line for each picture on what was found."""

    pictures: torch.Tensor
    aligned: torch.Tensor
    masks: torch.Tensor
    report: str


def align_edits(
    originals: torch.Tensor, edited: torch.Tensor, mask: torch.Tensor | None, settings: EditSettings
) -> Edits:
    """`take_edit` for batches as the host has them, [B, H, W, 3 or 4]; a batch of 1 goes with every picture.

    The originals' alpha stays, the edits' is not looked at. Of a batch in which only some edits have something in common with
    their originals, aligned are all of the originals' size. Raises ValueError for batches that don't go together.
    """
    counts = {"original": len(originals), "edited": len(edited)} | ({} if mask is None else {"mask": len(_masks(mask))})
    count = common_count(**counts)
    masks = None if mask is None else _masks(mask)
    found = []
    for number in range(count):
        original, new = (batch[number % len(batch)].movedim(-1, 0)[:3] for batch in (originals, edited))
        own = None if masks is None else masks[number % len(masks)]
        found.append(take_edit(original, new, own, settings))
    report = [_said(edit, (originals.shape[1], originals.shape[2])) for edit in found]
    if count > 1:
        report = [f"{number}: {line}" for number, line in enumerate(report, 1)]
    pictures, whole, taken = ([getattr(edit, of) for edit in found] for of in ("composite", "aligned", "mask"))
    if any(edit.alignment is not None for edit in found):
        whole = [_at_size(planes, (originals.shape[1], originals.shape[2])) for planes in whole]
    made, all_of_it = (torch.stack(planes).movedim(1, -1).contiguous() for planes in (pictures, whole))
    if originals.shape[-1] == 4:
        alpha = originals[..., 3:].expand(count, -1, -1, -1).to(made)
        made = torch.cat((made, alpha), dim=-1)
    return Edits(made, all_of_it, torch.stack(taken), "\n".join(report))


def _masks(mask: torch.Tensor) -> torch.Tensor:
    return mask[None] if mask.ndim == 2 else mask


def _at_size(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(planes.shape[-2:]) == size:
        return planes
    return resampled(planes[None].float(), size, "bicubic")[0].clamp(0.0, 1.0).to(planes)


def _said(edit: Edit, size: tuple[int, int]) -> str:
    if edit.alignment is None:
        return "the two pictures have nothing in common; the edit is left as it is."
    across, down = edit.alignment.pixels(size)
    x, y = ((scale - 1.0) * 100.0 for scale in edit.alignment.scale)
    place = f"shifted by {across:+.2f}, {down:+.2f} pixels, scaled by {x:+.3f}, {y:+.3f} %"
    everywhere = " It changed everywhere." if edit.changed > 0.95 else ""
    return f"{place}; tone off by {edit.tone:.1f} levels; {100 * edit.changed:.1f} % taken from the edit.{everywhere}"


def match_tone(edited: torch.Tensor, original: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, float]:
    """`edited` [3, H, W] in the tone of `original`, by what has not changed where `known`, and by how many levels that is.

    It stays as it is, bit for bit, where it is off by less than a tenth of a level.
    """
    of, to = (_blurred(picture, 1.5) for picture in (edited, original))
    places = np.flatnonzero(known.cpu().numpy())
    if len(places) < 256:
        return edited, 0.0
    places = places[:: max(1, len(places) // _SAMPLES)]
    features, wanted = _features(of.reshape(3, -1)[:, places]), to.reshape(3, -1)[:, places].astype(np.float64)
    identity = np.eye(features.shape[0])[:3]
    # At first a change of brightness alone: what the edit has changed must not decide.
    map_, weight = identity, np.ones(wanted.shape[1])
    offset = np.median(wanted - features[:3], axis=1)
    for turn in range(8):
        error = (map_ @ features + (offset[:, None] if not turn else 0.0)) - wanted
        size = np.sqrt((error**2).mean(axis=0))
        allowed = 3.0 * max(1.5 * float(np.quantile(size, 0.3)), 0.3 * LEVEL)
        weight = np.maximum(1.0 - (size / allowed) ** 2, 0.0) ** 2
        map_ = _fitted(features, wanted, weight, identity)
    change = (map_ @ features - features[:3])[:, weight > 0]
    tone = float(np.sqrt((change**2).mean())) / LEVEL
    if tone < 0.1:
        return edited, tone
    linear, square, offset = (torch.from_numpy(part).to(edited) for part in np.split(map_, (3, 6), axis=1))
    mapped = torch.einsum("oc,chw->ohw", linear, edited) + torch.einsum("oc,chw->ohw", square, edited.square())
    return (mapped + offset[:, :, None]).clamp(0.0, 1.0), tone


def changes(
    edited: torch.Tensor, original: torch.Tensor, inside: torch.Tensor, sensitivity: float = 1.0
) -> torch.Tensor:
    """Where `edited` [3, H, W] differs from `original`, over which it lies, by more than their noise: bool [H, W].

    Looked at is only what is `inside`, bool [H, W]. Specks go, gaps are closed.
    """
    # The finest detail differs wherever a picture was resampled or saved, or came out of a VAE, and would hide a faint change.
    one, other = (_blurred(picture, 1.2) for picture in (edited, original))
    # So does its last rim, which has looked beyond the border.
    within = np.asarray(ndimage.binary_erosion(inside.cpu().numpy(), iterations=3, border_value=True), dtype=bool)
    difference = np.sqrt(ndimage.gaussian_filter(((one - other) ** 2).mean(axis=0), 1.0))
    squares = np.zeros_like(difference)
    for plane in other:
        for axis in (0, 1):
            squares += ndimage.convolve1d(plane, (0.5, 0.0, -0.5), axis, mode="nearest") ** 2 / 3.0
    slope = ndimage.maximum_filter(np.sqrt(squares), 5)
    certain = np.zeros_like(within)
    noise = np.ones_like(difference)
    for _ in range(4):
        looked = within & ~np.asarray(ndimage.binary_dilation(certain, iterations=3), dtype=bool)
        if looked.sum() < 256:
            break
        flat = looked & (slope <= np.quantile(slope[looked], 0.5))
        steep = looked & (slope >= np.quantile(slope[looked], 0.8)) & (slope > 0)
        least = max(1.2 * float(np.quantile(difference[flat], 0.4)), _LEAST_NOISE)
        blur = 1.2 * float(np.quantile(difference[steep] / slope[steep], 0.4)) if steep.any() else 0.0
        noise = np.sqrt(least**2 + (max(blur, _LEAST_BLUR) * slope) ** 2) / sensitivity
        certain = within & (difference > _CERTAIN * noise)
    possible = within & (difference > _POSSIBLE * noise)
    found = torch.from_numpy(ndimage.binary_propagation(certain, mask=possible)).float()
    shorter = min(found.shape)
    plane = remove_specks(found, max(12.0, 2e-5 * found.numel()))
    plane = closing(plane, max(2.0, 0.006 * shorter))
    plane = fill_holes(plane, 1e-3 * found.numel())
    return (plane[0, 0] > 0).to(inside.device) & inside


def _blurred(picture: torch.Tensor, deviation: float) -> np.ndarray:
    return np.stack([ndimage.gaussian_filter(plane, deviation) for plane in picture.cpu().float().numpy()])


def _features(colors: np.ndarray) -> np.ndarray:
    """Of colors [3, n]: themselves, their squares and 1, [7, n], in double precision."""
    colors = colors.astype(np.float64)
    return np.concatenate((colors, colors**2, np.ones((1, colors.shape[1]))))


def _fitted(features: np.ndarray, wanted: np.ndarray, weight: np.ndarray, identity: np.ndarray) -> np.ndarray:
    """The map [3, 7] of weighted least squares, near the identity where the colors don't tell."""
    slack = np.diag([*(0.5 * LEVEL,) * 3, *(4.0 * LEVEL,) * 3, 0.0]) ** 2 * weight.sum()
    left = (features * weight) @ features.T + slack
    right = (features * weight) @ wanted.T + slack @ identity.T
    return np.linalg.solve(left, right).T
