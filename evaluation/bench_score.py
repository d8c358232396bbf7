"""Does cross-attention know, on the demo model, whether a hole shows what the prompt asks for? By place and by reading.

RASG can only help where its score is higher with the thing in the hole than without it. For triplets of the development split
the thing, and another thing of another color, are painted into the hole; these pictures and the empty scene are noised alike
to several levels, and the cross-attention of the first evaluation is read: block by block and as the mean over the blocks of a
level, each in several ways (`READINGS`), for the prompt's words alone and with the end of the text. A
cell is the share of triplets, in percent, in which the asked-for thing has the higher score than nothing / than the other thing.
50 is chance; with 200 triplets the 95 % interval (Wilson) is 43 to 57 around 50 and 98 to 100 around 100, and the JSON has each.

    python dev.py bench score [--triplets 200] [--seed 0] [--models 9-channel 4-channel] [--readings released ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import comfy.utils
import numpy as np
import torch

from ..model_patches.core.call_rows import PromptRows
from ..model_patches.core.protocol import Method, MethodRun
from ..model_patches.core.sampling_run import SamplingRun, with_method
from ..model_patches.core.unet_attention import TransformerPlace
from ..model_patches.hd_painter.rasg import attention_score
from ..model_patches.starts.reading import AttentionReader, cells_of, inside_less_outside, probabilities
from ..training.world.attributes import COLOURS, SHAPES, SceneObject
from ..training.world.scenes import render_objects
from ..training.world.triplets import Triplet, make_triplet
from . import accuracy
from .metrics import wilson_interval
from .tables import show_table

STEPS = 20
PROGRESS = 20
LEVELS = (5, 10, 15)
"""Steps of 20 before whose evaluation attention is read."""

FACTORS = {"1/16": 2, "1/32": 4}
BOTH = "mean 1/16 + 1/32"

Key = tuple[str, str, str]
"""Reading, tokens, place."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A way to read attention.

    of_block: raw scores [rows, heads, pixels, text] -> a map of each token [rows, pixels, text].
    score: the mean of such maps, the tokens [rows, text] (bool) and the hole [rows, pixels] (bool) -> [rows]; higher is better.
    """

    of_block: Callable[[torch.Tensor], torch.Tensor]
    score: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = inside_less_outside


def _agreement(maps: torch.Tensor, tokens: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    rows = zip(maps.split(1), tokens, hole.split(1), strict=True)
    return torch.stack([attention_score(of_row[..., own], cells) for of_row, own, cells in rows])


READINGS = {
    "released": Reading(of_block=lambda raw: raw.mean(dim=1), score=_agreement),
    "raw": Reading(of_block=lambda raw: raw.mean(dim=1)),
    "probability": Reading(of_block=probabilities),
    "log-probability": Reading(of_block=lambda raw: raw.log_softmax(dim=-1).mean(dim=1)),
    "contrast": Reading(of_block=lambda raw: (raw - raw[..., :1]).mean(dim=1)),
}
"""released: RASG's S. The others are means inside of the hole less means outside: of raw scores, of probabilities (softmax over
the text; Best Start's), of their logarithms, and of raw scores less those of the start token."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores(Method):
    """All readings of one evaluation, in `found`."""

    name: ClassVar = "Scores"
    order: ClassVar = 0

    found: dict[Key, float]

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        sums: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)

        def note(place: TransformerPlace, grid: tuple[int, int], rows: PromptRows, raw: torch.Tensor) -> None:
            cells = cells_of(hole, rows, grid)
            sets = {"words": rows.tokens.words, "words + end": rows.tokens.words_and_ends}
            where = " ".join(str(part) for part in place.place[:2])
            level = f"mean 1/{8 * place.factor}"
            for name, reading in READINGS.items():
                one = reading.of_block(raw)
                maps = sums[name, place.factor]
                maps.append(one)
                for tokens_name, tokens in sets.items():
                    self.found[name, tokens_name, where] = float(reading.score(one, tokens, cells)[0])
                    # The last block of a level leaves the mean of all.
                    mean = torch.stack(maps).mean(dim=0)
                    self.found[name, tokens_name, level] = float(reading.score(mean, tokens, cells)[0])

        return AttentionReader(FACTORS.values(), note)


def with_thing(triplet: Triplet, shape: str, color: str) -> Triplet:
    """The triplet with a thing painted into its hole."""
    rows, columns = np.nonzero(triplet.hole)
    radius = 0.42 * min(np.ptp(rows), np.ptp(columns))
    place = float(columns.mean()), float(rows.mean())
    item = SceneObject(shape, color, triplet.pattern, *place, float(radius), 0.0, 0.0, 0.0)
    canvas = triplet.scene.picture.astype(np.float32)
    render_objects(canvas, (item,))
    picture = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return replace(triplet, scene=replace(triplet.scene, picture=picture))


