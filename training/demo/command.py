"""Trains the demo models, one stage at a time:  python dev.py train STAGE [options]

    vae          the autoencoder
    text2image   the 4-channel UNet and the text encoder (encodes the world with the VAE first)
    inpaint      the 9-channel UNet, from text2image
    classifier   shape, colour and pattern of an object, for the benchmark
    segmenter    a small Segment Anything of the world
    samples      grids of pictures of what has been trained so far
    export       the files for the host, in half precision

The same command again resumes a stage. Ctrl-C (or SIGTERM) saves and ends it; nothing is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As a script this file has its own folder first on the path, whose modules have common names.
sys.path[0] = str(ROOT / "tests" / "support")

from truefill_testing.host import ensure_host, pack_module  # noqa: E402

ensure_host()

from comfy.cli_args import args as host_arguments  # noqa: E402

# The host's default on the CPU saves memory; this is the fast one, and the one with a derivative to match.
host_arguments.use_pytorch_cross_attention = True

import torch  # noqa: E402

loop = pack_module("training.loop")
Settings = loop.Settings

RUNS = ROOT / ".cache" / "training"
DEFAULTS = {
    "vae": Settings(steps=6_000, batch=8, learning_rate=1e-3),
    "text2image": Settings(steps=15_000, batch=16, learning_rate=1e-3),
    "inpaint": Settings(steps=4_500, batch=16, learning_rate=5e-4),
    "classifier": Settings(steps=4_000, batch=64, learning_rate=1e-3),
    "segmenter": Settings(steps=8_000, batch=4, learning_rate=5e-4),
}
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

    def step(self, progress) -> None:
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


def trained_vae(runs: Path, device: torch.device):
    """The autoencoder with its averaged weights, on a device, in evaluation mode."""
    vae = pack_module("training.demo.narrow_taesd").NarrowTAESD()
    vae.load_state_dict(loop.averaged_weights(runs / "vae", "vae"))
    return vae.eval().requires_grad_(False).to(device)


def make_task(options: argparse.Namespace, settings, device: torch.device, stop: Stop, console: Console):
    """The task of a stage; None where the user ended it while the latents were made."""
    if options.stage == "vae":
        return pack_module("training.demo.vae").VaeTask(settings.seed)
    if options.stage == "classifier":
        return pack_module("training.demo.classifier").ClassifierTask(settings.seed)
    if options.stage == "segmenter":
        return pack_module("training.demo.segmenter").SegmenterTask(settings.seed)
    holes = options.stage == "inpaint"
    vae = trained_vae(options.runs, device)
    load_latents = pack_module("training.demo.latents").load_latents
    sets = []
    for split, count in (("dev", DEV_SCENES), ("train", options.scenes)):
        started, first = time.monotonic(), [-1]

        def report(done: int, total: int, split=split, started=started, first=first) -> None:
            if first[0] < 0:
                first[0] = done
            rate = (done - first[0]) / max(time.monotonic() - started, 1e-9)
            left = f"  {duration((total - done) / rate)} left" if rate else ""
            console.show(f"encoding scenes ({split}): {done}/{total} files{left}")

        latents = load_latents(options.runs / "latents", vae, split, count, holes, device, stop, report)
        if latents is None:
            return None
        sets.append(latents)
    dev, train = sets
    vocabulary = pack_module("training.demo.vocabulary").world_vocabulary()
    if not holes:
        return pack_module("training.demo.text2image").TextToImageTask(train, dev, vocabulary, settings.seed)
    before = options.runs / "text2image"
    unet, text = (loop.averaged_weights(before, name) for name in ("unet", "text"))
    return pack_module("training.demo.inpaint").InpaintTask(train, dev, vocabulary, unet, text)


def train(options: argparse.Namespace, device: torch.device) -> int:
    """Train one stage, to its end or until the user stops it."""
    stop, console = Stop(), Console()
    given = {
        name: getattr(options, name) for name in ("steps", "batch", "learning_rate", "seed", "workers", "save_every")
    }
    settings = replace(DEFAULTS[options.stage], **{name: value for name, value in given.items() if value is not None})
    settings = replace(settings, bfloat16=not options.float32)
    task = make_task(options, settings, device, stop, console)
    if task is None:
        print("\nStopped; the same command goes on from here.")
        return 130
    weights = sum(parameter.numel() for parameter in task.networks.parameters())
    trainer = loop.Trainer(task, settings, options.runs / options.stage, device, options.restart)
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
    grids = pack_module("training.demo.samples")
    models = pack_module("training.demo.networks")
    vocabulary = pack_module("training.demo.vocabulary").world_vocabulary()
    out = options.out or options.runs / "samples"
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"world": grids.world_grid()}
    has = {name: (options.runs / name / "checkpoint.pt").is_file() for name in DEFAULTS}
    if has["vae"]:
        vae = trained_vae(options.runs, device)
        pictures["vae"] = grids.vae_grid(vae, device)
        if has["text2image"]:
            text = models.TextEncoder(vocabulary, seed=0)
            text.load_state_dict(loop.averaged_weights(options.runs / "text2image", "text"))
            text = text.to(device)
            for name, channels, draw in (
                ("text2image", 4, grids.text2image_grid),
                ("inpaint", 9, grids.inpaint_grid),
            ):
                if has[name]:
                    unet = models.new_unet(channels, seed=0)
                    unet.load_state_dict(loop.averaged_weights(options.runs / name, "unet"))
                    pictures[name] = draw(unet.to(device), text, vae, vocabulary, device)
    for name, picture in pictures.items():
        picture.save(out / f"{name}.png", optimize=True)
        print(out / f"{name}.png")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write the files for the host."""
    files = pack_module("training.demo.export").export(options.runs, options.out or options.runs / "export")
    for path in files:
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="dev.py train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*DEFAULTS, "samples", "export"])
    parser.add_argument("--steps", type=positive, help="length of the run; " + listed("steps"))
    parser.add_argument(
        "--restart",
        action="store_true",
        help="with more --steps than a run that has ended: its learning rate rises again",
    )
    parser.add_argument("--batch", type=positive, help="pictures in a step; " + listed("batch"))
    parser.add_argument("--learning-rate", type=float, help=listed("learning_rate"))
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument(
        "--scenes", type=positive, default=16_384, help="scenes that are encoded (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument("--threads", type=positive, help="threads on the CPU (default: torch's own choice)")
    parser.add_argument("--workers", type=int, help="processes that make batches (default: 0, none besides this one)")
    parser.add_argument("--save-every", type=float, metavar="SECONDS", help="default: 180")
    parser.add_argument("--float32", action="store_true", help="no bfloat16")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of all stages (default: .cache/training)")
    parser.add_argument("--out", type=Path, help="folder for what samples and export write")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def usable_device(name: str) -> torch.device:
    """A device that torch can put a tensor on here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"'{name}' can't be used here: {str(error).splitlines()[0]}") from error


def listed(name: str) -> str:
    """The stages' defaults of one setting."""
    return "default: " + ", ".join(f"{stage} {getattr(settings, name)}" for stage, settings in DEFAULTS.items())


def main() -> int:
    """Run one stage."""
    options = parse()
    options.runs = Path(os.path.abspath(options.runs))
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.stage == "samples":
            return samples(options, options.device)
        if options.stage == "export":
            return export(options)
        return train(options, options.device)
    except (FileNotFoundError, ValueError) as error:
        print(f"dev.py train: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
