"""Does the hole show *this* subject, and what the prompt says? LAR-Gen's figures in small, on subjects that no training saw.

A hole in a scene of the demo world's split "test", in which the subject is not, is filled by the host's nodes: by the plain
inpainting demo model, and by the one that has learned to read subjects, with text alone, with Assign, with Refine (the model
itself, or the trained reference network), and with both. The prompt says the subject's shape ("own"), or another one, so that
text and subject pull apart ("other"), or nothing ("none").

- likeness: how alike the hole and the subject's picture look to a network that no model was trained with, -1 to 1: the cosine of
  its embeddings. "the truth" is the subject in the scene, "another subject" one of the same shape in its place.
- found: how often the subject is the nearest of 20 of its shape, in percent.
- text: how often the classifier finds the prompt's shape in the hole, in percent.
- background: the greatest change outside of the hole.

Intervals are 95 %: Wilson's for shares, the normal approximation for likeness and for the paired difference to the first row.

    python dev.py bench likeness [--subjects 200] [--prompt own] [--rows NAME ...] [--outcomes FILE] [--grid FILE.png]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..model_patches.core.prompt_tokens import encode_prompt
from ..model_patches.core.sampling_run import with_method
from ..model_patches.core.unet_attention import transformer_places
from ..model_patches.lar_gen.branch import Branch
from ..model_patches.lar_gen.decoupled_attention import Assign
from ..model_patches.lar_gen.reference import Refine
from ..model_patches.lar_gen.resampler import Resampler
from ..model_patches.lar_gen.subject import Subject, clip_states, squares
from ..training.demo.latents import as_pixels
from ..training.demo.samples import grid
from ..training.lar_gen.likeness import Likeness
from ..training.lar_gen.vision import subject_of
from ..training.world.attributes import SHAPES, SIZE
from ..training.world.crops import cut
from ..training.world.subjects import Quadruple, look_of, make_quadruple, with_subject
from ..weights.demo_model import FILES, FOLDER, load_demo_model, read_file
from ..weights.demo_subject import FILE, LIKENESS_FILE, REFERENCE_FILE, DemoSubject, load_demo_subject
from . import accuracy
from .judge import Judge
from .metrics import background_error, mean_interval, square_around, wilson_interval
from .outcomes import keep_outcome, kept_outcomes
from .tables import show_table, with_interval

SPLIT = "test"
OF = 20
"""How many subjects of one shape are told apart."""
_POOL = 100_000
"""Subjects to compare with have numbers from here on."""
OWN, OTHER, NONE = "own", "other", "none"
TRUTH, ANOTHER = "the truth", "another subject"
GRID_SUBJECTS = 6


@dataclass(frozen=True)
class Row:
    """What reads the subject: Assign at `beta`, and the decoder's self-attentions by `refine`, "untrained" or "trained".

    `plain` is the inpainting demo model, which has not learned to read any.
    """

    beta: float = 0.0
    refine: str | None = None
    plain: bool = False

    @property
    def name(self) -> str:
        if self.plain:
            return "plain demo model"
        parts = [f"Assign {self.beta:g}"] * (self.beta > 0) + [f"Refine {self.refine}"] * (self.refine is not None)
        return " + ".join(parts) or "text alone"


BETAS = (0.1, 0.3, 0.45, 0.7, 1.0)
KINDS = ("untrained", "trained")
ROWS = {
    row.name: row
    for row in (
        Row(),
        Row(plain=True),
        *(Row(beta) for beta in BETAS),
        *(Row(refine=kind) for kind in KINDS),
        *(Row(beta, kind) for beta in BETAS for kind in KINDS),
    )
}
DEFAULT = [
    Row().name,
    Row(plain=True).name,
    *(Row(beta).name for beta in BETAS),
    *(Row(refine=kind).name for kind in KINDS),
    *(Row(0.3, kind).name for kind in KINDS),
]


class LikenessJudge:
    """The benchmark's own network, and the subjects that it tells apart."""

    def __init__(self, folder: Path) -> None:
        self._network = Likeness().eval().requires_grad_(False)
        self._network.load_state_dict(
            {name: tensor.float() for name, tensor in read_file(LIKENESS_FILE, folder).items()}
        )
        self._others: dict[str, torch.Tensor] = {}

    def embedding(self, picture: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        """What is at a mask of a picture (uint8 [H, W, 3], bool [H, W]): [64]."""
        left, top, side = square_around(torch.from_numpy(mask).float())
        crop = cut(picture, (left, top, left + side, top + side))
        return self._network(as_pixels(np.stack([crop])))[0]

    def others(self, shape: str) -> torch.Tensor:
        """19 other subjects of a shape, [19, 64]."""
        if shape not in self._others:
            numbers = [n for n in range(_POOL, _POOL + 40 * OF) if look_of(SPLIT, n).shape == shape][: OF - 1]
            others = [make_quadruple(SPLIT, number, number) for number in numbers]
            self._others[shape] = torch.stack([self.embedding(of.reference, of.reference_mask) for of in others])
        return self._others[shape]


@dataclass(frozen=True)
class Outcome:
    """What came of one quadruple."""

    index: int
    likeness: float
    found: bool
    text: bool
    empty: bool
    background_error: float = 0.0


class Bench:
    """The models, and what judges them."""

    def __init__(self, folder: Path) -> None:
        self._demo: DemoSubject = load_demo_subject(folder)
        self._resampler = Resampler.from_tensors(self._demo.weights.resampler)
        places = [t.place for t in transformer_places(self._demo.model.model.diffusion_model)]
        self._projections = self._demo.weights.by_place(places)
        self._plain, *_ = load_demo_model("inpainting", folder)
        self._likeness, self._judge = LikenessJudge(folder), Judge(folder)

    @property
    def has_branch(self) -> bool:
        return self._demo.branch is not None

    def another(self, quadruple: Quadruple) -> np.ndarray:
        """The truth with another subject of the same shape, seen the same way."""
        shape = look_of(SPLIT, quadruple.number).shape
        number = next(n for n in range(_POOL + 40 * OF, 2 * _POOL) if look_of(SPLIT, n).shape == shape)
        return with_subject(quadruple, look_of(SPLIT, number))

    def _patched(self, row: Row, subject: Subject) -> Any:
        model: Any = self._plain if row.plain else self._demo.model
        if row.beta:
            own, nothing = subject.tokens(self._resampler)
            assign = Assign(strength=row.beta, subject=own, nothing=nothing, projections=self._projections)
            model = with_method(model, assign)
        if row.refine:
            branch = None
            if row.refine == "trained":
                assert self._demo.branch is not None
                branch = Branch(model=self._demo.branch, **self._demo.weights.detail)
            details = None if branch is None else subject.branch_details(branch.weight.shape[1])
            refine = Refine(latents=subject.branch_latents(), is_one=True, branch=branch, details=details)
            model = with_method(model, refine)
        return model

    @torch.inference_mode()
    def fill(self, row: Row, quadruple: Quadruple, prompt: str, seed: int, steps: int, cfg: float) -> np.ndarray:
        """The finished picture, uint8 [256, 256, 3]."""
        vae, clip = self._demo.vae, self._demo.clip
        views = [subject_of(quadruple.reference, quadruple.reference_mask)]
        subject = Subject(
            states=clip_states(self._demo.vision, views), latents=vae.encode(squares(views, SIZE)), is_one=True
        )
        # Not the truth: what is known of it around the hole would tell of the subject.
        pixels, hole = accuracy.as_image(quadruple.scene), torch.from_numpy(quadruple.hole).float()[None]
        conditions = accuracy.host_nodes.InpaintModelConditioning().encode(
            encode_prompt(clip, prompt), encode_prompt(clip, ""), pixels, vae, hole, noise_mask=True
        )
        (latent,) = accuracy.host_nodes.common_ksampler(
            self._patched(row, subject), seed, steps, cfg, "euler", "normal", *conditions, denoise=1.0
        )
        made = vae.decode(latent["samples"]).float().cpu()
        finished = accuracy.composited(pixels, made, hole)
        return (255.0 * finished[0].clamp(0.0, 1.0)).round().byte().numpy()

    def judged(self, index: int, quadruple: Quadruple, picture: np.ndarray, shape: str, scene: np.ndarray) -> Outcome:
        """What a picture shows in the hole; `shape` is what the prompt asks for, `scene` what may not change around it."""
        own = self._likeness.embedding(quadruple.reference, quadruple.reference_mask)
        seen = self._likeness.embedding(picture, quadruple.hole)
        others = self._likeness.others(look_of(SPLIT, quadruple.number).shape)
        pixels, hole = as_pixels(picture[None]), torch.from_numpy(quadruple.hole).float()
        named = self._judge.in_hole(pixels[0], hole)
        likeness = float(seen @ own)
        return Outcome(
            index,
            likeness,
            bool(likeness > (others @ seen).max()),
            named.shape == shape,
            named.shape is None,
            background_error(pixels, as_pixels(scene[None]), hole[None, None]),
        )


def other_shape(shape: str) -> str:
    """The shape that the prompt says where it is not the subject's."""
    return SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]


