"""Every method with prompts that don't act everywhere: limited in time, to an area or a mask, of strength 0, or none at all.

A prompt acts at the noise levels that the host gives it, with a weight above 0. Where no positive prompt acts, PAIntA, RASG and
PILOT's optimizer have nothing to go by and leave the host's step as it is; semantic boundary control goes on with the negative
prompt's rows, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from devtools.pack import load_pack, pack_module
from truefill_testing.pilot_scene import CALM, HOLE, PILOT, pilot, sampler
from truefill_testing.scene import TOKENS_KEY, Scene, boxes, forget_models, relative_error, token_set
from truefill_testing.small_models import small_conditioning

import comfy.samplers  # isort: skip
import nodes as host_nodes  # isort: skip

load_pack()
sampling_run = pack_module("model_patches.core.sampling_run")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary
inpainting = pack_module("model_patches.pilot.inpaint")
diffusion = pack_module("model_patches.core.diffusion")

STEPS = 4
"""At timesteps 999, 749, 499 and 249: the middle of sampling lies between the second and the third."""
TWICE_EACH = {"interval": 1, "iterations": 2}

Conditioning = list[list[Any]]


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    forget_models()


def in_time(start: float, end: float) -> Callable[[Conditioning], Conditioning]:
    return lambda prompt: host_nodes.ConditioningSetTimestepRange().set_range(prompt, start, end)[0]


def in_area(width: int, height: int, x: int, y: int, strength: float = 1.0) -> Callable[[Conditioning], Conditioning]:
    return lambda prompt: host_nodes.ConditioningSetArea().append(prompt, width, height, x, y, strength)[0]


def in_mask(mask: torch.Tensor, bounds: bool = False, strength: float = 1.0) -> Callable[[Conditioning], Conditioning]:
    kind = "mask bounds" if bounds else "default"
    return lambda prompt: host_nodes.ConditioningSetMask().append(prompt, mask, kind, strength)[0]


def with_strength(strength: float) -> Callable[[Conditioning], Conditioning]:
    return lambda prompt: host_nodes.ConditioningSetAreaStrength().append(prompt, strength)[0]


def combined(*parts: Callable[[Conditioning], Conditioning]) -> Callable[[Conditioning], Conditioning]:
    return lambda prompt: [entry for part in parts for entry in part(prompt)]


LEFT = boxes((16, 13), (slice(0, 16), slice(0, 6)))[0]

NOWHERE: dict[str, Callable[[Conditioning], Conditioning]] = {
    "no entries": lambda prompt: [],
    "never": in_time(0.6, 0.6),
    "strength 0": with_strength(0.0),
    "area of strength 0": in_area(64, 64, 40, 16, 0.0),
    "mask of strength 0": in_mask(LEFT, strength=0.0),
    "black mask": in_mask(torch.zeros(1, 16, 13)),
    "black mask's bounds": in_mask(torch.zeros(1, 16, 13), bounds=True),
    "early, strength 0": lambda prompt: in_time(0.0, 0.5)(with_strength(0.0)(prompt)),
}
IN_TIME: dict[str, tuple[Callable[[Conditioning], Conditioning], tuple[int, ...]]] = {
    "early": (in_time(0.0, 0.5), (0, 1)),
    "late": (in_time(0.5, 1.0), (2, 3)),
    "empty middle": (combined(in_time(0.0, 0.2), in_time(0.7, 1.0)), (0, 3)),
}
"""And the steps at which they act."""
SOMEWHERE: dict[str, Callable[[Conditioning], Conditioning]] = {
    "area": in_area(64, 64, 40, 16),
    "area beside the hole": in_area(64, 64, 0, 64),
    "one row of cells": in_area(104, 8, 0, 48),
    "mask": in_mask(LEFT),
    "mask's bounds": in_mask(LEFT, bounds=True),
    "soft mask in pixels": in_mask(0.5 * F.interpolate(LEFT[None], scale_factor=8)[0]),
    "late area": lambda prompt: in_time(0.5, 1.0)(in_area(64, 64, 40, 16)(prompt)),
    "early mask": lambda prompt: in_time(0.0, 0.5)(in_mask(LEFT)(prompt)),
    "area, mask and strength 0": combined(
        in_area(64, 64, 40, 16), in_mask(LEFT), with_strength(0.0), in_area(64, 72, 0, 0, 0.0)
    ),
    "early area, late mask": combined(
        lambda prompt: in_time(0.0, 0.4)(in_area(64, 64, 40, 16)(prompt)),
        lambda prompt: in_time(0.6, 1.0)(in_mask(LEFT, bounds=True)(prompt)),
    ),
}
LIMITS = {**NOWHERE, **{name: limit for name, (limit, _) in IN_TIME.items()}, **SOMEWHERE}

ON_MODEL: dict[str, tuple[Any, ...]] = {
    "PAIntA": (PAIntA(end_percent=1.0),),
    "RASG": (RASG(eta=0.1),),
    "SBC": (SemanticBoundary(),),
    "all": (PAIntA(end_percent=1.0), RASG(eta=0.1), SemanticBoundary()),
}

on_model = pytest.mark.parametrize("name", list(ON_MODEL))
limits = pytest.mark.parametrize("limit", list(LIMITS.values()), ids=list(LIMITS))
nowhere = pytest.mark.parametrize("limit", list(NOWHERE.values()), ids=list(NOWHERE))
times = pytest.mark.parametrize(("limit", "acting"), list(IN_TIME.values()), ids=list(IN_TIME))


def scene_for(name: str) -> Scene:
    """PILOT works on text-to-image models; the others on an inpainting one here."""
    return Scene("sd15", name != "PILOT", True, torch.float32, hole=HOLE)


def with_methods(scene: Scene, name: str) -> Any:
    model = scene.patcher
    for settings in ON_MODEL[name]:
        model = sampling_run.with_method(model, settings)
    return model


def other_prompt() -> Conditioning:
    """A second positive prompt."""
    prompt = small_conditioning("sd15", seed=7)
    prompt[0][1][TOKENS_KEY] = token_set(1, 2, 3, 4)[None]
    return prompt


def run(scene: Scene, name: str, steps: int = STEPS, **settings: Any) -> torch.Tensor:
    sigmas = scene.sigmas("simple", steps)
    if name == "PILOT":
        return scene.host(sigmas, sampler=sampler(**{**TWICE_EACH, **settings}))
    return scene.host(sigmas, with_methods(scene, name))


class SwitchedGuider(comfy.samplers.CFGGuider):
    """Gives the host, at each noise level, only prompts that are there, not limited; without any of the `positive` role it
    takes, unless `goes_on`, the options of a model without methods."""

    def __init__(self, model: Any, acting: Callable[[float], bool], goes_on: bool) -> None:
        super().__init__(model)
        self._acting, self._goes_on = acting, goes_on

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> torch.Tensor:
        acts = self._acting(float(timestep[0]))
        options = model_options if acts or self._goes_on else self.model_options
        positive = self.conds["positive"] if acts else []
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], positive, self.cfg, options, seed
        )


def switched(scene: Scene, name: str, steps: tuple[int, ...]) -> torch.Tensor:
    """The scene sampled with its methods at these steps, and by the host alone at the others."""
    sigmas = scene.sigmas("simple", STEPS)
    levels = [float(sigmas[step]) for step in steps]
    guider = SwitchedGuider(with_methods(scene, name), lambda sigma: sigma in levels, goes_on=name == "SBC")
    arguments = scene.host_arguments()
    guider.set_conds(arguments["positive"], arguments["negative"])
    guider.set_cfg(scene.CFG)
    return scene.host_by_guider(guider, sigmas)


class TestNothingCrashes:
    """And the host's own result is finite, too."""

    @on_model
    @limits
    def test_positive(self, name: str, limit: Callable[[Conditioning], Conditioning]) -> None:
        scene = scene_for(name)
        scene.positive = limit(scene.positive)
        assert run(scene, name).isfinite().all()

    @pytest.mark.parametrize("name", ["all", "PILOT"])
    @limits
    def test_negative(self, name: str, limit: Callable[[Conditioning], Conditioning]) -> None:
        scene = scene_for(name)
        scene.negative = limit(scene.negative)
        assert run(scene, name).isfinite().all()

    @pytest.mark.parametrize("name", ["all", "PILOT"])
    @limits
    def test_both(self, name: str, limit: Callable[[Conditioning], Conditioning]) -> None:
        scene = scene_for(name)
        scene.positive, scene.negative = limit(scene.positive), limit(scene.negative)
        assert run(scene, name).isfinite().all()

    @on_model
    @pytest.mark.parametrize("name_of_limit", ["late", "area", "early area, late mask", "black mask"])
    def test_short_of_memory(self, name: str, name_of_limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then the host runs one prompt at a time, the negative one first."""
        scene = scene_for(name)
        scene.positive = LIMITS[name_of_limit](scene.positive)
        expected = run(scene, name)
        monkeypatch.setattr(type(scene.patcher), "get_free_memory", lambda self, device: 0)
        assert relative_error(run(scene, name), expected) < 1e-4


class TestOutsideOfItsRange:
    @on_model
    @times
    def test_the_step_is_the_hosts(self, name: str, limit: Any, acting: tuple[int, ...]) -> None:
        scene = scene_for(name)
        if name in ("RASG", "all"):
            scene.CFG = 2.0
        expected = switched(scene, name, acting)
        everywhere = run(scene, name)
        scene.positive = limit(scene.positive)
        ours = run(scene, name)
        assert relative_error(ours, expected) < 1e-4
        assert relative_error(ours, everywhere) > 1e-3
        assert relative_error(ours, scene.host(scene.sigmas("simple", STEPS))) > 1e-3

    @pytest.mark.parametrize("name", ["PAIntA", "RASG", "all"])
    @nowhere
    def test_a_prompt_that_acts_nowhere_is_none(self, name: str, limit: Callable[[Conditioning], Conditioning]) -> None:
        scene = scene_for(name)
        expected = switched(scene, name, ()) if name != "all" else None
        scene.positive = limit(scene.positive)
        ours = run(scene, name)
        if expected is None:
            # Semantic boundary control goes on, and RASG's noise with it.
            scene.positive = []
            expected = run(scene, name)
        assert relative_error(ours, expected) < 1e-4

    @pytest.mark.parametrize("name", [*ON_MODEL, "PILOT"])
    @nowhere
    def test_beside_another_prompt_it_does_not_count(
        self, name: str, limit: Callable[[Conditioning], Conditioning]
    ) -> None:
        scene = scene_for(name)
        alone = run(scene, name)
        scene.positive = [*limit(other_prompt()), *scene.positive]
        assert relative_error(run(scene, name), alone) < 1e-4
        scene.positive = [*other_prompt(), *scene.positive]
        assert relative_error(run(scene, name), alone) > 1e-3

    @pytest.mark.parametrize("name", ["all", "PILOT"])
    @nowhere
    def test_a_negative_prompt_that_acts_nowhere_is_none(
        self, name: str, limit: Callable[[Conditioning], Conditioning]
    ) -> None:
        scene = scene_for(name)
        negative, scene.negative = scene.negative, []
        without = run(scene, name)
        scene.negative = limit(negative)
        assert relative_error(run(scene, name), without) < 1e-4


class TestPilot:
    @staticmethod
    def only_at(acting: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        """Switches the optimizer off at all other steps."""
        planned = pilot._Plan.of

        def plan(*arguments: Any) -> Any:
            found = planned(*arguments)
            return replace(found, optimised=[due and step in acting for step, due in enumerate(found.optimised)])

        monkeypatch.setattr(pilot._Plan, "of", plan)

    def test_a_prompt_that_ends_is_not_optimized_by(self) -> None:
        scene = scene_for("PILOT")
        scene.positive = in_time(0.0, 0.5)(scene.positive)
        # Of the steps 0 and 2 the first has a positive prompt.
        ours, once, never = (run(scene, "PILOT", interval=interval) for interval in (2, STEPS, STEPS + 1))
        assert torch.equal(ours, once)
        assert relative_error(ours, never) > 1e-4

    @times
    @pytest.mark.parametrize("settings", [{}, {"boundary": 0.0}, {"memory": "recompute"}], ids=str)
    def test_it_optimizes_where_a_prompt_acts(
        self, limit: Any, acting: tuple[int, ...], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scene = scene_for("PILOT")
        scene.positive = limit(scene.positive)
        ours = run(scene, "PILOT", **settings)
        self.only_at(acting, monkeypatch)
        assert torch.equal(ours, run(scene, "PILOT", **settings))
        # Not all the same, with and without a step.
        self.only_at(acting[1:], monkeypatch)
        assert relative_error(ours, run(scene, "PILOT", **settings)) > 1e-4

    @nowhere
    def test_nothing_to_optimize_by(self, limit: Any) -> None:
        scene = scene_for("PILOT")
        scene.positive = limit(scene.positive)
        assert torch.equal(run(scene, "PILOT"), run(scene, "PILOT", interval=STEPS + 1))

    def test_at_each_step_by_the_prompt_that_acts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scene = scene_for("PILOT")
        first, second = scene.positive, other_prompt()
        losses: list[torch.Tensor] = []
        loss = pilot.Centralisation.loss

        def note(reader: Any) -> torch.Tensor:
            losses.append(loss(reader).detach().clone())
            return loss(reader)

        monkeypatch.setattr(pilot.Centralisation, "loss", note)
        for positive in (first, second, in_time(0.0, 0.5)(first) + in_time(0.5, 1.0)(second)):
            scene.positive = positive
            # Nothing moves, so that all see the same first latent; CFG 0 leaves the positive prompt out of the steps.
            scene.CFG = 0.0
            run(scene, "PILOT", learning_rate=0.0, first_learning_rate=0.0, iterations=1)
        of_first, of_second, of_both = losses[:4], losses[4:8], losses[8:]
        assert len(of_both) == 4
        assert torch.allclose(torch.stack(of_both), torch.stack([*of_first[:2], *of_second[2:]]), rtol=1e-4)
        assert not torch.allclose(torch.stack(of_first), torch.stack(of_second), rtol=1e-2)

    @limits
    def test_progress_reaches_its_total(self, limit: Any) -> None:
        scene = scene_for("PILOT")
        scene.positive = limit(scene.positive)
        passes: list[tuple[int, int]] = []
        told: list[str] = []
        chosen = pilot.pilot_sampler(PILOT(**CALM, interval=2, iterations=3), told.append)
        sigmas = scene.sigmas("simple", STEPS)
        scene.host(sigmas, sampler=chosen, callback=lambda step, x0, x, total: passes.append((step, total)))
        assert told == ["PILOT: 6 passes with a gradient (3 at 2 of 4 steps) and 4 guided steps."]
        done = [step for step, _ in passes]
        assert done == sorted(set(done)) and done[-1] == 9
        assert {total for _, total in passes} == {10}


class SquaresVAE:
    """The interface of the host's VAE, whose latents are the mean colors of squares of 8 pixels, and their mean."""

    latent_channels = 4

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        cells = F.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat((cells, cells.mean(1, keepdim=True)), 1)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return F.interpolate(latent[:, :3], scale_factor=8, mode="nearest").movedim(1, -1).clamp(0, 1)


@limits
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_the_pilot_node(side: str, limit: Callable[[Conditioning], Conditioning]) -> None:
    scene = scene_for("PILOT")
    sides = {"positive": scene.positive, "negative": scene.negative}
    sides[side] = limit(sides[side])
    pictures = torch.rand(1, 128, 104, 3, generator=torch.Generator().manual_seed(1))
    mask = F.interpolate(HOLE[:1], scale_factor=8)[:, 0]

    def filled(**settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return inpainting.inpaint(
                pictures=pictures,
                mask=mask,
                diffusion=diffusion.Diffusion(model=scene.patcher, vae=SquaresVAE(), **sides),
                sampling=diffusion.Sampling(seed=1, steps=2, scheduler="simple"),
                settings=PILOT(**CALM, **settings),
                feather=0.0,
            )

    latent, made = filled(interval=1, iterations=1)
    assert latent.isfinite().all() and made.isfinite().all()
    assert torch.equal(made[mask == 0], pictures[mask == 0])
    if side == "positive" and limit in NOWHERE.values():
        assert torch.equal(latent, filled(interval=3)[0])
    else:
        assert relative_error(latent, filled(interval=3)[0]) > 1e-5
