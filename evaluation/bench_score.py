"""Does RASG's score S know, on the demo model, whether a hole shows what the prompt asks for?

RASG can only help where S is higher with the thing in the hole than without it. For triplets of the development split the thing
is painted into the hole, both pictures are noised alike to several levels, and S is read at the first evaluation of each:
`higher` is the share of triplets (95 %: Wilson's interval) in which the picture with the thing has the higher S. 50 % is chance.

    python dev.py bench score [--triplets 100] [--seed 0] [--models 9-channel 4-channel] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from ..model_patches.hd_painter import rasg
from ..training.world.attributes import SceneObject
from ..training.world.scenes import render_objects
from ..training.world.triplets import make_triplet
from . import accuracy
from .metrics import mean_interval, wilson_interval
from .tables import show_table

STEPS = 20
LEVELS = (0, 5, 10, 15)
"""Steps of 20 before whose evaluation S is read."""


def with_the_thing(triplet: Any) -> Any:
    """The triplet with what its prompt asks for painted into its hole."""
    rows, columns = np.nonzero(triplet.hole)
    radius = 0.42 * min(np.ptp(rows), np.ptp(columns))
    place = float(columns.mean()), float(rows.mean())
    item = SceneObject(triplet.shape, triplet.colour, triplet.pattern, *place, float(radius), 0.0, 0.0, 0.0)
    canvas = triplet.scene.picture.astype(np.float32)
    render_objects(canvas, (item,))
    picture = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return replace(triplet, scene=replace(triplet.scene, picture=picture))


def score(models: Any, task: Any, seed: int, step: int) -> float:
    """S of a task's own picture, noised to the level before a step."""
    found: list[float] = []
    original = rasg.attention_score

    def noted(scores: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
        result = original(scores, hole)
        found.append(float(result))
        return result

    patched = accuracy.patched(models[task.model][0], accuracy.Method(task.model, eta=rasg.RASG().eta))
    with torch.inference_mode(), mock.patch.object(rasg, "attention_score", noted):
        accuracy.host_nodes.common_ksampler(
            patched, seed, STEPS, 7.5, "euler", "normal", *task.conditions, start_step=step, last_step=step + 1
        )
    return found[0]


def changes(models: Any, model: str, index: int) -> list[float]:
    """By how much the thing in the hole of one triplet raises S, at each of LEVELS."""
    triplet = make_triplet("dev", index)
    without, present = (accuracy.prepare(models, model, one) for one in (triplet, with_the_thing(triplet)))
    return [score(models, present, index, step) - score(models, without, index, step) for step in LEVELS]


def row(model: str, step: int, found: Sequence[float]) -> dict[str, Any]:
    """One model at one noise level."""
    higher = sum(change > 0 for change in found)
    low, high = wilson_interval(higher, len(found))
    mean, mean_low, mean_high = mean_interval(list(found))
    return {
        "model": model,
        "step": f"{step}/{STEPS}",
        "n": len(found),
        "higher, %": f"{100 * higher / len(found):.0f} ({100 * low:.0f} to {100 * high:.0f})",
        "change of S": f"{mean:+.2f} ({mean_low:+.2f} to {mean_high:+.2f})",
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python dev.py bench score", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--triplets", type=int, default=100, metavar="N", help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first triplet (default: 0)")
    parser.add_argument("--models", nargs="+", choices=tuple(accuracy.MODELS), default=["9-channel"])
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    models = accuracy.Models()
    indices = range(options.seed, options.seed + options.triplets)
    rows = []
    for model in options.models:
        found = [changes(models, model, index) for index in indices]
        rows += [row(model, step, [one[place] for one in found]) for place, step in enumerate(LEVELS)]
    show_table(f"{platform.machine()}, torch {torch.__version__}; development split", rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
