"""Does a tuned subject come out, and can words change it? DreamMix's table 3 in small, on subjects that no word names.

*Train Subject*'s tuning learns subjects of the demo world's split "test" on the text-to-image demo model, from pictures in scenes
and alone: with prompts that only say its own word and its class, and with its attributes named beside it (attribute decoupling).
Then holes in other scenes are filled. Insertion asks for the subject; editing for the subject in a color that it does not have.

- likeness: how alike the hole and the subject look to a network that no model was trained with, -1 to 1.
- found: how often the subject is the nearest of 20 of its shape, in percent.
- right: how often the classifier finds the shape, and when editing the color too, in percent.

Rows add up: one sampler on the whole picture; DreamMix's two stages; attribute substitution (when editing); attribute
decoupling. Intervals are 95 %: Wilson's for shares, the normal approximation for likeness and for its paired difference to the
first row, the plain model.

    python dev.py bench tuning [--subjects 6] [--scenes 10] [--steps 1500] [--outcomes FILE] [--grid FILE.png]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import comfy.sd
import numpy as np
import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, KSampler, sampler_object

from ..imaging.attribute_dictionary import AttributeDictionary, subject_prompts
from ..imaging.region_plan import RegionSettings
from ..model_patches.core.prompt_tokens import encode_prompt
from ..model_patches.dreammix.attribute_substitution import embed_attributes, without_attributes
from ..model_patches.dreammix.two_stage_sampler import Run, TwoStages, sample_in_two_stages
from ..training.demo.samples import grid
from ..training.subject_lora.adapters import as_file
from ..training.subject_lora.examples import encode_example
from ..training.subject_lora.tuning import Example, Tuner, Tuning
from ..training.world.attributes import COLOURS, SIZE
from ..training.world.captions import local_caption
from ..training.world.scenes import make_scene
from ..training.world.subjects import Look, Quadruple, look_of, make_quadruple
from ..weights.demo_model import FOLDER, load_demo_model
from .accuracy import as_image
from .bench_likeness import SPLIT, LikenessJudge
from .judge import Judge
from .metrics import mean_interval, wilson_interval
from .outcomes import keep_outcome, kept_outcomes, weights_digest
from .tables import show_table, with_interval

TOKEN = "sks"
PICTURES, REGULAR = 6, 8
_TRAINING, _SCENES = 50_000, 60_000
"""First numbers of the scenes to learn from, and of those to fill."""
INSERTION, EDITING = "insertion", "editing"
GRID_ROWS = 6


@dataclass(frozen=True)
class Row:
    """What of DreamMix takes part."""

    tuned: bool = True
    stages: bool = False
    substitution: bool = False
    decoupling: bool = False


ROWS = {
    "plain model": Row(tuned=False),
    "tuned": Row(),
    "+ two stages": Row(stages=True),
    "+ substitution": Row(stages=True, substitution=True),
    "+ decoupling": Row(stages=True, substitution=True, decoupling=True),
}
TASKS = {INSERTION: [name for name in ROWS if name != "+ substitution"], EDITING: list(ROWS)}


def own_colours(look: Look) -> list[str]:
    """The world's names that come nearest to a subject's two tones, each once."""
    values = np.asarray(list(COLOURS.values()), dtype=np.float32)
    names = [list(COLOURS)[int(np.linalg.norm(values - tone, axis=1).argmin())] for tone in look.tones[:2]]
    return list(dict.fromkeys(names))


def other_colour(look: Look) -> str:
    """The world's color that is farthest from all tones of a subject."""
    away = {
        name: min(float(np.linalg.norm(tone - np.asarray(value))) for tone in look.tones)
        for name, value in COLOURS.items()
    }
    return max(away, key=lambda name: away[name])


def dictionary(look: Look) -> AttributeDictionary:
    """What a captioner would say of a subject."""
    return AttributeDictionary(class_word=look.shape, attributes={"color": tuple(own_colours(look))})