def another_thing(triplet: Triplet) -> Triplet:
    """The triplet with a thing in its hole that differs from the asked-for one in shape and color."""
    shape, color = (names[(names.index(own) + 3) % len(names)] for names, own in (
        (SHAPES, triplet.shape), (tuple(COLOURS), triplet.colour)
    ))  # fmt: skip
    return with_thing(triplet, shape, color)


def scores(models: accuracy.Models, task: accuracy.Task, seed: int, step: int) -> dict[Key, float]:
    """All readings of a task's own picture, noised to the level before a step."""
    found: dict[Key, float] = {}
    model = with_method(models[task.model][0], Scores(found=found))
    with torch.inference_mode():
        # Without guidance the negative prompt is not evaluated.
        accuracy.host_nodes.common_ksampler(
            model, seed, STEPS, 1.0, "euler", "normal", *task.conditions, start_step=step, last_step=step + 1
        )
    for reading in READINGS:
        for tokens in ("words", "words + end"):
            means = [found[reading, tokens, f"mean {level}"] for level in FACTORS]
            found[reading, tokens, BOTH] = sum(means)
    return found


def higher(models: accuracy.Models, model: str, index: int) -> dict[tuple[Key, int], tuple[bool, bool]]:
    """By key and step, whether the asked-for thing has the higher score than nothing, and than another thing."""
    triplet = make_triplet("dev", index)
    pictures = (with_thing(triplet, triplet.shape, triplet.colour), triplet, another_thing(triplet))
    prepared = [accuracy.prepare(models, model, picture) for picture in pictures]
    found = {}
    for step in LEVELS:
        asked, nothing, other = (scores(models, task, index, step) for task in prepared)
        for key, value in asked.items():
            found[key, step] = value > nothing[key], value > other[key]
    return found


def rows(model: str, found: list[dict[tuple[Key, int], tuple[bool, bool]]]) -> list[dict[str, Any]]:
    """The rows of one model: counts of triplets."""
    made = []
    for reading, tokens, place in {key: None for key, _ in found[0]}:
        for step in LEVELS:
            pairs = [one[(reading, tokens, place), step] for one in found]
            counts = [sum(pair[number] for pair in pairs) for number in (0, 1)]
            common = {
                "model": model,
                "reading": reading,
                "tokens": tokens,
                "place": place,
                "step": step,
                "n": len(pairs),
            }
            than = {
                name: {"count": count, "interval": wilson_interval(count, len(pairs))}
                for name, count in zip(("nothing", "another thing"), counts, strict=True)
            }
            made.append({**common, **than})
    return made


def table(made: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as they are shown: the steps side by side, places in the order of a forward pass, means last."""
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in sorted(made, key=_order):
        names = {name: row[name] for name in ("model", "reading", "tokens", "place")}
        line = lines.setdefault(tuple(names.values()), names)
        shares = [100 * row[than]["count"] / row["n"] for than in ("nothing", "another thing")]
        line[f"step {row['step']}/{STEPS}"] = "{:.0f} / {:.0f}".format(*shares)
    return list(lines.values())


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    place = list(accuracy.MODELS).index(row["model"]), list(READINGS).index(row["reading"])
    return (*place, row["tokens"], row["place"].startswith("mean"))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python dev.py bench score", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--triplets", type=int, default=200, metavar="N", help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first triplet (default: 0)")
    parser.add_argument("--models", nargs="+", choices=tuple(accuracy.MODELS), default=list(accuracy.MODELS))
    parser.add_argument("--readings", nargs="+", choices=tuple(READINGS), default=list(READINGS), help="rows to show")
    parser.add_argument("--json", type=Path, help="write all rows here as well")
    options = parser.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    models = accuracy.Models()
    indices = range(options.seed, options.seed + options.triplets)
    made: list[dict[str, Any]] = []
    for model in options.models:
        found = []
        for index in indices:
            found.append(higher(models, model, index))
            if len(found) % PROGRESS == 0:
                print(f"  {model}: {len(found)}/{len(indices)} triplets", flush=True)
        made += rows(model, found)
    shown = [row for row in made if row["reading"] in options.readings]
    title = f"{platform.machine()}, torch {torch.__version__}; {len(indices)} triplets of the development split"
    show_table(f"{title}; higher than nothing / than another thing, %", table(shown))
    if options.json:
        options.json.write_text(json.dumps(made, indent=1))
