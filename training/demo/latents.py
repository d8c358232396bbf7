"""Scenes of the world as latents, encoded once and kept on disk, so that the UNet's training never waits for the VAE."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..loop import in_workers
from ..world.attributes import SIZE, WORLD_VERSION
from ..world.holes import scene_hole
from ..world.scenes import make_scene
from .narrow_taesd import NarrowTAESD

SHARD = 256
"""Scenes to a file. A file that exists is complete, so an interrupted run loses one file at most."""
_AT_ONCE = 16
GRID = SIZE // 8


@dataclass(frozen=True)
class Latents:
    """Encoded scenes 0 to N - 1 of a split, float16, in the UNet's scale.

    `clean` is [N, 4, 32, 32]. For inpainting there are also `masked`, the same of the pictures with a grey hole, `hole`
    [N, 1, 32, 32] (1 in the hole), and `blank` [4, 32, 32] of a picture that is all hole.
    """

    clean: torch.Tensor
    masked: torch.Tensor | None = None
    hole: torch.Tensor | None = None
    blank: torch.Tensor | None = None


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """A short name for a VAE's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:10]


def as_pixels(pictures: np.ndarray) -> torch.Tensor:
    """Pictures uint8 [B, H, W, 3] as float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0


def with_hole(pixels: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] with grey where hole [B, 1, H, W] is 1, as the host's InpaintModelConditioning makes them."""
    return (pixels - 0.5) * (1.0 - hole) + 0.5


def latent_hole(hole: torch.Tensor) -> torch.Tensor:
    """A hole [B, 1, 256, 256] on the latents' grid [B, 1, 32, 32], 0 or 1, as the host scales and rounds it."""
    return F.interpolate(hole, size=(GRID, GRID), mode="bilinear").round()


@torch.no_grad()
def encode(vae: NarrowTAESD, pixels: torch.Tensor, device: torch.device, bfloat16: bool = True) -> torch.Tensor:
    """Latents [B, 4, H / 8, W / 8], float16 on the CPU."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        return vae.encode(pixels.to(device)).half().cpu()


def write_arrays(path: Path, **arrays: torch.Tensor | np.ndarray) -> None:
    """Write a file of arrays, which is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Scenes(Dataset[dict[str, torch.Tensor]]):
    """Scenes in groups: their pixels, and their holes where a file is to hold masked pictures."""

    def __init__(self, split: str, files: Sequence[tuple[str, int]]) -> None:
        self._split, self._files = split, files
        self.to_a_file = SHARD // _AT_ONCE

    def __len__(self) -> int:
        return len(self._files) * self.to_a_file

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        kind, first = self._files[item // self.to_a_file]
        start = first + item % self.to_a_file * _AT_ONCE
        indices = range(start, start + _AT_ONCE)
        group = {"pixels": as_pixels(np.stack([make_scene(self._split, index).picture for index in indices]))}
        if kind == "masked":
            holes = np.stack([scene_hole(self._split, index) for index in indices])
            group["hole"] = torch.from_numpy(holes).float()[:, None]
        return group


def _encode_group(vae: NarrowTAESD, group: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    pixels, hole = group["pixels"], group.get("hole")
    if hole is None:
        return {"clean": encode(vae, pixels, device)}
    return {"masked": encode(vae, with_hole(pixels, hole), device), "hole": latent_hole(hole).half()}


def load_latents(
    folder: Path,
    vae: NarrowTAESD,
    split: str,
    count: int,
    holes: bool,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[int, int], None] = lambda done, total: None,
    workers: int = 0,
) -> Latents | None:
    """The latents of the first `count` scenes, rounded up to whole shards; what is missing is encoded first.

    They lie in a sub-folder named after the VAE's weights, so that another VAE never meets them. `report` is told the
    number of shards that exist and that are needed. The scenes are made by so many processes as `workers` says. Returns None
    where `should_stop` said so.
    """
    kinds = ("clean", "masked") if holes else ("clean",)
    folder = folder / f"world{WORLD_VERSION}-{fingerprint(vae.state_dict())}" / split
    needed = [(kind, first) for kind in kinds for first in range(0, count, SHARD)]
    paths = [folder / f"{kind}-{first:07d}.npz" for kind, first in needed]
    missing = [place for place, path in enumerate(paths) if not path.is_file()]
    scenes = _Scenes(split, [needed[place] for place in missing])
    groups = in_workers(scenes, workers)
    for done, place in enumerate(missing, len(paths) - len(missing)):
        if should_stop():
            return None
        report(done, len(needed))
        encoded = [_encode_group(vae, group, device) for group in itertools.islice(groups, scenes.to_a_file)]
        write_arrays(paths[place], **{name: torch.cat([group[name] for group in encoded]) for name in encoded[0]})
    found: dict[str, list[torch.Tensor]] = {}
    for path in paths:
        with np.load(path) as arrays:
            for name in arrays.files:
                found.setdefault(name, []).append(torch.from_numpy(arrays[name]))
    joined = {name: torch.cat(tensors) for name, tensors in found.items()}
    if not holes:
        return Latents(joined["clean"])
    blank = encode(vae, torch.full((1, 3, SIZE, SIZE), 0.5), device)[0]
    return Latents(joined["clean"], joined["masked"], joined["hole"], blank)
