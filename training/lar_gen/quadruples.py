"""Quadruples of scene, mask, subject and prompt, encoded once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ...imaging.subject import CLIP_SIDE, for_branch
from ..demo.latents import as_pixels, encode, fingerprint, latent_hole, with_hole, write_arrays
from ..demo.narrow_taesd import NarrowTAESD
from ..world.attributes import SHAPES, SIZE, WORLD_VERSION
from ..world.subjects import Quadruple, make_quadruple
from .vision import Vision, clip_pixels, subject_of

SHARD = 128
"""Quadruples to a file."""
_AT_ONCE = 16


@dataclass(frozen=True)
class Encoded:
    """Encoded quadruples 0 to N - 1 of a split, each of a subject of its own; float16 but for `shape`.

    clean: the truth's latents, [N, 4, 32, 32], in the UNet's scale.
    masked: the same with gray in the hole.
    hole: [N, 1, 32, 32], 1 in the hole.
    subject: latents [N, 4, 32, 32] of the subject on white, 256 pixels.
    own, details: CLIP's states [N, 65, 160] of the subject, the last but one layer's and the last one's.
    shape: int64 [N], what the prompt can say.
    """

    clean: torch.Tensor
    masked: torch.Tensor
    hole: torch.Tensor
    subject: torch.Tensor
    own: torch.Tensor
    details: torch.Tensor
    shape: torch.Tensor


class Encoders:
    """What encodes quadruples, on a device. Without CLIP's vision model there are only the VAE's parts."""

    def __init__(self, vae: NarrowTAESD, vision: Vision | None, device: torch.device) -> None:
        self._vae, self._device = vae.to(device), device
        self._vision = None if vision is None else vision.to(device)

    def parts(self) -> dict[str, Callable[[list[Quadruple]], dict[str, torch.Tensor]]]:
        """What makes each part of Encoded, by a name that is another one for other weights."""
        found: dict[str, Callable[[list[Quadruple]], dict[str, torch.Tensor]]] = {
            f"latents-{fingerprint(self._vae.state_dict())}": self._latents_of
        }
        if self._vision is not None:
            found[f"states-{fingerprint(self._vision.state_dict())}"] = self._states_of
        return found

    def _latents_of(self, quadruples: list[Quadruple]) -> dict[str, torch.Tensor]:
        pixels = as_pixels(np.stack([of.picture for of in quadruples]))
        hole = torch.from_numpy(np.stack([of.hole for of in quadruples])).float()[:, None]
        on_white = torch.stack(
            [for_branch(subject_of(of.reference, of.reference_mask), SIZE).movedim(-1, 0) for of in quadruples]
        )
        return {
            "clean": encode(self._vae, pixels, self._device),
            "masked": encode(self._vae, with_hole(pixels, hole), self._device),
            "hole": latent_hole(hole).half(),
            "subject": encode(self._vae, on_white, self._device),
            "shape": torch.tensor([SHAPES.index(of.prompt.split()[-1]) for of in quadruples]),
        }

    @torch.no_grad()
    def _states_of(self, quadruples: list[Quadruple]) -> dict[str, torch.Tensor]:
        assert self._vision is not None
        pixels = torch.stack([clip_pixels(of.reference, of.reference_mask) for of in quadruples])
        own, details, _ = self._vision(pixels.to(self._device))
        return {"own": own.half().cpu(), "details": details.half().cpu()}

    @torch.no_grad()
    def nothing(self) -> torch.Tensor:
        """The last but one layer's states [65, 160] of an all-zero picture, once it is normalized."""
        assert self._vision is not None
        own, *_ = self._vision.states(torch.zeros(1, 3, CLIP_SIDE, CLIP_SIDE, device=self._device))
        return own[0].half().cpu()


def encode_quadruples(
    folder: Path,
    encoders: Encoders,
    split: str,
    count: int,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path] | None:
    """The files of the first `count` quadruples, rounded up to whole files; what is missing is encoded first.

    They lie in sub-folders named after the encoders' weights. `report` is told the number of files that exist and that are
    needed. Returns None where `should_stop` said so.
    """
    needed = [
        (folder / f"world{WORLD_VERSION}-{name}" / split / f"quadruples-{first:07d}.npz", first, make)
        for name, make in encoders.parts().items()
        for first in range(0, count, SHARD)
    ]
    for done, (path, first, make) in enumerate(needed):
        if not path.is_file():
            if should_stop():
                return None
            report(done, len(needed))
            parts = [
                make([make_quadruple(split, index, index) for index in range(start, start + _AT_ONCE)])
                for start in range(first, first + SHARD, _AT_ONCE)
            ]
            write_arrays(path, **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return [path for path, *_ in needed]


def load_quadruples(paths: Sequence[Path]) -> Encoded:
    """What `encode_quadruples` has written."""
    found: dict[str, list[torch.Tensor]] = {of.name: [] for of in fields(Encoded)}
    for path in paths:
        with np.load(path) as arrays:
            for name in arrays.files:
                found[name].append(torch.from_numpy(arrays[name]))
    return Encoded(**{name: torch.cat(parts) for name, parts in found.items()})