def prompt_of(quadruple: Quadruple, kind: str) -> tuple[str, str]:
    """The prompt, and the shape to be found."""
    own = look_of(SPLIT, quadruple.number).shape
    shape = other_shape(own) if kind == OTHER else own
    return ("" if kind == NONE else f"a {shape}"), shape


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python dev.py bench likeness", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--subjects", type=int, default=200, metavar="N", help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first subject (default: 0)")
    parser.add_argument("--prompt", choices=(OWN, OTHER, NONE), default=OWN, help="default: own")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--cfg", type=float, default=3.0, help="default: 3")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="folder of the demo model's files")
    parser.add_argument("--outcomes", type=Path, help="file to keep the outcomes in, and to go on from")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--grid", type=Path, help="write the pictures of the first 6 subjects here")
    options = parser.parse_args()
    if min(options.subjects, options.steps) < 1 or options.seed < 0:
        parser.error("--subjects and --steps are 1 or more, --seed 0 or more.")
    return options


def settings(options: argparse.Namespace, row: Row | None = None) -> dict[str, Any]:
    """What an outcome depends on besides its index, or the whole run."""
    return {
        "weights": subject_digest(options.weights, row is None or row.refine == "trained"),
        "prompt": options.prompt,
        "steps": options.steps,
        "cfg": options.cfg,
    }


