"""The stages of a branch's training, from the demo model's networks as they ship."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..demo.shipped import shipped_text, shipped_unet, shipped_vae
from ..demo.vocabulary import world_vocabulary
from ..folder import folder_regions
from ..loop import Task
from .branch import KINDS, BranchTask, new_branch
from .regions import Encoded, Region, encode_regions, load_regions

DEV_REGIONS = 256


def branch_task(
    stage: str,
    runs: Path,
    count: int,
    folder: Path | None,
    seed: int,
    device: torch.device,
    should_stop: Callable[[], bool],
    reporter: Callable[[str], Callable[[int, int], None]],
) -> Task | None:
    """The task of a stage over so many regions of the world, and those of a folder; None where the user ended it meanwhile.

    Raises ValueError for a folder that can't be read (`imaging.subject_files`).
    """
    vae = shipped_vae().to(device)
    more = [] if folder is None else [Region(of.picture, of.hole, of.prompt) for of in folder_regions(folder, seed)]
    sets = []
    for split, size in (("dev", DEV_REGIONS), ("train", count)):
        found = load_regions(runs / "latents", vae, split, size, device, should_stop, reporter(split))
        if found is None:
            return None
        sets.append(found)
    dev, train = sets
    if more:
        train = train.with_more(Encoded.of([encode_regions(vae, more, device)]))
    branch = new_branch(shipped_unet("inpaint", 9), KINDS[stage].attention_points)
    return BranchTask(stage, train, dev, shipped_unet("text2image", 4), branch, shipped_text(), world_vocabulary())
