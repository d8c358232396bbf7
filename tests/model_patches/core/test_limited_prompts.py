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

STEPS = 3
"""At timesteps 999, 666 and 333: the middle of sampling lies between the second and the third."""
FEW = 2
"""At 999 and 499."""

Conditioning = list[list[Any]]
Limit = Callable[[Conditioning], Conditioning]


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    forget_models()


def in_time(start: float, end: float) -> Limit:
    return lambda prompt: host_nodes.ConditioningSetTimestepRange().set_range(prompt, start, end)[0]


def in_area(width: int, height: int, x: int, y: int, strength: float = 1.0) -> Limit:
    return lambda prompt: host_nodes.ConditioningSetArea().append(prompt, width, height, x, y, strength)[0]


def in_mask(mask: torch.Tensor, bounds: bool = False, strength: float = 1.0) -> Limit:
    kind = "mask bounds" if bounds else "default"
    return lambda prompt: host_nodes.ConditioningSetMask().append(prompt, mask, kind, strength)[0]


def with_strength(strength: float) -> Limit:
    return lambda prompt: host_nodes.ConditioningSetAreaStrength().append(prompt, strength)[0]


def combined(*parts: Limit) -> Limit:
    return lambda prompt: [entry for part in parts for entry in part(prompt)]


LEFT = boxes((16, 13), (slice(0, 16), slice(0, 6)))[0]

NOWHERE: dict[str, Limit] = {
    "no entries": lambda prompt: [],
    "never": in_time(0.6, 0.6),
    "strength 0": with_strength(0.0),
    "area of strength 0": in_area(64, 64, 40, 40, 0.0),
    "mask of strength 0": in_mask(LEFT, strength=0.0),
    "black mask": in_mask(torch.zeros(1, 16, 13)),
    "black mask's bounds": in_mask(torch.zeros(1, 16, 13), bounds=True),
}
IN_TIME: dict[str, tuple[Limit, tuple[int, ...]]] = {
    "early": (in_time(0.0, 0.5), (0, 1)),
    "late": (in_time(0.5, 1.0), (2,)),
    "empty middle": (combined(in_time(0.0, 0.2), in_time(0.6, 1.0)), (0, 2)),
}
"""And the steps at which they act."""
SOMEWHERE: dict[str, Limit] = {
    "area": in_area(64, 64, 40, 40),
    "area beside the hole": in_area(64, 64, 0, 64),
    "one row of cells": in_area(104, 8, 0, 48),
    "mask": in_mask(LEFT),
    "mask's bounds": in_mask(LEFT, bounds=True),
    "soft mask in pixels": in_mask(0.5 * F.interpolate(LEFT[None], scale_factor=8)[0]),
    "late area": lambda prompt: in_time(0.5, 1.0)(in_area(64, 64, 40, 40)(prompt)),
    "early mask": lambda prompt: in_time(0.0, 0.5)(in_mask(LEFT)(prompt)),
    "area, mask and strength 0": combined(
        in_area(64, 64, 40, 40), in_mask(LEFT), with_strength(0.0), in_area(64, 72, 0, 0, 0.0)
    ),
    "early area, late mask": combined(
        lambda prompt: in_time(0.0, 0.4)(in_area(64, 64, 40, 40)(prompt)),
        lambda prompt: in_time(0.6, 1.0)(in_mask(LEFT, bounds=True)(prompt)),
    ),
}
ACTING = {**{name: limit for name, (limit, _) in IN_TIME.items()}, **SOMEWHERE}
LIMITS = {**NOWHERE, **ACTING}

ON_MODEL: dict[str, tuple[Any, ...]] = {
    "PAIntA": (PAIntA(end_percent=1.0),),
    "RASG": (RASG(eta=0.1),),
    "SBC": (SemanticBoundary(),),
    "all": (PAIntA(end_percent=1.0), RASG(eta=0.1), SemanticBoundary()),
}

