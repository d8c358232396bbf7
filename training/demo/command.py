"""Trains the demo models, one stage at a time:  python dev.py train STAGE [options]

    vae          the autoencoder
    text2image   the 4-channel UNet and the text encoder (encodes the world with the VAE first)
    inpaint      the 9-channel UNet, from text2image
    dit          a diffusion transformer, Flux's in small, with text2image's text encoder
    classifier   shape, colour and pattern of an object, for the benchmark
    segmenter    a small Segment Anything of the world
    subject-vision    what sees subjects: CLIP's vision model in small
    subject-assign    LAR-Gen's first stage, from inpaint: text and subject (encodes subjects in scenes first)
    subject-refine    LAR-Gen's second stage: a reference network
    subject-likeness  whether two crops show the same object, for the benchmark
    branch       PainterNet: a control branch beside text2image, from inpaint (encodes objects in scenes first)
    branch-without-loss, branch-of-layers    its ablations: no attention loss; no attention control points either
    samples      grids of pictures of what has been trained so far
    export       the files for the host, in half precision

The same command again resumes a stage. Ctrl-C (or SIGTERM) saves and ends it; nothing is lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from comfy.cli_args import args as host_arguments

from devtools.options import positive

from ..loop import Settings

RUNS = Path(__file__).resolve().parents[2] / ".cache" / "training"
DEFAULTS = {
    "vae": Settings(steps=6_000, batch=8, learning_rate=1e-3),
    "text2image": Settings(steps=15_000, batch=16, learning_rate=1e-3),
    "inpaint": Settings(steps=4_500, batch=16, learning_rate=5e-4),
    "dit": Settings(steps=4_500, batch=16, learning_rate=2e-3, muon=True),
    "classifier": Settings(steps=4_000, batch=64, learning_rate=1e-3),
    "segmenter": Settings(steps=8_000, batch=4, learning_rate=5e-4),
    "subject-vision": Settings(steps=1_400, batch=48, learning_rate=1e-3),
    "subject-likeness": Settings(steps=900, batch=48, learning_rate=1e-3),
    "subject-assign": Settings(steps=3_500, batch=16, learning_rate=5e-4),
    "subject-refine": Settings(steps=2_400, batch=16, learning_rate=5e-4),
    "branch": Settings(steps=2_000, batch=16, learning_rate=5e-4),
    "branch-without-loss": Settings(steps=2_000, batch=16, learning_rate=5e-4),
    "branch-of-layers": Settings(steps=2_000, batch=16, learning_rate=5e-4),
}


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
        help="with more --steps than a run that has ended: its learning rate rises again; --batch may be another",
    )
    parser.add_argument("--batch", type=positive, help="pictures in a step; " + listed("batch"))
    parser.add_argument("--learning-rate", type=float, help=listed("learning_rate"))
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument(
        "--scenes", type=positive, default=16_384, help="scenes that are encoded (default: %(default)s)"
    )
    parser.add_argument(
        "--quadruples", type=positive, default=6_144, help="subjects that are encoded (default: %(default)s)"
    )
    parser.add_argument(
        "--regions", type=positive, default=8_192, help="objects that are encoded for a branch (default: %(default)s)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="further subjects or regions: pictures with masks and prompts, as Save Subjects writes them",
    )
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument("--threads", type=positive, help="threads on the CPU (default: torch's own choice)")
    parser.add_argument(
        "--workers", type=int, help="processes that make scenes and batches (default: 0, none besides this one)"
    )
    parser.add_argument("--save-every", type=float, metavar="SECONDS", help="default: 180")
    parser.add_argument("--float32", action="store_true", help="no bfloat16")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of all stages (default: .cache/training)")
    parser.add_argument("--out", type=Path, help="folder for what samples and export write")
    return parser.parse_args(arguments)


def usable_device(name: str) -> torch.device:
    """A device that torch can put a tensor on here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"'{name}' can't be used here: {str(error).splitlines()[0]}") from error


def listed(name: str) -> str:
    """The stages' defaults of one setting."""
    return "default: " + ", ".join(f"{stage} {getattr(settings, name)}" for stage, settings in DEFAULTS.items())


def settings(options: argparse.Namespace) -> Settings:
    """The settings of a stage: its defaults, and what the command line says."""
    names = ("steps", "batch", "learning_rate", "seed", "workers", "save_every")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(DEFAULTS[options.stage], bfloat16=not options.float32, **given)


def main() -> int:
    """Run one stage."""
    options = parse()
    options.runs = Path(os.path.abspath(options.runs))
    if options.threads:
        torch.set_num_threads(options.threads)
    # The host's default on the CPU saves memory; this is the fast one, and the one with a derivative to match. The host reads
    # it when its attention is imported, with the stages.
    host_arguments.use_pytorch_cross_attention = True
    from . import stages

    try:
        if options.stage == "samples":
            return stages.samples(options, options.device)
        if options.stage == "export":
            return stages.export(options)
        return stages.train(options, settings(options), options.device)
    except (FileNotFoundError, ValueError) as error:
        print(f"dev.py train: {error}", file=sys.stderr)
        return 1
