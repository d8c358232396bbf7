"""How small may a thing be, and what do two stages cost? DreamMix's figure 5 in small, with intervals, and its time and memory.

A square hole of a few pixels in a scene of the demo world (256 x 256, the demo model's own size) is filled by DreamMix at several
shares of local steps: 0 is the whole picture alone, 1 the crop around the hole alone (paper: lambda). The prompt asks for a shape
in a color that the scene does not have; a classifier says whether the hole shows both. "drawn" is such a thing as the world draws
it at that size: what the classifier can make of so few pixels. "drawn, through the VAE" is what is left of it after the demo
model's VAE, which everything goes through that the second stage sees. Intervals are 95 %: Wilson's for shares, the normal
approximation for the paired difference to share 0. Every picture has the same noise for all rows.

Time and memory are ratios to share 0, the plain run of as many steps on the whole picture, in the same process.

    python dev.py bench dreammix [--scenes 60] [--sides 16 32 48] [--shares 0 0.7 0.9 1] [--outcomes FILE] [--grid FILE.png]
    python dev.py bench dreammix --speed
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.samplers import CFGGuider, KSampler, sampler_object

from ..imaging.region_plan import RegionSettings
from ..model_patches.core.prompt_tokens import encode_prompt
from ..model_patches.dreammix.two_stage_sampler import Run, TwoStages, sample_in_two_stages
from ..training.demo.samples import grid
from ..training.world.attributes import SIZE, SceneObject
from ..training.world.scenes import render_objects
from ..training.world.triplets import Triplet, make_triplet
from ..weights.demo_model import FOLDER, load_demo_model
from .accuracy import MODELS, as_image
from .judge import Judge
from .memory import PeakMemory
from .metrics import background_error, mean_interval, seam_visibility, wilson_interval
from .outcomes import keep_outcome, kept_outcomes, weights_digest
from .tables import show_table, with_interval

SHARES = (0.0, 0.7, 0.9, 1.0)
SIDES = (16, 32, 48)
DRAWN, COARSE = "drawn", "drawn, through the VAE"
CONTEXT = 0.5
"""The released code's: a crop of at least 128 pixels, shown twice as large."""
SPEED_SIZE = (512, 768)
GRID_SCENES = 6


@dataclass(frozen=True)
class Outcome:
    """What came of one scene."""

    index: int
    right: bool
    empty: bool
    seam: float
    background_error: float


class Bench:
    """The demo model, and what judges it."""

    def __init__(self, model: str, steps: int, cfg: float, folder: Path) -> None:
        self._model, self._clip, self._vae = load_demo_model(MODELS[model], folder)
        self._judge = Judge(folder)
        self._steps, self._cfg = steps, cfg

    @torch.inference_mode()
    def fill(
        self, pixels: torch.Tensor, hole: torch.Tensor, prompt: str, seed: int, settings: TwoStages
    ) -> torch.Tensor:
        """The finished picture [1, H, W, 3], by the node's sampler and scheduler."""
        guider = CFGGuider(self._model)
        guider.set_conds(encode_prompt(self._clip, prompt), encode_prompt(self._clip, ""))
        guider.set_cfg(self._cfg)
        name, scheduler = "dpmpp_2m_sde", "karras"
        schedule = KSampler(self._model, self._steps, self._model.load_device, name, scheduler, 1.0)
        run = Run(guider=guider, vae=self._vae, sampler=sampler_object(name), sigmas=schedule.sigmas, seed=seed)
        return sample_in_two_stages(pixels, hole, run, settings, lambda text: None)[0]

    @torch.inference_mode()
    def through_vae(self, pixels: torch.Tensor) -> torch.Tensor:
        """A picture [1, H, W, 3] encoded and decoded."""
        return self._vae.decode(self._vae.encode(pixels)).cpu()

    def judged(self, index: int, triplet: Triplet, picture: torch.Tensor, hole: torch.Tensor) -> Outcome:
        """What a picture [1, H, W, 3] shows in the hole [1, H, W]."""
        pixels, scene = picture.movedim(-1, 1).float(), as_image(triplet.scene.picture).movedim(-1, 1)
        seen = self._judge.in_hole(pixels[0], hole[0])
        ramp = torch.nn.functional.max_pool2d(hole[None], 2 * FEATHER + 1, 1, FEATHER)
        return Outcome(
            index,
            (seen.shape, seen.colour) == (triplet.shape, triplet.colour),
            seen.shape is None,
            float(seam_visibility(pixels, scene, hole[None])),
            background_error(pixels, scene, ramp),
        )


FEATHER = 4
"""An eighth of the node's: the pictures are that much smaller than what it was made for."""


