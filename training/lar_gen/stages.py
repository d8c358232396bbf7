"""The stages of LAR-Gen's training: what sees subjects, and what puts them into a hole."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ...weights.demo_model import UNET_PREFIX
from ...weights.demo_subject import RESAMPLER_PREFIX, VISION_PREFIX
from ..demo.shipped import shipped_text, shipped_unet, shipped_vae
from ..demo.vocabulary import world_vocabulary
from ..loop import Task, averaged_weights
from .assign import AssignTask, Data, SubjectUNet, block_name
from .folder import folder_examples
from .likeness import LikenessTask
from .quadruples import Encoders, encode_quadruples, load_quadruples
from .refine import RefineTask
from .start import shipped_part, subject_ships
from .vision import Vision, VisionTask

DEV_QUADRUPLES = 256
VISION, ASSIGN, REFINE, LIKENESS = "subject-vision", "subject-assign", "subject-refine", "subject-likeness"


def _begins_with_what_ships(runs: Path) -> bool:
    """Whether no run of the first two stages is there, which belong together, but their file."""
    return subject_ships() and not any((runs / stage / "checkpoint.pt").is_file() for stage in (VISION, ASSIGN))


def trained_vision(runs: Path) -> Vision:
    """The first stage's network with its averaged weights, in evaluation mode; without runs the one that ships."""
    vision = Vision(seed=0)
    if not _begins_with_what_ships(runs):
        vision.load_state_dict(averaged_weights(runs / VISION, "vision"))
    else:
        vision.model.load_state_dict(shipped_part(VISION_PREFIX))
    return vision.eval().requires_grad_(False)


def trained_main(runs: Path) -> SubjectUNet:
    """The second stage's network with its averaged weights; without runs the one that ships."""
    main = SubjectUNet(shipped_unet("inpaint", 9), seed=0)
    if not _begins_with_what_ships(runs):
        main.load_state_dict(averaged_weights(runs / ASSIGN, "main"))
        return main
    unet = shipped_part(UNET_PREFIX)
    for place, pair in main.projections.items():
        names = {f"{kind}.weight": f"{block_name(place)}.to_{kind}_ip.weight" for kind in ("k", "v")}
        pair.load_state_dict({name: unet.pop(shipped) for name, shipped in names.items()})
    main.unet.load_state_dict(unet)
    main.resampler.load_state_dict(shipped_part(RESAMPLER_PREFIX))
    return main


class SubjectSource(NamedTuple):
    """Where the stages and their data lie: so many quadruples of the world, and a folder with more (`imaging.subject_files`)."""

    runs: Path
    quadruples: int
    folder: Path | None = None


def subject_task(
    stage: str,
    source: SubjectSource,
    seed: int,
    device: torch.device,
    should_stop: Callable[[], bool],
    show: Callable[[str], None],
) -> Task | None:
    """The task of a stage; None where the user ended it while the quadruples were encoded.

    Raises FileNotFoundError where an earlier stage is missing, and ValueError for a folder without subjects.
    """
    if stage == VISION:
        return VisionTask(seed)
    if stage == LIKENESS:
        return LikenessTask(seed)
    runs = source.runs
    encoders = Encoders(shipped_vae(), trained_vision(runs), device)
    examples = [] if source.folder is None else folder_examples(source.folder, seed)
    sets = []
    for split, count in (("dev", DEV_QUADRUPLES), ("train", source.quadruples)):
        paths = encode_quadruples(runs / "latents", encoders, split, count, should_stop, _reporter(split, show))
        if paths is None:
            return None
        sets.append(load_quadruples(paths))
    dev, train = sets
    if examples:
        train = train.with_more(encoders.encode(examples))
    data = Data(train, dev, encoders.nothing(), shipped_text(), world_vocabulary())
    if stage == ASSIGN:
        return AssignTask(data, shipped_unet("inpaint", 9), seed)
    return RefineTask(data, trained_main(runs), shipped_unet("text2image", 4), seed)


def _reporter(split: str, show: Callable[[str], None]) -> Callable[[int, int], None]:
    started = time.monotonic()
    first: list[int] = []

    def report(done: int, total: int) -> None:
        first.append(done)
        seconds = (time.monotonic() - started) / max(done - first[0], 1) * (total - done)
        left = f"  {seconds / 60:.0f} min left" if done > first[0] else ""
        show(f"encoding subjects ({split}): {done}/{total} files{left}")

    return report
