"""Best Start: which noise is chosen, against the literal scores of all; and that the rest is the host's own sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.literal_painta import level_mask
from truefill_testing.literal_sampling import alpha_bar, nearest_timestep
from truefill_testing.literal_unet import literal_unet
from truefill_testing.pilot_scene import CALM, pilot
from truefill_testing.scene import Scene, boxes, exact_unet, forget_models
from truefill_testing.subject_weights import random_assign

import comfy.model_management  # isort: skip
import comfy.samplers  # isort: skip
import nodes as host_nodes  # isort: skip

load_pack()
best_start = pack_module("model_patches.starts.best_start")
BestStart = best_start.BestStart
sampling_run = pack_module("model_patches.core.sampling_run")
known_blending = pack_module("model_patches.hd_painter.known_blending")
RASG = pack_module("model_patches.hd_painter.rasg").RASG
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary

COUNT = 3


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


def noises(scene: Scene) -> list[torch.Tensor]:
    """What the KSampler would begin with at the run's seed (0) and those that follow; the first is the scene's own."""
    of_seeds = [
        torch.randn(scene.noise.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(1, COUNT)
    ]
    return [scene.noise, *of_seeds]


def three_pictures() -> torch.Tensor:
    return boxes((16, 13), (slice(3, 9), slice(4, 13)), (slice(0, 16), slice(4, 9)), (slice(8, 14), slice(0, 6)))


def started(model: Any, **options: Any) -> Any:
    settings = {"candidates": COUNT, "announce": lambda text: None, **options}
    return sampling_run.with_method(model, BestStart(**settings))


class Spy:
    """Which noises the host begins with, and how often the UNet is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scene: Scene) -> None:
        self.noises: list[torch.Tensor] = []
        self.calls = 0
        sample = comfy.samplers.KSAMPLER.sample

        def spied(own: Any, *arguments: Any, **keywords: Any) -> Any:
            # model, sigmas, extra_args, callback, noise, and what follows
            self.noises.append(arguments[4].clone())
            return sample(own, *arguments, **keywords)

        monkeypatch.setattr(comfy.samplers.KSAMPLER, "sample", spied)
        handle = scene.model.diffusion_model.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))
        self.remove = handle.remove


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch):
    spies: list[Spy] = []

    def on(scene: Scene) -> Spy:
        spies.append(Spy(monkeypatch, scene))
        return spies[-1]

    yield on
    for spy in spies:
        spy.remove()


def literal_scores(scene: Scene, sigmas: torch.Tensor, early: int, factor: int) -> torch.Tensor:
    """The score of each candidate and picture, [candidates, B]: the probability of each of the prompt's words and of the end of
    its text, mean over blocks and heads, inside of the hole less outside, summed over tokens."""
    unet, found = exact_unet(scene.family, scene.inpainting), []
    prompt = scene.prompt(scene.positive)
    for noise in noises(scene):
        seen = {}

        def note(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int, seen: dict = seen) -> None:
            seen[step] = x

        own, scene.noise = scene.noise, noise
        scene.host(sigmas, callback=note)
        scene.noise = own
        sigma = float(sigmas[early])
        known = scene.latent.double() * scene.scale + sigma * noise.double()
        x = scene.hole * seen[early].double() + (1 - scene.hole) * known if scene.masked else seen[early].double()
        x = x * math.sqrt(alpha_bar(sigma))
        if scene.inpainting:
            x = torch.cat([x, scene.hole.double().round(), scene.masked_latent.double() * scene.scale], dim=1)
        steps = torch.full((len(x),), nearest_timestep(sigma, scene.model.model_sampling.sigmas))
        context = prompt.context.double().expand(len(x), -1, -1)
        y = None if prompt.y is None else prompt.y.double().expand(len(x), -1)
        _, recorded = literal_unet(unet, x, steps, context, y, record=True, factors=(factor,))
        found.append(
            torch.stack([literal_score(recorded, picture, prompt.tokens, scene.hole) for picture in range(len(x))])
        )
    return torch.stack(found)