def two_stages(share: float) -> TwoStages:
    """The node's defaults for pictures of this size."""
    return TwoStages(local_share=share, region=RegionSettings.local(SIZE, CONTEXT, 8), feather=FEATHER)


def small_hole(triplet: Triplet, side: int) -> tuple[torch.Tensor, tuple[float, float]]:
    """A square in the middle of a triplet's hole, [1, 256, 256], and its middle (x, y)."""
    rows, columns = np.flatnonzero(triplet.hole.any(axis=1)), np.flatnonzero(triplet.hole.any(axis=0))
    top, left = (int(of[0] + of[-1] + 1 - side) // 2 for of in (rows, columns))
    hole = torch.zeros(1, SIZE, SIZE)
    hole[:, top : top + side, left : left + side] = 1.0
    return hole, (left + side / 2, top + side / 2)


def drawn(triplet: Triplet, side: int) -> torch.Tensor:
    """The scene with what the prompt asks for, as the world draws it in a hole of this side."""
    hole, (x, y) = small_hole(triplet, side)
    item = SceneObject(triplet.shape, triplet.colour, triplet.pattern, x, y, 0.48 * side, 0.0, 0.0, 0.0)
    picture = triplet.scene.picture.astype(np.float32)
    render_objects(picture, (item,))
    made = as_image(picture.clip(0, 255).round().astype(np.uint8))
    return torch.where(hole[..., None] > 0, made, as_image(triplet.scene.picture))


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python dev.py bench dreammix", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenes", type=int, default=60, metavar="N", help="how many (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first scene (default: 0)")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="default: test")
    parser.add_argument("--model", choices=list(MODELS), default="9-channel", help="default: 9-channel")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), metavar="PIXELS", help="of the hole")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), metavar="SHARE", help="of local steps")
    parser.add_argument("--steps", type=int, default=30, help="default: 30")
    parser.add_argument("--cfg", type=float, default=4.0, help="default: 4")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="folder of the demo model's files")
    parser.add_argument("--outcomes", type=Path, help="file to keep the outcomes in, and to go on from")
    parser.add_argument("--speed", action="store_true", help="measure time and memory instead")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement of time (default: 3)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--grid", type=Path, help="write the pictures of the first 6 scenes here")
    options = parser.parse_args()
    if min(options.scenes, options.steps, options.repeats) < 1 or options.seed < 0:
        parser.error("--scenes, --steps and --repeats are 1 or more, --seed 0 or more.")
    if not all(4 <= side <= 128 for side in options.sides) or not all(0 <= share <= 1 for share in options.shares):
        parser.error("--sides are from 4 to 128 pixels, --shares from 0 to 1.")
    return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What an outcome depends on besides its side, share and index."""
    names = ("split", "model", "steps", "cfg")
    return {"weights": weights_digest(options.weights), **{name: getattr(options, name) for name in names}}


def summary(
    side: int, name: str, found: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """One row of the table; `first` are share 0's outcomes, of the same scenes."""
    right = sum(of["right"] for of in found)
    row: dict[str, Any] = {"side": side, "local_share": name, "n": len(found), "right": right / len(found)}
    row["right_ci95"] = wilson_interval(right, len(found))
    row["empty"] = sum(of["empty"] for of in found) / len(found)
    row["seam"], *row["seam_ci95"] = mean_interval([of["seam"] for of in found])
    row["background_max_error"] = max(of["background_error"] for of in found)
    if first is not None:
        pairs = zip(found, first, strict=True)
        row["rise"], *row["rise_ci95"] = mean_interval(
            [float(ours["right"] - theirs["right"]) for ours, theirs in pairs]
        )
    return row


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One row of the table as text; shares in percent."""

    return {
        "side": str(row["side"]),
        "local share": row["local_share"],
        "n": str(row["n"]),
        "right": with_interval(row, "right"),
        "to share 0": with_interval(row, "rise"),
        "nothing": f"{100 * row['empty']:.1f}",
        "seam": with_interval(row, "seam", 1.0),
        "background": f"{row['background_max_error']:g}",
    }


def quality(options: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """The rows of the table of small things."""
    mine = settings(options)
    done = kept_outcomes(options.outcomes, ("side", "share"), lambda line: mine)
    results, lines, captions = [], [], []
    total, made, started = len(options.sides) * len(options.shares) * options.scenes, 0, time.monotonic()
    for side in options.sides:
        found: dict[float | str, list[dict[str, Any]]] = {name: [] for name in (DRAWN, COARSE, *options.shares)}
        for place, index in enumerate(range(options.seed, options.seed + options.scenes)):
            triplet = make_triplet(options.split, index)
            hole, _ = small_hole(triplet, side)
            best = drawn(triplet, side)
            found[DRAWN].append(asdict(bench.judged(index, triplet, best, hole)))
            coarse = bench.through_vae(best)
            found[COARSE].append(asdict(bench.judged(index, triplet, coarse, hole)))
            pictures = []
            for share in options.shares:
                outcome = done.get((side, share, index))
                if outcome is None or (options.grid and place < GRID_SCENES):
                    picture = bench.fill(
                        as_image(triplet.scene.picture), hole, triplet.prompt, index, two_stages(share)
                    )
                    pictures.append(_around(picture, hole))
                    fresh = asdict(bench.judged(index, triplet, picture, hole))
                    if outcome is None:
                        keep_outcome(options.outcomes, mine, fresh, side=side, share=share)
                    outcome = fresh
                found[share].append(outcome)
                made += 1
            if options.grid and place < GRID_SCENES:
                lines.append([*pictures, _around(best, hole), _around(coarse, hole)])
                captions.append(
                    [f"{triplet.prompt}, {side} px", *(f"{of:g}" for of in options.shares[1:]), DRAWN, COARSE]
                )
            if place % 10 == 9:
                left = (time.monotonic() - started) / made * (total - made)
                print(
                    f"  {side} px: {place + 1}/{options.scenes}, {left / 60:.0f} min left", file=sys.stderr, flush=True
                )
        first = found.get(0.0)
        for name, outcomes in found.items():
            of_share = name if isinstance(name, str) else f"{name:g}"
            results.append(summary(side, of_share, outcomes, None if name in (DRAWN, COARSE, 0.0) else first))
    if options.grid:
        grid(lines, captions).save(options.grid, optimize=True)
    return results


def _around(picture: torch.Tensor, hole: torch.Tensor) -> np.ndarray:
    """A square of 96 pixels around a hole, enlarged to 256: uint8."""
    rows, columns = hole[0].any(dim=1).nonzero(), hole[0].any(dim=0).nonzero()
    top, left = (min(max(int(of[0] + of[-1]) // 2 - 48, 0), SIZE - 96) for of in (rows, columns))
    part = picture[:, top : top + 96, left : left + 96].movedim(-1, 1).float()
    large = torch.nn.functional.interpolate(part, size=(256, 256), mode="bicubic").clamp(0.0, 1.0)
    return (255.0 * large[0].movedim(0, -1)).round().byte().numpy()


def speed(options: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """Time and memory of each share on a picture of 768 x 512, as ratios to share 0."""
    height, width = SPEED_SIZE
    pixels = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(1))
    hole = torch.zeros(1, height, width)
    hole[:, 200:264, 300:364] = 1.0
    region = RegionSettings.local(SIZE, CONTEXT, 8)

    def run(share: float) -> None:
        bench.fill(pixels, hole, "a red star", 0, TwoStages(local_share=share, region=region))

    shares = sorted({0.0, *options.shares})
    run(shares[-1])
    seconds: dict[float, list[float]] = {share: [] for share in shares}
    # By turns, so that what else the machine does falls on all of them.
    for _ in range(options.repeats):
        for share in shares:
            started = time.perf_counter()
            run(share)
            seconds[share].append(time.perf_counter() - started)
    memory = {}
    for share in shares:
        with PeakMemory(torch.device("cpu")) as peak:
            run(share)
        memory[share] = peak.bytes
    return [
        {
            "local_share": share,
            "time": statistics.median(seconds[share]) / statistics.median(seconds[0.0]),
            "memory": memory[share] / memory[0.0],
        }
        for share in shares
    ]


def main() -> int:
    """Run the benchmark."""
    options = parse()
    bench = Bench(options.model, options.steps, options.cfg, options.weights)
    print(
        f"{platform.machine()}, torch {torch.__version__}; {options.model} demo model, {options.steps} steps of dpmpp_2m_sde, "
        f"karras, CFG {options.cfg:g}",
        flush=True,
    )
    if options.speed:
        results = speed(options, bench)
        title = f"{SPEED_SIZE[1]} x {SPEED_SIZE[0]} pixels; ratios to share 0."
        show_table(
            title,
            [
                {
                    "local share": f"{row['local_share']:g}",
                    "time": f"{row['time']:.2f}x",
                    "memory": f"{row['memory']:.2f}x",
                }
                for row in results
            ],
        )
    else:
        results = quality(options, bench)
        show_table("Shares are in percent.", [cells(row) for row in results])
    if options.json:
        options.json.write_text(json.dumps({"settings": settings(options), "rows": results}, indent=1))
    return 0
