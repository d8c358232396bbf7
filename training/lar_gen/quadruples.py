"""Quadruples of scene, mask, subject and prompt, encoded once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...imaging.subject import CLIP_SIDE, for_branch
from ..demo.latents import as_pixels, encode, fingerprint, latent_hole, with_hole, write_arrays
from ..demo.narrow_taesd import NarrowTAESD
from ..world.attributes import SIZE, WORLD_VERSION
from ..world.subjects import Example, make_quadruple
from .vision import Vision, clip_pixels, subject_of

SHARD = 128
"""Quadruples to a file."""
_AT_ONCE = 16


@dataclass(frozen=True)
class Encoded:
    """N encoded quadruples; float16.

    clean: the truth's latents, [N, 4, 32, 32], in the UNet's scale.
    masked: the same with gray in the hole.
    hole: [N, 1, 32, 32], 1 in the hole.
    subject: latents [N, 4, 32, 32] of the subject on white, 256 pixels.
    own, details: CLIP's states [N, 65, 160] of the subject, the last but one layer's and the last one's.
    prompt: N texts.
    """

    clean: torch.Tensor
    masked: torch.Tensor
    hole: torch.Tensor
    subject: torch.Tensor
    own: torch.Tensor
    details: torch.Tensor
    prompt: np.ndarray

    @staticmethod
    def of(parts: Sequence[Part]) -> Encoded:
        """All parts, each of which has some of the fields of some quadruples, in their order."""
        joined: dict[str, Any] = {
            of.name: np.concatenate([part[of.name] for part in parts if of.name in part]) for of in fields(Encoded)
        }
        prompt = joined.pop("prompt")
        return Encoded(**{name: torch.from_numpy(values) for name, values in joined.items()}, prompt=prompt)

    def with_more(self, other: Encoded) -> Encoded:
        """These and the others."""
        return Encoded.of(
            [{of.name: np.asarray(getattr(one, of.name)) for of in fields(Encoded)} for one in (self, other)]
        )


Part = dict[str, Any]
"""Some fields of Encoded, as tensors or arrays."""


class Encoders:
    """What encodes quadruples, on a device."""

    def __init__(self, vae: NarrowTAESD, vision: Vision, device: torch.device) -> None:
        self._vae, self._vision, self._device = vae.to(device), vision.to(device), device

    def parts(self) -> dict[str, Callable[[Sequence[Example]], Part]]:
        """What makes each part of Encoded, by a name that is another one for other weights."""
        return {
            f"latents-{fingerprint(self._vae.state_dict())}": self._latents_of,
            f"states-{fingerprint(self._vision.state_dict())}": self._states_of,
        }

    def _latents_of(self, examples: Sequence[Example]) -> Part:
        pixels = as_pixels(np.stack([of.picture for of in examples]))
        hole = torch.from_numpy(np.stack([of.hole for of in examples])).float()[:, None]
        on_white = torch.stack(
            [for_branch(subject_of(of.reference, of.reference_mask), SIZE).movedim(-1, 0) for of in examples]
        )
        return {
            "clean": encode(self._vae, pixels, self._device),
            "masked": encode(self._vae, with_hole(pixels, hole), self._device),
            "hole": latent_hole(hole).half(),
            "subject": encode(self._vae, on_white, self._device),
            "prompt": np.asarray([of.prompt for of in examples]),
        }

    @torch.no_grad()
    def _states_of(self, examples: Sequence[Example]) -> Part:
        pixels = torch.stack([clip_pixels(of.reference, of.reference_mask) for of in examples])
        own, details, _ = self._vision(pixels.to(self._device))
        return {"own": own.half().cpu(), "details": details.half().cpu()}

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """All fields, of any number of examples."""
        parts = [
            {name: field for make in self.parts().values() for name, field in make(some).items()}
            for start in range(0, len(examples), _AT_ONCE)
            for some in [examples[start : start + _AT_ONCE]]
        ]
        return Encoded.of(parts)

    @torch.no_grad()
    def nothing(self) -> torch.Tensor:
        """The last but one layer's states [65, 160] of an all-zero picture, once it is normalized."""
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
    """The files of a split's first `count` quadruples, rounded up to whole files; what is missing is encoded first.

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
            write_arrays(path, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return [path for path, *_ in needed]


def load_quadruples(paths: Sequence[Path]) -> Encoded:
    """What `encode_quadruples` has written."""
    parts: list[Part] = []
    for path in paths:
        with np.load(path) as arrays:
            parts.append({name: arrays[name] for name in arrays.files})
    return Encoded.of(parts)
