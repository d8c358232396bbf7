"""Does a branch beside a plain model help, and what does it cost?

Accuracy, on the demo world: the host's nodes fill holes of the split "test" by the plain text-to-image demo model, by the same
with a branch (as trained without attention control points, with them, and with the attention loss: PainterNet's ablation), with
semantic boundary control, by PILOT, and by the inpainting demo model. Each triplet's hole is made anew about a thing of the shape
that the prompt asks for: its box, an irregular mask as people draw it, or its outline. "right" is how often the classifier finds
the asked-for shape and colour in the hole, in percent; intervals are 95 %, Wilson's, and the normal approximation for the paired
difference to the first row and for seams. "before" is how much the background changes before the original is put back, in levels.

Cost (`--speed`): a full-depth SD1.5 UNet with random weights, plain, with a branch of PainterNet's, PowerPaint's and BrushNet's
kind, and with two; 4 steps with CFG, in turn; medians. Memory is the greatest growth during a run; the weights' is theirs.

    python dev.py bench branch [--triplets 60] [--rows NAME ...] [--outcomes FILE] [--grid FILE.png]
    python dev.py bench branch --speed
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy.sd import CLIP, VAE

from ..imaging.mask_shapes import Shape, mask_shape
from ..model_patches.painternet.branch import Branch, with_branch
from ..model_patches.painternet.network import BranchNetwork, branch_model
from ..training.demo.samples import grid
from ..training.painternet.export import trained_branch
from ..training.world.attributes import SIZE, SceneObject
from ..training.world.scenes import render_objects
from ..training.world.triplets import Triplet, make_triplet
from ..weights.demo_model import FOLDER
from ..weights.painternet import DEMO_FILE, BranchPlan, read_branch
from . import accuracy, full_size
from .judge import Judge
from .metrics import mean_interval, wilson_interval
from .outcomes import keep_outcome, kept_outcomes, weights_digest
from .tables import show_table, with_interval

SPLIT = "test"
SHAPES: dict[str, Shape] = {"box": "box", "irregular": "irregular", "outline": "as it is"}
GRID_TRIPLETS = 6
ROWS: dict[str, tuple[accuracy.Method, str | None]] = {
    "plain 4-channel": (accuracy.Method("4-channel"), None),
    "layer points": (accuracy.Method("4-channel"), "branch-of-layers"),
    "+ attention points": (accuracy.Method("4-channel"), "branch-without-loss"),
    "+ attention loss": (accuracy.Method("4-channel"), "branch"),
    "SBC": (accuracy.Method("4-channel", boundary=True), None),
    "PILOT": (accuracy.Method("4-channel", pilot=accuracy.FILLED), None),
    "plain 9-channel": (accuracy.Method("9-channel"), None),
}
"""The method of `accuracy`, and the stage of the branch's training."""
SHIPPED = "branch"


def task_of(triplet: Triplet, shape: str) -> Triplet:
    """The triplet with a hole of one of SHAPES about a thing as the prompt asks for it, in the middle of its own hole."""
    rows, columns = np.flatnonzero(triplet.hole.any(axis=1)), np.flatnonzero(triplet.hole.any(axis=0))
    top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
    radius = 0.46 * min(bottom - top, right - left)
    thing = SceneObject(
        triplet.shape, triplet.colour, triplet.pattern, (left + right) / 2, (top + bottom) / 2, radius, 0.0, 0.0, 0.0
    )
    (outline,) = render_objects(np.zeros((SIZE, SIZE, 3), dtype=np.float32), (thing,))
    seed = int.from_bytes(hashlib.sha256(triplet.hole.tobytes()).digest()[:4], "big")
    hole = mask_shape(torch.from_numpy(outline).float(), SHAPES[shape], seed)[0, 0].numpy() > 0
    return replace(triplet, hole=hole)


class Branched:
    """The demo models as `accuracy` asks for them, with a branch that looks at a task's picture."""

    def __init__(self, models: accuracy.Models, network: ModelPatcher, task: accuracy.Task) -> None:
        self._models, self._network, self._task = models, network, task

    def __getitem__(self, name: str) -> tuple[ModelPatcher, CLIP, VAE]:
        """MODEL, CLIP and VAE."""
        model, clip, vae = self._models[name]
        settings = Branch(
            network=self._network,
            kind="PainterNet",
            vae=vae,
            picture=self._task.pixels,
            mask=self._task.hole,
        )
        return with_branch(model, settings), clip, vae