def literal_score(recorded: list[Any], picture: int, tokens: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    maps = torch.stack([layer.scores[picture].softmax(dim=-1).mean(dim=0) for layer in recorded]).mean(dim=0)
    inside = level_mask(hole[picture : picture + 1], recorded[0].grid).flatten()
    total = torch.zeros((), dtype=torch.float64)
    for token in tokens.nonzero().flatten().tolist():
        total = total + maps[inside, token].mean() - maps[~inside, token].mean()
    return total


@pytest.mark.parametrize(
    ("family", "inpainting", "masked", "grid", "factor"),
    [
        ("sd15", True, True, "1/16", 2),
        ("sd15", True, False, "1/32", 4),
        ("sdxl", False, True, "1/32", 4),
        ("sd2", True, False, "1/16", 2),
    ],
)
def test_each_picture_goes_on_from_the_noise_with_the_best_score(
    family: str, inpainting: bool, masked: bool, grid: str, factor: int, spied: Any
) -> None:
    scene = Scene(family, inpainting, masked, hole=three_pictures())
    sigmas = scene.sigmas("simple", 4)
    scores = literal_scores(scene, sigmas, early=2, factor=factor)
    best = scores.argmax(dim=0)
    gap = scores.topk(2, dim=0).values.diff(dim=0).abs().min()
    assert float(gap) > 1e-4 * float(scores.std()), "two candidates are too near to tell them apart"
    spy = spied(scene)
    made = scene.host(sigmas, started(scene.patcher, grid=grid))
    expected = torch.stack([noises(scene)[number][picture] for picture, number in enumerate(best.tolist())])
    assert torch.equal(spy.noises[-1], expected)
    assert bool(best.any()), "the first noise is the best for all pictures, so that nothing was tested"
    scene.noise = expected
    assert torch.equal(made, scene.host(sigmas))


SAMPLERS = [
    "euler",
    "heun",
    "dpmpp_2m",
    "dpmpp_sde",
    "euler_ancestral",
    "uni_pc",
    "lcm",
    "dpm_fast",
    "ddpm",
]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_picture_is_the_samplers_own_from_that_noise(name: str, spied: Any) -> None:
    """Also for samplers that look back at earlier steps, and for those that draw noise."""
    scene = Scene("sd15", True, True, torch.float32, hole=three_pictures())
    sigmas = scene.sigmas("simple", 6)
    spy = spied(scene)
    made = scene.host(sigmas, started(scene.patcher), name)
    with_choice, spy.calls = spy.calls, 0
    scene.noise = spy.noises[-1]
    assert torch.equal(made, scene.host(sigmas, sampler=name))
    # Of the plain run's evaluations, those up to the choice are made for each candidate, and no other twice.
    assert spy.calls < with_choice <= COUNT * spy.calls
    if name == "euler":
        assert with_choice == COUNT * 4 + 2


@pytest.mark.quick
def test_one_candidate_and_none_is_the_model_without_it() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)
    plain = scene.host(sigmas)
    for options in ({"candidates": 1}, {"strength": 0.0}, {"mask": torch.zeros(128, 104)}):
        assert torch.equal(scene.host(sigmas, started(scene.patcher, **options)), plain), options
    assert torch.equal(
        scene.host(scene.sigmas("simple", 1), started(scene.patcher)), scene.host(scene.sigmas("simple", 1))
    )


def test_twice_is_the_same_and_the_given_model_is_not_changed() -> None:
    scene = Scene("sd15", False, True, torch.float32)
    sigmas = scene.sigmas("simple", 3)
    plain = scene.host(sigmas)
    model = started(scene.patcher, choose_at=0.34)
    state = torch.get_rng_state()
    first = scene.host(sigmas, model)
    assert torch.equal(scene.host(sigmas, model), first)
    assert torch.equal(scene.host(sigmas), plain)
    assert not torch.equal(first, plain), "the first noise won, so that nothing was tested"
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_zero_has_no_candidates(spied: Any) -> None:
    """As the advanced KSampler has it without 'add noise'."""
    scene = Scene("sd15", True, True, torch.float32)
    scene.noise = torch.zeros_like(scene.noise)
    spy = spied(scene)
    scene.host(scene.sigmas("simple", 4)[2:], started(scene.patcher))
    assert spy.calls == 2


@pytest.mark.parametrize(
    ("others", "comes_first"),
    [
        ((PAIntA(end_percent=1.0),), True),
        ((SemanticBoundary(),), False),
        ((RASG(eta=0.3),), False),
        ((PAIntA(), RASG(eta=0.3), SemanticBoundary()), True),
    ],
    ids=["PAIntA", "SBC", "RASG", "all"],
)
def test_beside_the_other_methods_they_act_as_from_that_noise(
    others: tuple[Any, ...], comes_first: bool, spied: Any
) -> None:
    scene = Scene("sd15", True, True, torch.float32, hole=three_pictures())
    sigmas = scene.sigmas("simple", 4)

    def guided(model: Any) -> Any:
        for settings in (*others, random_assign(scene.model.diffusion_model)):
            model = sampling_run.with_method(model, settings)
        return model

    spy = spied(scene)
    model = guided(started(scene.patcher)) if comes_first else started(guided(scene.patcher))
    made = scene.host(sigmas, model)
    scene.noise = spy.noises[-1]
    assert torch.equal(made, scene.host(sigmas, guided(scene.patcher)))