# Those that act nowhere are compared with none at all, in a class of their own.
limits = pytest.mark.parametrize("limit", list(ACTING.values()), ids=list(ACTING))
times = pytest.mark.parametrize(("limit", "acting"), list(IN_TIME.values()), ids=list(IN_TIME))


def scene_for(name: str, pictures: int = 1) -> Scene:
    """PILOT works on text-to-image models, the others on an inpainting one here."""
    scene = Scene("sd15", name != "PILOT", True, torch.float32, hole=HOLE[:pictures])
    # Without one of the prompts the host guides by the other alone, away from it or towards it: not too far.
    scene.CFG = 1.5
    return scene


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
        return scene.host(sigmas, sampler=sampler(**{"interval": 1, "iterations": 1, **settings}))
    return scene.host(sigmas, with_methods(scene, name))


class SwitchedGuider(comfy.samplers.CFGGuider):
    """Gives the host, at each noise level, the positive prompts that are to act there, and no others.

    Without any it takes, unless the methods go on, the options of a model without methods.
    """

    def __init__(self, model: Any, acts_at: Callable[[float], bool], goes_on: bool) -> None:
        super().__init__(model)
        self._acts_at, self._goes_on = acts_at, goes_on

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> torch.Tensor:
        acts = self._acts_at(float(timestep[0]))
        options = model_options if acts or self._goes_on else self.model_options
        positive = self.conds["positive"] if acts else []
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], positive, self.cfg, options, seed
        )


def switched(scene: Scene, name: str, acting: tuple[int, ...]) -> torch.Tensor:
    """The scene sampled with its methods at these steps; at the others without a positive prompt, and by the host alone.

    Semantic boundary control goes on there: it has the negative prompt's rows to act on.
    """
    sigmas = scene.sigmas("simple", STEPS)
    levels = [float(sigmas[step]) for step in acting]
    guider = SwitchedGuider(with_methods(scene, name), lambda sigma: sigma in levels, name in ("SBC", "all"))
    arguments = scene.host_arguments()
    guider.set_conds(arguments["positive"], arguments["negative"])
    guider.set_cfg(scene.CFG)
    return scene.host_by_guider(guider, sigmas)