class Bench:
    """The models, the branches that are there, and what judges them."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self._models, self._judge = accuracy.Models(folder), Judge(folder)
        self._folder, self._runs = folder, runs

    def has(self, stage: str) -> bool:
        """Whether the branch of a stage ships or was trained here."""
        file = self._folder / DEMO_FILE
        return (stage == SHIPPED and file.is_file()) or (self._runs / stage / "checkpoint.pt").is_file()

    @cache  # noqa: B019
    def network(self, stage: str) -> ModelPatcher:
        """The shipped branch, or a stage's."""
        if stage == SHIPPED and (self._folder / DEMO_FILE).is_file():
            return branch_model(read_branch(self._folder / DEMO_FILE))
        cpu = torch.device("cpu")
        return CoreModelPatcher(
            trained_branch(self._runs / stage).eval().requires_grad_(False), load_device=cpu, offload_device=cpu
        )

    def attempt(
        self, row: str, index: int, triplet: Triplet, sampling: accuracy.KSampling
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """What came of a triplet, and the picture [1, H, W, 3]."""
        method, stage = ROWS[row]
        models: Any = self._models
        task = accuracy.prepare(models, method.model, triplet)
        if stage is not None:
            with torch.inference_mode():
                models = Branched(self._models, self.network(stage), task)
        outcome, picture = accuracy.attempt(models, method, task, index, sampling, self._judge)
        return asdict(outcome), picture

    def settings(self, row: str, options: argparse.Namespace) -> dict[str, Any]:
        """What an outcome depends on besides its shape and index."""
        stage = ROWS[row][1]
        found = {"weights": weights_digest(options.weights), "steps": options.steps, "cfg": options.cfg}
        if stage is not None:
            tensors = self.network(stage).model.state_dict()
            parts = b"".join(tensors[name].float().numpy().tobytes() for name in sorted(tensors))
            found["branch"] = hashlib.sha256(parts).hexdigest()[:12]
        return found


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python dev.py bench branch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--triplets", type=int, default=60, metavar="N", help="for each shape of hole (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first triplet (default: 0)")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--cfg", type=float, default=7.5, help="default: 7.5")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="folder of the demo model's files")
    parser.add_argument("--runs", type=Path, default=Path(".cache/training"), help="folder of the trained stages")
    parser.add_argument("--outcomes", type=Path, help="file to keep the outcomes in, and to go on from")
    parser.add_argument("--speed", action="store_true", help="measure time and memory instead")
    parser.add_argument("--size", type=int, default=256, help="pixels of the side, for --speed (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, for --speed (default: 3)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--grid", type=Path, help="write the pictures of the first 6 triplets here")
    options = parser.parse_args()
    if min(options.triplets, options.steps, options.rounds) < 1 or options.seed < 0:
        parser.error("--triplets, --steps and --rounds are 1 or more, --seed 0 or more.")
    return options