@cache
def subject_digest(folder: Path, with_reference: bool) -> str:
    """Which weights these are; the reference network's count where it is there and takes part."""
    names = sorted((FILE, LIKENESS_FILE, REFERENCE_FILE, *FILES.values()))
    found = [
        folder / name for name in names if name != REFERENCE_FILE or (with_reference and (folder / name).is_file())
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()[:12]


def summary(name: str, found: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table; `first` are the outcomes of the first row, of the same subjects."""
    count = len(found)
    shares = {key: sum(of[key] for of in found) for key in ("found", "text", "empty")}
    mean, low, high = mean_interval([of["likeness"] for of in found])
    row: dict[str, Any] = {"row": name, "n": count, "likeness": mean, "likeness_ci95": (low, high)}
    for key, number in shares.items():
        row |= {key: number / count, f"{key}_ci95": wilson_interval(number, count)}
    row["background_max_error"] = max(of["background_error"] for of in found)
    pairs = list(zip(found, first, strict=True))
    rise, low, high = mean_interval([ours["likeness"] - theirs["likeness"] for ours, theirs in pairs])
    return row | {"rise": rise, "rise_ci95": (low, high)}


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One row of the table as text."""

    return {
        "row": row["row"],
        "n": str(row["n"]),
        "likeness": with_interval(row, "likeness", 1.0, 2),
        "to the first row": with_interval(row, "rise", 1.0, 2),
        "found": with_interval(row, "found"),
        "text": with_interval(row, "text"),
        "nothing": f"{100 * row['empty']:.1f}",
        "background": f"{row['background_max_error']:g}",
    }


def main() -> int:
    """Run the benchmark."""
    options = parse()
    bench = Bench(options.weights)
    if options.rows is None:
        options.rows = [name for name in DEFAULT if bench.has_branch or ROWS[name].refine != "trained"]
    rows = [ROWS[name] for name in options.rows]
    if any(row.refine == "trained" for row in rows) and not bench.has_branch:
        print(
            f"bench likeness: {options.weights} has no trained reference network yet: leave its rows out.",
            file=sys.stderr,
        )
        return 1
    print(
        f"{platform.machine()}, torch {torch.__version__}; {options.steps} steps of euler, CFG {options.cfg:g}",
        flush=True,
    )

    def settings_of(line: dict[str, Any]) -> dict[str, Any] | None:
        return settings(options, ROWS[line["row"]]) if line["row"] in ROWS else None

    done = kept_outcomes(options.outcomes, ("row",), settings_of)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (TRUTH, ANOTHER, *options.rows)}
    lines, captions = [], []
    started = time.monotonic()
    numbers = range(options.seed, options.seed + options.subjects)
    for place, index in enumerate(numbers):
        quadruple = make_quadruple(SPLIT, index, index)
        prompt, shape = prompt_of(quadruple, options.prompt)
        found[TRUTH].append(asdict(bench.judged(index, quadruple, quadruple.picture, shape, quadruple.picture)))
        another = bench.another(quadruple)
        found[ANOTHER].append(asdict(bench.judged(index, quadruple, another, shape, another)))
        pictures = [quadruple.reference, np.where(quadruple.hole[..., None], np.uint8(128), quadruple.scene)]
        for row in rows:
            outcome = done.get((row.name, index))
            if outcome is None or (options.grid and place < GRID_SUBJECTS):
                picture = bench.fill(row, quadruple, prompt, index, options.steps, options.cfg)
                pictures.append(picture)
                fresh = asdict(bench.judged(index, quadruple, picture, shape, quadruple.scene))
                if outcome is None:
                    keep_outcome(options.outcomes, settings(options, row), fresh, row=row.name)
                outcome = fresh
            found[row.name].append(outcome)
        if options.grid and place < GRID_SUBJECTS:
            lines.append([*pictures, quadruple.picture])
            captions.append(["the subject", prompt or "(no prompt)", *options.rows, TRUTH])
        if place % 5 == 4:
            left = (time.monotonic() - started) / (place + 1) * (len(numbers) - place - 1)
            print(f"  {place + 1}/{len(numbers)} subjects, {left / 60:.0f} min left", file=sys.stderr, flush=True)
    if options.grid:
        grid(lines, captions).save(options.grid, optimize=True)
    first = found[options.rows[0]]
    results = [summary(name, mine, first) for name, mine in found.items()]
    show_table(f"Prompt: {options.prompt}. Shares are in percent.", [cells(row) for row in results])
    if options.json:
        options.json.write_text(json.dumps({"settings": settings(options), "rows": results}, indent=1))
    return 0