class TestNothingCrashes:
    @limits
    def test_all_methods(self, limit: Limit) -> None:
        scene = scene_for("all", pictures=2)
        scene.positive = limit(scene.positive)
        assert run(scene, "all", FEW).isfinite().all()
        scene.negative = limit(scene.negative)
        assert run(scene, "all", FEW).isfinite().all()

    @pytest.mark.parametrize("name", ["PAIntA", "RASG", "SBC"])
    def test_each_method(self, name: str) -> None:
        scene = scene_for(name)
        positive = scene.positive
        for limit in ("no entries", "late", "area", "mask's bounds", "early area, late mask"):
            scene.positive = LIMITS[limit](positive)
            assert run(scene, name, FEW).isfinite().all(), limit

    @pytest.mark.parametrize("name", ["all", "PILOT"])
    def test_negative_prompts(self, name: str) -> None:
        scene = scene_for(name)
        negative = scene.negative
        for limit in ("late", "empty middle", "area", "mask's bounds", "early area, late mask"):
            scene.negative = LIMITS[limit](negative)
            assert run(scene, name, FEW, interval=2).isfinite().all(), limit

    @limits
    def test_pilot(self, limit: Limit) -> None:
        scene = scene_for("PILOT", pictures=2)
        scene.positive = limit(scene.positive)
        assert run(scene, "PILOT", FEW).isfinite().all()

    @pytest.mark.parametrize("limit", ["late", "area", "early area, late mask", "black mask"])
    def test_short_of_memory(self, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then the host runs one prompt at a time, the negative one first."""
        scene = scene_for("all")
        scene.positive = LIMITS[limit](scene.positive)
        expected = {name: run(scene, name, FEW) for name in ("PAIntA", "all")}
        monkeypatch.setattr(type(scene.patcher), "get_free_memory", lambda self, device: 0)
        for name, right in expected.items():
            assert relative_error(run(scene, name, FEW), right) < 1e-4, name


class TestWhereNoPromptActs:
    @pytest.mark.parametrize("name", list(ON_MODEL))
    @times
    def test_the_step_is_the_hosts(self, name: str, limit: Limit, acting: tuple[int, ...]) -> None:
        scene = scene_for(name, pictures=2)
        expected, everywhere = switched(scene, name, acting), run(scene, name)
        scene.positive = limit(scene.positive)
        ours = run(scene, name)
        assert relative_error(ours, expected) < 1e-4
        assert relative_error(ours, everywhere) > 1e-3
        assert relative_error(ours, scene.host(scene.sigmas("simple", STEPS))) > 1e-3

    @pytest.mark.parametrize("name", ["PAIntA", "RASG", "SBC", "all"])
    def test_a_prompt_that_acts_nowhere_is_none(self, name: str) -> None:
        scene = scene_for(name)
        positive, expected = scene.positive, switched(scene, name, ())
        if name == "PAIntA":
            scene.positive = []
            assert relative_error(scene.host(scene.sigmas("simple", STEPS)), expected) < 1e-4
        for of_limit, limit in NOWHERE.items():
            scene.positive = limit(positive)
            assert relative_error(run(scene, name), expected) < 1e-4, of_limit

    @pytest.mark.parametrize("name", ["all", "PILOT"])
    def test_beside_another_prompt_it_does_not_count(self, name: str) -> None:
        scene = scene_for(name)
        positive, alone = scene.positive, run(scene, name, FEW)
        for of_limit, limit in NOWHERE.items():
            scene.positive = [*limit(other_prompt()), *positive]
            assert relative_error(run(scene, name, FEW), alone) < 1e-4, of_limit
        scene.positive = [*other_prompt(), *positive]
        assert relative_error(run(scene, name, FEW), alone) > 1e-3

    @pytest.mark.parametrize("name", ["all", "PILOT"])
    def test_a_negative_prompt_that_acts_nowhere_is_none(self, name: str) -> None:
        scene = scene_for(name)
        negative, scene.negative = scene.negative, []
        without = run(scene, name, FEW)
        for of_limit, limit in NOWHERE.items():
            scene.negative = limit(negative)
            assert relative_error(run(scene, name, FEW), without) < 1e-4, of_limit

    def test_a_default_prompt_acts_where_the_others_do_not(self) -> None:
        """Whatever its strength: the host takes what the others leave."""
        from comfy_extras.nodes_hooks import ConditioningSetDefaultAndCombine

        scene = scene_for("RASG")
        left, rest = in_mask(LEFT)(scene.positive), with_strength(0.0)(other_prompt())
        scene.positive = left
        alone = run(scene, "RASG", FEW)
        (scene.positive,) = ConditioningSetDefaultAndCombine().set_default_and_combine(left, rest)
        assert relative_error(run(scene, "RASG", FEW), alone) > 1e-3


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
        ours, once, never = (run(scene, "PILOT", interval=interval, iterations=2) for interval in (2, STEPS, STEPS + 1))
        assert torch.equal(ours, once)
        assert relative_error(ours, never) > 1e-4

    @times
    @pytest.mark.parametrize("settings", [{}, {"boundary": 0.0, "memory": "recompute"}], ids=str)
    def test_it_optimizes_where_a_prompt_acts(
        self, limit: Limit, acting: tuple[int, ...], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scene = scene_for("PILOT")
        scene.positive = limit(scene.positive)
        ours = run(scene, "PILOT", **settings)
        self.only_at(acting, monkeypatch)
        assert torch.equal(ours, run(scene, "PILOT", **settings))
        # It is not the same with one step less.
        self.only_at(acting[1:], monkeypatch)
        assert relative_error(ours, run(scene, "PILOT", **settings)) > 1e-5

    def test_nothing_to_optimize_by(self) -> None:
        scene = scene_for("PILOT")
        positive = scene.positive
        assert relative_error(run(scene, "PILOT", FEW), run(scene, "PILOT", FEW, interval=FEW + 1)) > 1e-4
        for of_limit, limit in NOWHERE.items():
            scene.positive = limit(positive)
            assert torch.equal(run(scene, "PILOT", FEW), run(scene, "PILOT", FEW, interval=FEW + 1)), of_limit

    def test_at_each_step_by_the_prompt_that_acts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scene = scene_for("PILOT")
        # The steps don't depend on the positive prompt, and the optimizer moves nothing: all see the same latents.
        scene.CFG = 0.0
        first, second = scene.positive, other_prompt()
        losses: list[torch.Tensor] = []
        loss = pilot.Centralisation.loss

        def note(reader: Any) -> torch.Tensor:
            losses.append(loss(reader).detach().clone())
            return loss(reader)

        monkeypatch.setattr(pilot.Centralisation, "loss", note)
        for positive in (first, second, in_time(0.0, 0.5)(first) + in_time(0.5, 1.0)(second)):
            scene.positive = positive
            run(scene, "PILOT", learning_rate=0.0, first_learning_rate=0.0)
        of_first, of_second, of_both = (torch.stack(losses[start : start + STEPS]) for start in (0, STEPS, 2 * STEPS))
        assert torch.allclose(of_both, torch.cat((of_first[:2], of_second[2:])), rtol=1e-4)
        assert not torch.allclose(of_first, of_second, rtol=1e-2)

    @pytest.mark.parametrize("limit", ["no entries", "mask of strength 0", "early", "late", "empty middle", "area"])
    def test_progress_reaches_its_total(self, limit: str) -> None:
        scene = scene_for("PILOT")
        scene.positive = LIMITS[limit](scene.positive)
        passes: list[tuple[int, int]] = []
        told: list[str] = []
        chosen = pilot.pilot_sampler(PILOT(**CALM, interval=2, iterations=3), told.append)
        sigmas = scene.sigmas("simple", STEPS)
        scene.host(sigmas, sampler=chosen, callback=lambda step, x0, x, total: passes.append((step, total)))
        assert told == ["PILOT: 6 passes with a gradient (3 at 2 of 3 steps) and 3 guided steps."]
        done = [step for step, _ in passes]
        assert done == sorted(set(done)) and done[-1] == 8
        assert {total for _, total in passes} == {9}


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


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_the_pilot_node(side: str) -> None:
    scene = scene_for("PILOT")
    pictures = torch.rand(1, 128, 104, 3, generator=torch.Generator().manual_seed(1))
    mask = F.interpolate(HOLE[:1], scale_factor=8)[:, 0]

    def filled(sides: dict[str, Conditioning], **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return inpainting.inpaint(
                pictures=pictures,
                mask=mask,
                diffusion=diffusion.Diffusion(model=scene.patcher, vae=SquaresVAE(), **sides),
                sampling=diffusion.Sampling(seed=1, steps=FEW, scheduler="simple", cfg=scene.CFG),
                settings=PILOT(**CALM, iterations=1, **settings),
                feather=0.0,
            )

    for of_limit in ("no entries", "never", "late", "early area, late mask"):
        sides = {"positive": scene.positive, "negative": scene.negative}
        sides[side] = LIMITS[of_limit](sides[side])
        latent, made = filled(sides, interval=1)
        assert latent.isfinite().all() and made.isfinite().all()
        assert torch.equal(made[mask == 0], pictures[mask == 0])
        acts = side == "negative" or of_limit not in NOWHERE
        assert torch.equal(latent, filled(sides, interval=FEW + 1)[0]) != acts, of_limit
