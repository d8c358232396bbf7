"""The benchmark of HD-Painter's section 4 on the demo world: does the hole show what the prompt asks for?

Each picture is made by the host's own nodes in the order of the shipped graphs: encode the prompt, InpaintModelConditioning,
KSampler, VAE decode, composite.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_extras.nodes_mask import composite

from ..imaging.fill import fill_pictures
from ..model_patches.core.diffusion import Sampling
from ..model_patches.core.joint_attention import LAYERS
from ..model_patches.core.prompt_tokens import encode_prompt
from ..model_patches.core.sampling_run import with_method
from ..model_patches.core.unet_attention import AUTO, GRIDS
from ..model_patches.hd_painter.painta import PAIntA
from ..model_patches.hd_painter.rasg import RASG
from ..model_patches.pilot.sampler import PILOT, pilot_sampler
from ..model_patches.pilot.semantic_boundary import SemanticBoundary
from ..model_patches.starts.best_start import BestStart
from ..model_patches.starts.noise_search import NoiseSearch
from ..training.world.attributes import COLOURS, PATTERNS, SHAPES, Purpose, generator
from ..training.world.backgrounds import BACKGROUNDS, PHRASES
from ..training.world.captions import local_caption
from ..training.world.triplets import Triplet
from ..weights.demo_dit import KIND, load_kind
from ..weights.demo_model import FOLDER
from .judge import Judge
from .metrics import background_change, background_error, seam_visibility

# The host's module of that name; a plain import would look like one of the pack's folder.
host_nodes = importlib.import_module("nodes")

MODELS = {"9-channel": "inpainting", "4-channel": "text-to-image"}
"""The benchmark's names for the demo model's UNets."""
TRANSFORMER = KIND
"""The same of the model without a UNet, which has no RASG."""


FILLED = "PILOT, hole blurred"
"""PILOT on a latent of the picture with its hole filled smoothly, as the node does by default; the others encode the scene."""

_PILOT = PILOT(interval=2, iterations=5)
PILOTS = {
    "PILOT": _PILOT,
    "PILOT L_bg": replace(_PILOT, coefficient=0.0, boundary=0.0),
    "PILOT L_bg + L_sc": replace(_PILOT, boundary=0.0),
    **{f"PILOT gamma {gamma:g}": replace(_PILOT, gamma=gamma) for gamma in (0.2, 0.4, 0.6, 0.8)},
    "PILOT iterations 2": replace(_PILOT, iterations=2),
    "PILOT interval 5": replace(_PILOT, interval=5),
    "PILOT larger steps": replace(_PILOT, iterations=2, learning_rate=0.0625, first_learning_rate=0.0175),
    "PILOT gamma 0.8, interval 5": replace(_PILOT, gamma=0.8, interval=5),
    "PILOT as released": PILOT(),
    FILLED: _PILOT,
}
"""PILOT for short schedules: every second step is optimised, with five iterations. Its parts as in the paper's ablation, its
coherence scale, and ways to make fewer passes: two iterations, at 2.5 times the rates as well, and every fifth step, with the
known latents blended in at the end as well. As released it is meant for 100 steps."""


@dataclass(frozen=True, kw_only=True)
class KSampling(Sampling):
    """The KSampler's settings; the seed is the triplet's."""

    sampler: str = "euler"


@dataclass(frozen=True)
class Method:
    """One row of the table: which model, with PAIntA, with RASG of which eta, grid and strength, with a semantic boundary, with
    several starts to choose from after which share of the steps, from a noise after so many steps of search at a rate, or one of
    PILOTS."""

    model: str
    painta: bool = False
    eta: float | None = None
    boundary: bool = False
    pilot: str | None = None
    grid: str = AUTO
    strength: float = 1.0
    candidates: int = 1
    choose_at: float = 0.5
    searched: int = 0
    rate: float = NoiseSearch.rate
    layers: str = "all"

    @property
    def name(self) -> str:
        if self.pilot is not None:
            return self.pilot
        grid = "" if self.grid == AUTO else f" {self.grid}"
        strength = "" if self.strength == 1.0 else f" strength {self.strength:g}"
        rate = "" if self.rate == NoiseSearch.rate else f" rate {self.rate:g}"
        layers = "" if self.layers == "all" else f" {self.layers}"
        share = "" if self.choose_at == BestStart.choose_at else f" at {self.choose_at:g}"
        parts = (
            [f"PAIntA{layers}"] * self.painta
            + [f"RASG{grid}{strength}"] * (self.eta is not None)
            + [f"SBC{layers}"] * self.boundary
            + [f"best of {self.candidates}{share}"] * (self.candidates > 1)
            + [f"noise search {self.searched}{rate}"] * (self.searched > 0)
        )
        return " + ".join(parts) or "plain"


@dataclass(frozen=True)
class Outcome:
    """What came of one triplet under one method, or of one caption, whose picture has no known part."""

    index: int
    right: bool
    empty: bool
    seconds: float
    background_error: float = 0.0
    seam: float = float("nan")
    change_before: float = float("nan")
    """The background's mean change before the original is put back, in levels of 255."""