def summary(
    row: str, shape: str, found: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """One row of the table; `first` are the first row's outcomes, of the same holes."""
    right = sum(of["right"] for of in found)
    result: dict[str, Any] = {"shape": shape, "row": row, "n": len(found), "right": right / len(found)}
    result["right_ci95"] = wilson_interval(right, len(found))
    result["empty"] = sum(of["empty"] for of in found) / len(found)
    result["seam"], *result["seam_ci95"] = mean_interval([of["seam"] for of in found])
    result["change_before"] = float(np.mean([of["change_before"] for of in found]))
    result["background_max_error"] = max(of["background_error"] for of in found)
    result["seconds"] = float(np.median([of["seconds"] for of in found]))
    if first is not None:
        differences = [float(ours["right"] - theirs["right"]) for ours, theirs in zip(found, first, strict=True)]
        result["rise"], *result["rise_ci95"] = mean_interval(differences)
    return result


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One row of the table as text; shares in percent."""

    return {
        "hole": row["shape"],
        "row": row["row"],
        "n": str(row["n"]),
        "right": with_interval(row, "right"),
        "to the first": with_interval(row, "rise"),
        "nothing": f"{100 * row['empty']:.1f}",
        "seam": with_interval(row, "seam", 1.0),
        "before": f"{row['change_before']:.1f}",
        "background": f"{row['background_max_error']:g}",
        "seconds": f"{row['seconds']:.1f}",
    }


def quality(options: argparse.Namespace, bench: Bench, rows: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the table, for each shape and for all of them."""
    settings = {row: bench.settings(row, options) for row in rows}
    done = kept_outcomes(options.outcomes, ("row", "shape"), lambda line: settings.get(line["row"]))
    sampling = accuracy.KSampling(steps=options.steps, cfg=options.cfg)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {shape: {row: [] for row in rows} for shape in options.shapes}
    lines, captions = [], []
    total = len(options.shapes) * options.triplets * len(rows)
    made, started = 0, time.monotonic()
    for place, index in enumerate(range(options.seed, options.seed + options.triplets)):
        for number, shape in enumerate(options.shapes):
            triplet = task_of(make_triplet(SPLIT, index), shape)
            shown = options.grid is not None and place < GRID_TRIPLETS and number == place % len(options.shapes)
            pictures = [np.where(triplet.hole[..., None], np.uint8(128), triplet.scene.picture)]
            for row in rows:
                outcome = done.get((row, shape, index))
                if outcome is None or shown:
                    fresh, picture = bench.attempt(row, index, triplet, sampling)
                    pictures.append((255.0 * picture[0]).round().byte().numpy())
                    made += 1
                    if outcome is None:
                        keep_outcome(options.outcomes, settings[row], fresh, row=row, shape=shape)
                    outcome = fresh
                else:
                    total -= 1
                found[shape][row].append(outcome)
            if shown:
                lines.append(pictures)
                captions.append([f"{triplet.prompt}, {shape}", *rows])
        if place % 5 == 4 and made:
            left = (time.monotonic() - started) / made * max(total - made, 0)
            print(f"  {place + 1}/{options.triplets} triplets, {left / 60:.0f} min left", file=sys.stderr, flush=True)
    if options.grid:
        grid(lines, captions).save(options.grid, optimize=True)
    everything = {row: [one for of in found.values() for one in of[row]] for row in rows}
    return [
        summary(row, shape, of[row], None if row == rows[0] else of[rows[0]])
        for shape, of in {**found, "all": everything}.items()
        for row in rows
    ]


def random_network(has_attention: bool, has_points: bool, dtype: torch.dtype) -> ModelPatcher:
    """A branch of SD1.5's full size."""
    depths = (1, 1, 1, 1, 1, 1, 0, 0) if has_attention else (0,) * 8
    plan = BranchPlan(
        channels=320,
        levels=(1, 2, 4, 4),
        resnets=(2, 2, 2, 2),
        depth_down=depths,
        depth_middle=int(has_attention),
        depth_up=(0, 0, 0, *[1] * 9) if has_attention else (0,) * 12,
        context=768 if has_attention else None,
        pooled=None,
        is_linear=False,
        heads=8,
        head_channels=None,
    )
    network = BranchNetwork(plan, has_points, comfy.ops.manual_cast, dtype=dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    device = comfy.model_management.get_torch_device()
    return CoreModelPatcher(network, load_device=device, offload_device=comfy.model_management.unet_offload_device())


class MeanVae:
    """In the place of a VAE, whose time is not asked for."""

    def spacial_compression_encode(self) -> int:
        """Pixels of a cell's side."""
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Four channels of means."""
        planes = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return planes[:, [0, 1, 2, 0]]


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of a run with a branch to one without."""
    device = comfy.model_management.get_torch_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = full_size.full_size_model(device, dtype, inpainting=False)
    scene = full_size.Scene(options.size)
    picture = torch.rand(1, options.size, options.size, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, options.size, options.size)
    mask[..., : options.size // 2, : options.size // 2] = 1.0

    def with_network(network: ModelPatcher, on: Any = model) -> Any:
        return with_branch(on, Branch(network=network, kind="", vae=MeanVae(), picture=picture, mask=mask))

    painternet, powerpaint, brushnet = (
        random_network(attention, points, dtype) for attention, points in ((True, True), (True, False), (False, False))
    )
    models = {
        "plain": model,
        "BrushNet": with_network(brushnet),
        "PowerPaint": with_network(powerpaint),
        "PainterNet": with_network(painternet),
        "PainterNet + BrushNet": with_network(brushnet, with_network(painternet)),
    }
    own = model.model_size()
    sizes = {"BrushNet": brushnet, "PowerPaint": powerpaint, "PainterNet": painternet}

    def run(patched: Any) -> Callable[[], None]:
        return lambda: scene.sample(patched, comfy.samplers.sampler_object("euler"), (10.0, 9.0, 8.0, 7.0, 6.0))

    runs = {name: run(patched) for name, patched in models.items()}
    results = full_size.compare(runs, options.rounds, True, device)
    return [
        {**row, "weights": sizes[row["variant"]].model_size() / own if row["variant"] in sizes else None}
        for row in results
    ]


def main() -> int:
    """Run the benchmark."""
    options = parse()
    if options.speed:
        device = comfy.model_management.get_torch_device()
        print(f"{full_size.machine(device)}; {options.size}x{options.size} pixels, a full-depth SD1.5 UNet", flush=True)
        results = speed(options)
        show_table("To plain.", results)
    else:
        bench = Bench(options.weights, options.runs)
        rows = options.rows or [name for name, (_, stage) in ROWS.items() if stage is None or bench.has(stage)]
        if missing := [stage for row in rows if (stage := ROWS[row][1]) is not None and not bench.has(stage)]:
            print(
                f"bench branch: there is no branch '{missing[0]}' in {options.runs}: run 'python dev.py train {missing[0]}', or "
                "leave its row out.",
                file=sys.stderr,
            )
            return 1
        print(
            f"{platform.machine()}, torch {torch.__version__}; demo model, {options.steps} steps of euler, CFG {options.cfg:g}",
            flush=True,
        )
        results = quality(options, bench, rows)
        show_table("Shares are in percent.", [cells(row) for row in results])
    if options.json:
        options.json.write_text(json.dumps({"rows": results}, indent=1))
    return 0