def test_beside_blend_known(spied: Any) -> None:
    scene = Scene("sd15", True, True, torch.float32, hole=three_pictures())
    sigmas = scene.sigmas("simple", 4)

    def blended(model: Any) -> Any:
        return known_blending.with_known(model, scene.masked_latent, scene.hole, 1.0)

    spy = spied(scene)
    made = scene.host(sigmas, started(blended(scene.patcher)))
    assert torch.equal(made, scene.host(sigmas, blended(started(scene.patcher))))
    scene.noise = spy.noises[-1]
    assert torch.equal(made, scene.host(sigmas, blended(scene.patcher)))


def test_a_controlnet_and_a_prompt_in_an_area_take_part(spied: Any) -> None:
    scene = Scene("sd15", True, True, torch.float32, hole=three_pictures())
    scene.add_controlnet()
    (limited,) = host_nodes.ConditioningSetArea().append(scene.positive, 64, 64, 32, 32, 1.0)
    scene.positive = scene.positive + limited
    sigmas = scene.sigmas("simple", 3)
    spy = spied(scene)
    made = scene.host(sigmas, started(scene.patcher))
    scene.noise = spy.noises[-1]
    assert torch.equal(made, scene.host(sigmas))


def test_where_no_positive_prompt_acts_the_first_noise_goes_on(spied: Any) -> None:
    scene = Scene("sd15", True, True, torch.float32)
    (scene.positive,) = host_nodes.ConditioningSetTimestepRange().set_range(scene.positive, 0.0, 0.2)
    sigmas, said = scene.sigmas("simple", 4), []
    spy = spied(scene)
    scene.host(sigmas, started(scene.patcher, announce=said.append))
    assert torch.equal(spy.noises[-1], scene.noise)
    assert "no positive prompt" in said[-1]


def test_the_cost_is_said_before_it_starts_and_the_seeds_after_the_choice(spied: Any) -> None:
    scene = Scene("sd15", True, True, torch.float32, hole=three_pictures())
    said, at = [], []
    spy = spied(scene)

    def hear(text: str) -> None:
        said.append(text)
        at.append(spy.calls)

    scene.host(scene.sigmas("simple", 4), started(scene.patcher, announce=hear))
    assert "3 candidates for 2 of 4 steps" in said[0] and "time of 10 steps, not 4" in said[0]
    assert at == [0, COUNT * 3] and spy.calls == COUNT * 3 + 1
    own = noises(scene)
    seeds = [next(n for n in range(COUNT) if torch.equal(own[n][p], spy.noises[-1][p])) for p in range(3)]
    assert ", ".join(map(str, seeds)) in said[1]


def test_progress_counts_the_candidates_steps() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    heard = []
    scene.host(
        scene.sigmas("simple", 4), started(scene.patcher), callback=lambda i, x0, x, total: heard.append((i, total))
    )
    assert heard == [(step, COUNT * 2 + 4) for step in range(COUNT * 2 + 4)]


def test_after_an_interrupt_nothing_stays_behind() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 4)
    model = started(scene.patcher)
    before, expected = scene.host(sigmas), scene.host(sigmas, model)
    state = torch.get_rng_state()

    # In the first candidate, in the last, and after the choice.
    for stop_at in (1, 5, 8):

        def interrupt(step: int, x0: torch.Tensor, x: torch.Tensor, total: int, last: int = stop_at) -> None:
            if step == last:
                raise comfy.model_management.InterruptProcessingException

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            scene.host(sigmas, model, callback=interrupt)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(scene.host(sigmas), before)
        assert torch.equal(scene.host(sigmas, model), expected)


def test_a_sampler_that_is_not_the_ksamplers_gets_one_sentence() -> None:
    scene = Scene("sd15", False, True, torch.float32)
    sampler = pilot.pilot_sampler(pilot.PILOT(**CALM), lambda text: None)
    with pytest.raises(ValueError, match=r"^Best Start .* PILOTSampler .*KSampler's samplers\.$"):
        scene.host(scene.sigmas("simple", 2), started(scene.patcher), sampler)

    class OfAnotherPack(comfy.samplers.KSAMPLER):
        def sample(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            return super().sample(*arguments, **keywords)

    with pytest.raises(ValueError, match=r"^Best Start .* OfAnotherPack .*KSampler's samplers\.$"):
        other = OfAnotherPack(comfy.samplers.sampler_object("euler").sampler_function)
        scene.host(scene.sigmas("simple", 2), started(scene.patcher), other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, spied: Any) -> None:
    scene = Scene("sd15", True, True, dtype)
    sigmas = scene.sigmas("simple", 2)
    spy = spied(scene)
    made = scene.host(sigmas, started(scene.patcher, candidates=3))
    assert bool(made.isfinite().all())
    scene.noise = spy.noises[-1]
    assert torch.equal(made, scene.host(sigmas))