def methods(models: list[str], etas: list[float]) -> list[Method]:
    """All combinations of PAIntA, RASG (of each eta) and SBC; RASG's grids and strengths, starts; PILOT for models that can."""
    return [method for model in models for method in _methods_of(model, etas)]


def _methods_of(model: str, etas: list[float]) -> list[Method]:
    if model == TRANSFORMER:
        return [
            Method(model),
            *(Method(model, boundary=True, layers=layers) for layers in LAYERS),
            *(Method(model, painta=True, layers=layers) for layers in LAYERS),
            Method(model, painta=True, boundary=True),
        ]
    combined = [
        Method(model, painta=painta, eta=eta, boundary=boundary)
        for boundary in (False, True)
        for of_rasg in ((None,), etas)
        for painta in (False, True)
        for eta in of_rasg
    ]
    grids = [Method(model, eta=eta, grid=grid) for grid in GRIDS for eta in etas]
    strengths = [Method(model, eta=eta, strength=strength) for strength in (0.25, 0.5, 0.75) for eta in etas]
    starts = [
        *(Method(model, candidates=candidates) for candidates in (2, 4, 8)),
        Method(model, candidates=4, choose_at=0.25),
        Method(model, candidates=4, boundary=True),
        *(Method(model, candidates=4, eta=eta) for eta in etas),
    ]
    searches = [
        *(Method(model, searched=steps) for steps in (1, 2, 5, 10, 20)),
        *(Method(model, searched=steps, rate=rate) for steps in (1, 2) for rate in (0.05, 0.1, 0.4)),
        Method(model, searched=1, boundary=True),
        Method(model, searched=1, candidates=4),
        *(Method(model, searched=1, painta=painta, eta=eta) for painta in (False, True) for eta in etas),
    ]
    pilots = [Method(model, pilot=name) for name in PILOTS if model == "4-channel"]
    return [*combined, *grids, *strengths, *starts, *searches, *pilots]


class Models:
    """The demo models of a folder, each loaded once."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._loaded: dict[str, tuple[ModelPatcher, CLIP, VAE]] = {}

    def __getitem__(self, name: str) -> tuple[ModelPatcher, CLIP, VAE]:
        """MODEL, CLIP and VAE for one of MODELS, or TRANSFORMER."""
        if name not in self._loaded:
            self._loaded[name] = load_kind(MODELS.get(name, name), self._folder)
        return self._loaded[name]


def patched(model: ModelPatcher, method: Method) -> ModelPatcher:
    """A MODEL with a method's patches."""
    if method.painta:
        model = with_method(model, PAIntA(layers=method.layers))
    if method.eta is not None:
        model = with_method(model, RASG(eta=method.eta, grid=method.grid, strength=method.strength))
    if method.boundary:
        model = with_method(model, SemanticBoundary(layers=method.layers))
    if method.candidates > 1:
        starts = BestStart(candidates=method.candidates, choose_at=method.choose_at, announce=lambda text: None)
        model = with_method(model, starts)
    if method.searched:
        search = NoiseSearch(steps=method.searched, rate=method.rate, announce=lambda text: None)
        model = with_method(model, search)
    return model


def as_image(picture: np.ndarray) -> torch.Tensor:
    """A picture uint8 [H, W, 3] as the host's IMAGE [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(picture).float()[None] / 255.0


@dataclass(frozen=True)
class Task:
    """A triplet, encoded for one model by the host's nodes: the same for every method.

    `pixels` [1, H, W, 3], `hole` [1, H, W]; `conditions` are the positive, the negative and the latent; `seconds` is what
    encoding took.
    """

    triplet: Triplet
    model: str
    pixels: torch.Tensor
    hole: torch.Tensor
    conditions: tuple[Any, Any, dict[str, torch.Tensor]]
    seconds: float


def prepare(models: Models, model: str, triplet: Triplet) -> Task:
    """Encode a triplet for one of MODELS."""
    started = time.perf_counter()
    _, clip, vae = models[model]
    pixels, hole = as_image(triplet.scene.picture), torch.from_numpy(triplet.hole).float()[None]
    with torch.inference_mode():
        positive, negative = encode_prompt(clip, triplet.prompt), encode_prompt(clip, "")
        conditions = host_nodes.InpaintModelConditioning().encode(
            positive, negative, pixels, vae, hole, noise_mask=True
        )
    return Task(triplet, model, pixels, hole, conditions, time.perf_counter() - started)


def make(models: Models, method: Method, task: Task, seed: int, sampling: KSampling) -> torch.Tensor:
    """What the model draws, [1, H, W, 3], for a triplet that was prepared for the method's model: the background too."""
    model, _, vae = models[method.model]
    with torch.inference_mode():
        if method.pilot is not None:
            positive, negative, latent = task.conditions
            if method.pilot == FILLED:
                latent = {**latent, "samples": vae.encode(fill_pictures(task.pixels, task.hole))}
            conditions = (positive, negative, latent)
            latent = _sample_pilot(model, PILOTS[method.pilot], conditions, seed, sampling)
        else:
            (latent,) = host_nodes.common_ksampler(
                patched(model, method),
                seed,
                sampling.steps,
                sampling.cfg,
                sampling.sampler,
                sampling.scheduler,
                *task.conditions,
                denoise=1.0,
            )
        return vae.decode(latent["samples"]).float().cpu()


