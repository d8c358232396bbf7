"""What `dev.py train` does: the stages' training, grids of what they can do, and their files."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..lar_gen.stages import SubjectSource, subject_task
from ..loop import Progress, Settings, Task, Trainer, averaged_weights
from ..painternet.branch import KINDS
from ..painternet.stages import branch_task
from . import export as exporting
from . import samples as grids
from .classifier import ClassifierTask
from .dit import DitTask, new_dit
from .inpaint import InpaintTask
from .latents import load_latents
from .narrow_taesd import NarrowTAESD
from .networks import TextEncoder, new_unet
from .segmenter import SegmenterTask
from .shipped import shipped_text, shipped_vae
from .text2image import TextToImageTask
from .vae import VaeTask
from .vocabulary import world_vocabulary

DEV_SCENES = 256


def duration(seconds: float) -> str:
    """Hours, minutes and seconds for people."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Console:
    """Progress on one line of a terminal, or now and then a line in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._every = 0.5 if self._terminal else 30.0
        self._last = float("-inf")

    def show(self, line: str, last: bool = False) -> None:
        now = time.monotonic()
        if now - self._last < self._every and not last:
            return
        self._last = now
        if self._terminal:
            print(f"\r{line:<110}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)

    def step(self, progress: Progress) -> None:
        losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
        self.show(
            f"{progress.name} {progress.step}/{progress.steps}  {progress.steps_per_second:.2f} steps/s  "
            f"{duration(progress.seconds_left)} left  {losses}",
            last=progress.step == progress.steps,
        )


class Stop:
    """Becomes true with Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self._asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


def trained_vae(runs: Path, device: torch.device) -> NarrowTAESD:
    """The autoencoder with its averaged weights, on a device, in evaluation mode."""
    vae = NarrowTAESD()
    vae.load_state_dict(averaged_weights(runs / "vae", "vae"))
    return vae.eval().requires_grad_(False).to(device)


def make_task(
    options: argparse.Namespace, settings: Settings, device: torch.device, stop: Stop, console: Console
) -> Task | None:
    """The task of a stage; None where the user ended it while the latents were made."""
    if options.stage == "vae":
        return VaeTask(settings.seed)
    if options.stage == "classifier":
        return ClassifierTask(settings.seed)
    if options.stage == "segmenter":
        return SegmenterTask(settings.seed)
    if options.stage.startswith("subject-"):
        source = SubjectSource(options.runs, options.quadruples, options.folder)
        return subject_task(options.stage, source, settings.seed, device, stop, console.show)

    def reporter(split: str) -> Callable[[int, int], None]:
        started = time.monotonic()
        first: list[int] = []

        def report(done: int, total: int) -> None:
            first.append(done)
            rate = (done - first[0]) / max(time.monotonic() - started, 1e-9)
            left = f"  {duration((total - done) / rate)} left" if rate else ""
            console.show(f"encoding scenes ({split}): {done}/{total} files{left}")

        return report

    if options.stage in KINDS:
        return branch_task(
            options.stage, options.runs, options.regions, options.folder, settings.seed, device, stop, reporter
        )
    holes = options.stage == "inpaint"
    vae = shipped_vae().to(device) if options.stage == "dit" else trained_vae(options.runs, device)
    sets = []
    for split, count in (("dev", DEV_SCENES), ("train", options.scenes)):
        latents = load_latents(
            options.runs / "latents", vae, split, count, holes, device, stop, reporter(split), settings.workers
        )
        if latents is None:
            return None
        sets.append(latents)
    dev, train = sets
    vocabulary = world_vocabulary()
    if options.stage == "dit":
        return DitTask(train, dev, vocabulary, shipped_text(), settings.seed)
    if not holes:
        return TextToImageTask(train, dev, vocabulary, settings.seed)
    before = options.runs / "text2image"
    unet, text = (averaged_weights(before, name) for name in ("unet", "text"))
    return InpaintTask(train, dev, vocabulary, unet, text)


def train(options: argparse.Namespace, settings: Settings, device: torch.device) -> int:
    """Train one stage, to its end or until the user stops it."""
    stop, console = Stop(), Console()
    task = make_task(options, settings, device, stop, console)
    if task is None:
        print("\nStopped; the same command goes on from here.")
        return 130
    weights = sum(parameter.numel() for parameter in task.networks.parameters())
    trainer = Trainer(task, settings, options.runs / options.stage, device, options.restart)
    print(f"{options.stage}: {weights / 1e6:.2f} M weights on {device}, from step {trainer.step} of {settings.steps}")
    if trainer.step < settings.steps:
        # They are of a shorter run.
        (trainer.folder / "figures.json").unlink(missing_ok=True)
    finished = trainer.train(stop, console.step)
    if not finished:
        print(f"\nStopped after step {trainer.step} and saved; the same command goes on from here.")
        return 130
    trainer.use_average()
    figures = task.evaluate()
    (trainer.folder / "figures.json").write_text(json.dumps(figures))
    print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    return 0


def samples(options: argparse.Namespace, device: torch.device) -> int:
    """Write grids for every stage that has a checkpoint."""
    vocabulary = world_vocabulary()
    out = options.out or options.runs / "samples"
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"world": grids.world_grid()}
    has = {name: (options.runs / name / "checkpoint.pt").is_file() for name in ("vae", "text2image", "inpaint")}
    if has["vae"]:
        vae = trained_vae(options.runs, device)
        pictures["vae"] = grids.vae_grid(vae, device)
        if has["text2image"]:
            text = TextEncoder(vocabulary, seed=0)
            text.load_state_dict(averaged_weights(options.runs / "text2image", "text"))
            text = text.to(device)
            for name, channels, draw in (
                ("text2image", 4, grids.text2image_grid),
                ("inpaint", 9, grids.inpaint_grid),
            ):
                if has[name]:
                    unet = new_unet(channels, seed=0)
                    unet.load_state_dict(averaged_weights(options.runs / name, "unet"))
                    pictures[name] = draw(unet.to(device), text, vae, vocabulary, device)
    if (options.runs / "dit" / "checkpoint.pt").is_file():
        dit = new_dit(seed=0)
        dit.load_state_dict(averaged_weights(options.runs / "dit", "network"))
        beside = shipped_text().to(device), shipped_vae().to(device)
        pictures["dit"] = grids.text2image_grid(dit.to(device), *beside, vocabulary, device)
    for name, picture in pictures.items():
        picture.save(out / f"{name}.png", optimize=True)
        print(out / f"{name}.png")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write the files for the host."""
    files = exporting.export(options.runs, options.out or options.runs / "export")
    for path in files:
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")
    return 0