class Bench:
    """The demo model, the subjects' LoRAs, and what judges them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._model, self._clip, self._vae = load_demo_model("text-to-image", options.weights)
        self._likeness, self._judge = LikenessJudge(options.weights), Judge(options.weights)
        self._options = options
        self._settings = Tuning(
            steps=options.steps,
            accumulate=1,
            learning_rate=options.learning_rate,
            rank=options.rank,
            outputs=True,
            seed=1,
            recompute=False,
        )

    def _examples(self, number: int, prompts: Sequence[str]) -> Iterator[Example]:
        own = [encode_prompt(self._clip, prompt) for prompt in prompts]
        for place in range(PICTURES):
            quadruple = make_quadruple(SPLIT, _TRAINING + 100 * number + place, number)
            for turn, (picture, mask) in enumerate(
                ((quadruple.picture, quadruple.hole), (quadruple.reference, quadruple.reference_mask))
            ):
                planes, inside = as_image(picture)[0], torch.from_numpy(mask).float()
                yield encode_example(planes, inside, own, self._vae, SIZE, 10, 2 * place + turn, inpainting=False)

    def _regular(self, shape: str) -> Iterator[Example]:
        index = found = 0
        while found < REGULAR:
            scene, index = make_scene("train", index), index + 1
            for item, mask in zip(scene.layout.objects, scene.masks, strict=True):
                if item.shape == shape and mask.any() and found < REGULAR:
                    prompt = encode_prompt(self._clip, local_caption(item.shape, item.colour, item.pattern))
                    inside = torch.from_numpy(mask).float()
                    yield encode_example(
                        as_image(scene.picture)[0], inside, [prompt], self._vae, SIZE, 3, 1000 + found, inpainting=False
                    )
                    found += 1

    def _file(self, number: int, decoupling: bool) -> Path:
        of, options = self._settings, self._options
        name = f"{number}-{of.steps}-{of.rank}-{of.learning_rate:g}-{'words' if decoupling else 'class'}"
        return options.loras / weights_digest(options.weights) / f"{name}.safetensors"

    @cache  # noqa: B019
    def tuned(self, number: int, decoupling: bool) -> ModelPatcher:
        """The model with a subject's LoRA, which is trained where it is not there yet."""
        path = self._file(number, decoupling)
        if not path.is_file():
            look, started = look_of(SPLIT, number), time.monotonic()
            prompts = subject_prompts(dictionary(look), TOKEN) if decoupling else [f"a {TOKEN} {look.shape}"]
            with torch.inference_mode():
                subject = list(self._examples(number, prompts))
                regular = list(self._regular(look.shape)) if decoupling else []
                tuner = Tuner(self._model, self._settings)
                tuner.run(subject, regular, lambda step, loss: None)
                tensors = as_file(tuner.adapters, tuner.unet_config)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            safetensors.torch.save_file(tensors, partial)
            partial.replace(path)
            print(f"  subject {number} tuned in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        model, _ = comfy.sd.load_lora_for_models(self._model, None, safetensors.torch.load_file(path), 1.0, 0.0)
        assert model is not None
        return model

    def attempt(self, task: str, row: Row, number: int, scene: int) -> tuple[dict[str, Any], np.ndarray, Quadruple]:
        """What came of a scene: the outcome, the picture uint8 [256, 256, 3], and the quadruple."""
        index = _SCENES + 100 * number + scene
        quadruple, look = make_quadruple(SPLIT, index, number), look_of(SPLIT, number)
        colour = other_colour(look)
        words = [*([TOKEN] if row.tuned else []), *([colour] if task == EDITING else []), look.shape]
        model = self.tuned(number, row.decoupling) if row.tuned else self._model
        with torch.inference_mode():
            positive = encode_prompt(self._clip, f"a {' '.join(words)}")
            if task == EDITING and row.substitution:
                positive = without_attributes(positive, embed_attributes(self._clip, own_colours(look)))
            pixels, hole = as_image(quadruple.scene), torch.from_numpy(quadruple.hole).float()[None]
            guider = CFGGuider(model)
            guider.set_conds(positive, encode_prompt(self._clip, ""))
            guider.set_cfg(self._options.cfg)
            name, scheduler = "dpmpp_2m", "karras"
            schedule = KSampler(model, self._options.sampling_steps, model.load_device, name, scheduler, 1.0)
            run = Run(guider=guider, vae=self._vae, sampler=sampler_object(name), sigmas=schedule.sigmas, seed=index)
            settings = TwoStages(local_share=0.7, region=RegionSettings.local(SIZE, 0.5, 8), feather=4)
            if not row.stages:
                settings = replace(settings, local_share=0.0)
            made, *_ = sample_in_two_stages(pixels, hole, run, settings, lambda text: None)
        picture = (255.0 * made[0].clamp(0.0, 1.0)).round().byte().numpy()
        return self._judged(index, quadruple, picture, colour if task == EDITING else None), picture, quadruple

    def _judged(self, index: int, quadruple: Quadruple, picture: np.ndarray, colour: str | None) -> dict[str, Any]:
        own = self._likeness.embedding(quadruple.reference, quadruple.reference_mask)
        made = self._likeness.embedding(picture, quadruple.hole)
        shape = look_of(SPLIT, quadruple.number).shape
        likeness = float(made @ own)
        seen = self._judge.in_hole(as_image(picture)[0].movedim(-1, 0), torch.from_numpy(quadruple.hole).float())
        return {
            "index": index,
            "likeness": likeness,
            "found": likeness > float((self._likeness.others(shape) @ made).max()),
            "right": seen.shape == shape and colour in (None, seen.colour),
        }


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python dev.py bench tuning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--subjects", type=int, default=6, metavar="N", help="how many (default: 6)")
    parser.add_argument("--scenes", type=int, default=10, metavar="N", help="for each subject (default: 10)")
    parser.add_argument("--steps", type=int, default=1500, help="of the tuning (default: 1500)")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: 0.001")
    parser.add_argument("--sampling-steps", type=int, default=20, help="default: 20")
    parser.add_argument("--cfg", type=float, default=4.0, help="default: 4")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="folder of the demo model's files")
    parser.add_argument("--loras", type=Path, default=Path(".cache/tuned"), help="folder of the subjects' LoRAs")
    parser.add_argument("--outcomes", type=Path, help="file to keep the outcomes in, and to go on from")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--grid", type=Path, help="write the pictures of the first scene of 6 subjects here")
    options = parser.parse_args()
    if min(options.subjects, options.scenes, options.steps, options.rank, options.sampling_steps) < 1:
        parser.error("--subjects, --scenes, --steps, --rank and --sampling-steps are 1 or more.")
    return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What an outcome depends on besides its task, row and index."""
    names = ("steps", "rank", "learning_rate", "sampling_steps", "cfg")
    return {"weights": weights_digest(options.weights), **{name: getattr(options, name) for name in names}}


def summary(task: str, name: str, found: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table; `first` are the plain model's outcomes, of the same scenes."""
    count = len(found)
    mean, low, high = mean_interval([of["likeness"] for of in found])
    row: dict[str, Any] = {"task": task, "row": name, "n": count, "likeness": mean, "likeness_ci95": (low, high)}
    for key in ("found", "right"):
        number = sum(of[key] for of in found)
        row |= {key: number / count, f"{key}_ci95": wilson_interval(number, count)}
    pairs = zip(found, first, strict=True)
    rise, low, high = mean_interval([ours["likeness"] - theirs["likeness"] for ours, theirs in pairs])
    return row | {"rise": rise, "rise_ci95": (low, high)}


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One row of the table as text; shares in percent."""

    return {
        "task": row["task"],
        "row": row["row"],
        "n": str(row["n"]),
        "likeness": with_interval(row, "likeness", 1.0, 2),
        "to plain": with_interval(row, "rise", 1.0, 2),
        "found": with_interval(row, "found"),
        "right": with_interval(row, "right"),
    }


def main() -> int:
    """Run the benchmark."""
    options = parse()
    bench, mine = Bench(options), settings(options)
    done = kept_outcomes(options.outcomes, ("task", "row"), lambda line: mine)
    print(
        f"{platform.machine()}, torch {torch.__version__}; text-to-image demo model, {options.steps} steps of rank "
        f"{options.rank}, then {options.sampling_steps} of dpmpp_2m, karras, CFG {options.cfg:g}",
        flush=True,
    )
    found: dict[tuple[str, str], list[dict[str, Any]]] = {(task, name): [] for task, of in TASKS.items() for name in of}
    lines, captions = [], []
    for number in range(options.subjects):
        for scene in range(options.scenes):
            index = _SCENES + 100 * number + scene
            pictures: list[np.ndarray] = []
            shown = options.grid is not None and scene == 0 and number < GRID_ROWS
            for task, name in found:
                outcome = done.get((task, name, index))
                if outcome is None or shown:
                    fresh, picture, quadruple = bench.attempt(task, ROWS[name], number, scene)
                    if not pictures:
                        pictures.append(quadruple.reference)
                    pictures.append(picture)
                    if outcome is None:
                        keep_outcome(options.outcomes, mine, fresh, task=task, row=name)
                    outcome = fresh
                found[task, name].append(outcome)
            if shown:
                lines.append(pictures)
                captions.append(["the subject", *(f"{task}: {name}" for task, name in found)])
        print(f"  {number + 1}/{options.subjects} subjects", file=sys.stderr, flush=True)
    if options.grid:
        grid(lines, captions).save(options.grid, optimize=True)
    results = [summary(task, name, outcomes, found[task, "plain model"]) for (task, name), outcomes in found.items()]
    show_table("Shares are in percent.", [cells(row) for row in results])
    if options.json:
        options.json.write_text(json.dumps({"settings": mine, "rows": results}, indent=1))
    return 0