def _sample_pilot(
    model: ModelPatcher, settings: PILOT, conditions: tuple[Any, Any, dict[str, Any]], seed: int, sampling: KSampling
) -> dict[str, Any]:
    positive, negative, latent = conditions
    model_sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, sampling.scheduler, sampling.steps)
    made = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent["samples"], seed),
        sampling.cfg,
        pilot_sampler(settings, lambda text: None),
        sigmas,
        positive,
        negative,
        latent["samples"],
        noise_mask=latent["noise_mask"],
        disable_pbar=True,
        seed=seed,
    )
    return {"samples": made}


def finish(task: Task, made: torch.Tensor) -> torch.Tensor:
    """The picture [1, H, W, 3] with what was made in its hole."""
    return composited(task.pixels, made, task.hole)


def composited(pixels: torch.Tensor, made: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """Pixels [1, H, W, 3] with what was made where `hole` [1, H, W] is 1."""
    return composite(pixels.movedim(-1, 1).clone(), made.movedim(-1, 1), 0, 0, hole, 1).movedim(1, -1)


def fill(models: Models, method: Method, task: Task, seed: int, sampling: KSampling) -> torch.Tensor:
    """The finished picture [1, H, W, 3] of a triplet that was prepared for the method's model."""
    return finish(task, make(models, method, task, seed, sampling))


def attempt(
    models: Models, method: Method, task: Task, index: int, sampling: KSampling, judge: Judge
) -> tuple[Outcome, torch.Tensor]:
    """Fill a triplet and judge the picture [1, H, W, 3]. The noise depends on its index alone."""
    started = time.perf_counter()
    made = make(models, method, task, index, sampling)
    result = finish(task, made)
    seconds = task.seconds + time.perf_counter() - started
    pixels, scene, hole = result.movedim(-1, 1), task.pixels.movedim(-1, 1), task.hole[:, None]
    seen = judge.in_hole(pixels[0], hole[0, 0])
    right = (seen.shape, seen.colour) == (task.triplet.shape, task.triplet.colour)
    return (
        Outcome(
            index,
            right,
            seen.shape is None,
            seconds,
            background_error(pixels, scene, hole),
            float(seam_visibility(pixels, scene, hole)),
            background_change(made.movedim(-1, 1), scene, hole),
        ),
        result,
    )


@dataclass(frozen=True)
class Caption:
    """A caption of one object, and what it asks for."""

    text: str
    shape: str
    colour: str
    pattern: str


def make_caption(split: str, index: int) -> Caption:
    """One object on one background, all attributes equally often."""
    rng = generator(split, index, Purpose.CAPTION)
    shape, colour, pattern = (str(rng.choice(values)) for values in (SHAPES, list(COLOURS), PATTERNS))
    background = str(rng.choice(BACKGROUNDS))
    return Caption(f"{local_caption(shape, colour, pattern)} {PHRASES[background][0]}", shape, colour, pattern)


def draw(models: Models, caption: str, seed: int, sampling: KSampling) -> torch.Tensor:
    """A picture [1, 256, 256, 3] by the text-to-image demo model."""
    model, clip, vae = models["4-channel"]
    latent = {"samples": torch.zeros(1, 4, 32, 32)}
    with torch.inference_mode():
        (latent,) = host_nodes.common_ksampler(
            model,
            seed,
            sampling.steps,
            sampling.cfg,
            sampling.sampler,
            sampling.scheduler,
            encode_prompt(clip, caption),
            encode_prompt(clip, ""),
            latent,
        )
        return vae.decode(latent["samples"]).float().cpu()


def attempt_caption(
    models: Models, split: str, index: int, sampling: KSampling, judge: Judge
) -> tuple[Outcome, torch.Tensor]:
    """Draw one caption of a split and judge the picture."""
    caption = make_caption(split, index)
    started = time.perf_counter()
    picture = draw(models, caption.text, index, sampling)
    seconds = time.perf_counter() - started
    seen = judge.anywhere(picture[0].movedim(-1, 0))
    right = (seen.shape, seen.colour) == (caption.shape, caption.colour)
    return Outcome(index, right, seen.shape is None, seconds), picture
