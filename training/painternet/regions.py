"""PainterData in small: objects in scenes, each with a mask as people draw it and a prompt that names it alone; encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...imaging.mask_shapes import Shape, mask_shape
from ..demo.latents import as_pixels, encode, fingerprint, write_arrays
from ..demo.narrow_taesd import NarrowTAESD
from ..loop import step_seed
from ..world.attributes import WORLD_VERSION
from ..world.captions import local_caption
from ..world.scenes import make_scene

SHARD = 256
"""Regions to a file. A file that exists is complete, so an interrupted run loses one file at most."""
_AT_ONCE = 16
_SEED = 0x9A17
_LEAST_CELLS = 300
"""Pixels of an object that may be the hole's; of a smaller rest, behind another object, no word is true."""


@dataclass(frozen=True, eq=False)
class Region:
    """A picture, uint8 [256, 256, 3], a hole in it, bool [256, 256], and what belongs there."""

    picture: np.ndarray
    hole: np.ndarray
    prompt: str


def make_region(split: str, index: int, shape: Shape = "painternet") -> Region:
    """One object of a scene of a split: the same for the same arguments."""
    scene = make_scene(split, index)
    seed = step_seed(_SEED, index)
    rng = np.random.default_rng(seed)
    seen = [number for number, mask in enumerate(scene.masks) if mask.sum() >= _LEAST_CELLS]
    number = int(rng.choice(seen)) if seen else int(scene.masks.sum(axis=(1, 2)).argmax())
    item = scene.layout.objects[number]
    hole = mask_shape(torch.from_numpy(scene.masks[number]).float(), shape, seed % 2**31)[0, 0].numpy() > 0
    return Region(scene.picture, hole, local_caption(item.shape, item.colour, item.pattern, rng))


@dataclass(frozen=True, eq=False)
class Encoded:
    """N encoded regions; float16.

    clean, masked: latents [N, 4, 32, 32] of the picture, and of it with black in the hole, in the UNet's scale.
    hole: [N, 1, 32, 32], 1 in the hole.
    prompt: N texts.
    """

    clean: torch.Tensor
    masked: torch.Tensor
    hole: torch.Tensor
    prompt: np.ndarray

    @staticmethod
    def of(parts: Sequence[dict[str, Any]]) -> Encoded:
        """All parts, one after another."""
        joined: dict[str, Any] = {of.name: np.concatenate([part[of.name] for part in parts]) for of in fields(Encoded)}
        prompt = joined.pop("prompt")
        return Encoded(**{name: torch.from_numpy(values) for name, values in joined.items()}, prompt=prompt)

    def with_more(self, other: Encoded) -> Encoded:
        """These and the others."""
        return Encoded.of(
            [{of.name: np.asarray(getattr(one, of.name)) for of in fields(Encoded)} for one in (self, other)]
        )


def encode_regions(vae: NarrowTAESD, regions: Sequence[Region], device: torch.device) -> dict[str, np.ndarray]:
    """The fields of Encoded."""
    parts = []
    for start in range(0, len(regions), _AT_ONCE):
        some = regions[start : start + _AT_ONCE]
        pixels = as_pixels(np.stack([of.picture for of in some]))
        hole = torch.from_numpy(np.stack([of.hole for of in some])).float()[:, None]
        parts.append(
            {
                "clean": encode(vae, pixels, device).numpy(),
                "masked": encode(vae, pixels * (1.0 - hole), device).numpy(),
                # The nearest pixel, as BrushNet takes it.
                "hole": torch.nn.functional.interpolate(hole, scale_factor=1 / 8).half().numpy(),
                "prompt": np.asarray([of.prompt for of in some]),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def load_regions(
    folder: Path,
    vae: NarrowTAESD,
    split: str,
    count: int,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Encoded | None:
    """A split's first `count` regions, rounded up to whole files; what is missing is encoded first.

    They lie in a sub-folder named after the VAE's weights. `report` is told the number of files that exist and that are needed.
    Returns None where `should_stop` said so.
    """
    folder = folder / f"world{WORLD_VERSION}-regions-{fingerprint(vae.state_dict())}" / split
    paths = [folder / f"regions-{first:07d}.npz" for first in range(0, count, SHARD)]
    parts = []
    for done, path in enumerate(paths):
        if not path.is_file():
            if should_stop():
                return None
            report(done, len(paths))
            indices = range(done * SHARD, (done + 1) * SHARD)
            write_arrays(path, **encode_regions(vae, [make_region(split, index) for index in indices], device))
        with np.load(path) as arrays:
            parts.append({name: arrays[name] for name in arrays.files})
    return Encoded.of(parts)
