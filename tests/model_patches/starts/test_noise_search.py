"""Noise Search: the noise that a run begins with, against a literal gradient; and that the rest is the host's own sampling."""

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
from truefill_testing.scene import Scene, boxes, exact_unet, forget_models, relative_error
from truefill_testing.subject_weights import random_assign

import comfy.model_management  # isort: skip
import comfy.samplers  # isort: skip
import nodes as host_nodes  # isort: skip

load_pack()
noise_search = pack_module("model_patches.starts.noise_search")
best_start = pack_module("model_patches.starts.best_start")
NoiseSearch = noise_search.NoiseSearch
sampling_run = pack_module("model_patches.core.sampling_run")
known_blending = pack_module("model_patches.hd_painter.known_blending")
RASG = pack_module("model_patches.hd_painter.rasg").RASG
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
Refine = pack_module("model_patches.lar_gen.reference").Refine
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary

RATE = 0.2


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


def three_pictures() -> torch.Tensor:
    return boxes((16, 13), (slice(3, 9), slice(4, 13)), (slice(0, 16), slice(4, 9)), (slice(8, 14), slice(0, 6)))


def searched(model: Any, **options: Any) -> Any:
    settings = {"rate": RATE, "announce": lambda text: None, **options}
    return sampling_run.with_method(model, NoiseSearch(**settings))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The noises that the host's samplers begin with, those of looks among them."""
    noises: list[torch.Tensor] = []
    sample = comfy.samplers.KSAMPLER.sample

    def spied(own: Any, *arguments: Any, **keywords: Any) -> Any:
        # model, sigmas, extra_args, callback, noise, and what follows
        noises.append(arguments[4].clone())
        return sample(own, *arguments, **keywords)

    monkeypatch.setattr(comfy.samplers.KSAMPLER, "sample", spied)
    return noises


def literal_score(scene: Scene, noise: torch.Tensor, sigma: float, factor: int) -> torch.Tensor:
    """The score of each picture, [B], of what the host asks the model at the first noise level: the probability of each of the
    prompt's words and of the end of its text, mean over blocks and heads, inside of the hole less outside, summed over tokens."""
    unet, prompt = exact_unet(scene.family, scene.inpainting), scene.prompt(scene.positive)
    clean = scene.latent.double() * scene.scale
    sampling = scene.model.model_sampling
    # The host takes a little more noise where a run begins at the highest level.
    highest = math.isclose(float(sampling.sigma_max), sigma, rel_tol=1e-5) or sigma > float(sampling.sigma_max)
    x = clean + noise.double() * (math.sqrt(1 + sigma**2) if highest else sigma)
    if scene.masked:
        x = scene.hole * x + (1 - scene.hole) * (clean + noise.double() * sigma)
    x = x * math.sqrt(alpha_bar(sigma))
    if scene.inpainting:
        x = torch.cat([x, scene.hole.double().round(), scene.masked_latent.double() * scene.scale], dim=1)
    steps = torch.full((len(x),), nearest_timestep(sigma, sampling.sigmas))
    context = prompt.context.double().expand(len(x), -1, -1)
    y = None if prompt.y is None else prompt.y.double().expand(len(x), -1)
    _, recorded = literal_unet(unet, x, steps, context, y, record=True, factors=(factor,))
    found = []
    for picture in range(len(x)):
        maps = torch.stack([layer.scores[picture].softmax(dim=-1).mean(dim=0) for layer in recorded]).mean(dim=0)
        inside = level_mask(scene.hole[picture : picture + 1], recorded[0].grid).flatten()
        total = torch.zeros((), dtype=torch.float64)
        for token in prompt.tokens.nonzero().flatten().tolist():
            total = total + maps[inside, token].mean() - maps[~inside, token].mean()
        found.append(total)
    return torch.stack(found)


def literal_search(scene: Scene, sigma: float, factor: int, steps: int, rate: float) -> torch.Tensor:
    """The noise after the search, picture by picture."""
    noise = scene.noise.double()
    for _ in range(steps):
        with torch.inference_mode(False), torch.enable_grad():
            asked = noise.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(literal_score(scene, asked, sigma, factor).sum(), asked)
        pictures = []
        for picture in range(len(noise)):
            inside = (scene.hole[picture, 0] > 0).expand(noise.shape[1], -1, -1)
            before = noise[picture][inside]
            step = gradient[picture][inside]
            after = before + rate * step / math.sqrt(float((step**2).sum()) / len(step))
            after = (after - after.mean()) / after.std() * before.std() + before.mean()
            moved = noise[picture].clone()
            moved[inside] = after
            pictures.append(moved)
        noise = torch.stack(pictures)
    return noise


@pytest.mark.parametrize(
    ("family", "inpainting", "masked", "grid", "factor", "from_step", "steps"),
    [
        pytest.param("sd15", True, True, "1/16", 2, 0, 1, marks=pytest.mark.quick),
        ("sd15", True, False, "1/32", 4, 0, 2),
        ("sdxl", False, True, "1/32", 4, 1, 1),
        ("sd2", True, False, "1/16", 2, 2, 1),
    ],
)
def test_the_noise_is_the_literal_one(
    family: str,
    inpainting: bool,
    masked: bool,
    grid: str,
    factor: int,
    from_step: int,
    steps: int,
    begun: list[torch.Tensor],
) -> None:
    """Also for runs that begin at a lower noise level, with the picture's latent under the noise."""
    scene = Scene(family, inpainting, masked, hole=three_pictures())
    sigmas = scene.sigmas("simple", 4)[from_step:]
    expected = literal_search(scene, float(sigmas[0]), factor, steps, RATE)
    made = scene.host(sigmas, searched(scene.patcher, grid=grid, steps=steps))
    assert len(begun) == steps + 1 and torch.equal(begun[0], scene.noise)
    assert relative_error(begun[-1].double(), expected) < 1e-5
    # The change alone has the float32 rounding of the host's whole input.
    assert relative_error(begun[-1].double() - scene.noise.double(), expected - scene.noise.double()) < 1e-4
    scene.noise = begun[-1]
    assert torch.equal(made, scene.host(sigmas))


@pytest.mark.quick
def test_no_step_and_no_hole_is_the_model_without_it(begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)
    plain = scene.host(sigmas)
    for options in ({"steps": 0}, {"strength": 0.0}, {"mask": torch.zeros(128, 104)}):
        assert torch.equal(scene.host(sigmas, searched(scene.patcher, **options)), plain), options
        assert all(torch.equal(noise, scene.noise) for noise in begun)


@pytest.mark.quick
def test_twice_is_the_same_and_the_given_model_is_not_changed() -> None:
    scene = Scene("sd15", False, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)
    plain, model, state = scene.host(sigmas), searched(scene.patcher), torch.get_rng_state()
    first = scene.host(sigmas, model)
    assert torch.equal(scene.host(sigmas, model), first)
    assert torch.equal(scene.host(sigmas), plain)
    assert not torch.equal(first, plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.quick
def test_outside_of_the_hole_and_in_pictures_without_one_the_noise_stays(begun: list[torch.Tensor]) -> None:
    """In the hole, its soft edge included, it has its mean and its deviation again."""
    hole = boxes((16, 13), (slice(3, 9), slice(4, 13)), (slice(0, 0), slice(0, 0)), (slice(5, 6), slice(7, 8)))
    hole[0, 0, 2, 4:13] = 0.3
    scene = Scene("sd15", True, True, torch.float32, hole=hole)
    scene.host(scene.sigmas("simple", 2), searched(scene.patcher, steps=3, rate=0.5))
    for own, first, found in zip(scene.hole > 0, scene.noise, begun[-1], strict=True):
        own = own.expand_as(first)
        assert torch.equal(found[~own], first[~own])
        if bool(own.any()):
            assert not bool((found[own] == first[own]).any())
            for of in (torch.mean, torch.std):
                assert float(of(found[own])) == pytest.approx(float(of(first[own])), abs=1e-5)


def test_the_score_rises_with_each_step(begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", True, True, hole=three_pictures())
    sigmas = scene.sigmas("simple", 2)
    scene.host(sigmas, searched(scene.patcher, grid="1/16", steps=4, rate=0.05))
    scores = torch.stack([literal_score(scene, noise, float(sigmas[0]), 2) for noise in begun])
    assert len(scores) == 5 and bool((scores.diff(dim=0) > 0).all())


def test_noise_of_zero_stays(begun: list[torch.Tensor]) -> None:
    """As the advanced KSampler has it without 'add noise'."""
    scene = Scene("sd15", True, True, torch.float32)
    scene.noise = torch.zeros_like(scene.noise)
    scene.host(scene.sigmas("simple", 4)[2:], searched(scene.patcher))
    assert len(begun) == 1 and not bool(begun[0].any())


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_sde", "euler_ancestral", "uni_pc", "dpm_fast"])
def test_the_picture_is_the_samplers_own_from_that_noise(name: str, begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 4)
    made = scene.host(sigmas, searched(scene.patcher), name)
    scene.noise = begun[-1]
    assert torch.equal(made, scene.host(sigmas, sampler=name))


@pytest.mark.parametrize("comes_first", [True, False])
def test_beside_the_other_methods_they_act_as_from_that_noise(comes_first: bool, begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", True, True, torch.float32, hole=three_pictures())
    sigmas = scene.sigmas("simple", 4)

    def guided(model: Any) -> Any:
        subject = random_assign(scene.model.diffusion_model)
        refine = Refine(latents=scene.latent[:1], is_one=True, strength=0.5)
        for settings in (PAIntA(), RASG(eta=0.3), SemanticBoundary(), subject, refine):
            model = sampling_run.with_method(model, settings)
        return known_blending.with_known(model, scene.masked_latent, scene.hole, 1.0)

    model = guided(searched(scene.patcher)) if comes_first else searched(guided(scene.patcher))
    made = scene.host(sigmas, model)
    scene.noise = begun[-1]
    assert torch.equal(made, scene.host(sigmas, guided(scene.patcher)))


def test_beside_painta_the_score_is_that_of_the_model_with_it(begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", True, True, torch.float32, hole=three_pictures())
    sigmas = scene.sigmas("simple", 2)
    scene.host(sigmas, searched(scene.patcher))
    alone = begun[-1]
    scene.host(sigmas, searched(sampling_run.with_method(scene.patcher, PAIntA())))
    assert not torch.equal(begun[-1], alone)


def test_each_of_best_starts_candidates_is_searched(begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", True, True, torch.float32, hole=three_pictures())
    sigmas, said = scene.sigmas("simple", 3), []

    def started(model: Any) -> Any:
        return sampling_run.with_method(model, best_start.BestStart(candidates=2, announce=lambda text: None))

    made = scene.host(sigmas, started(searched(scene.patcher, announce=said.append)))
    asked, (first, second, chosen) = begun[:2], begun[2:]
    assert torch.equal(asked[0], scene.noise)
    assert torch.equal(asked[1], torch.randn(scene.noise.shape, generator=torch.Generator().manual_seed(1)))
    for candidate, before in zip((first, second), asked, strict=True):
        scene.noise = before
        begun.clear()
        scene.host(sigmas, searched(scene.patcher))
        assert torch.equal(begun[-1], candidate)
    assert all(any(torch.equal(own, of[p]) for of in (first, second)) for p, own in enumerate(chosen))
    scene.noise = chosen
    assert torch.equal(made, scene.host(sigmas))
    assert len(said) == 1


def test_with_the_pilot_sampler(begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", False, True, torch.float32)
    sampler = pilot.pilot_sampler(pilot.PILOT(**CALM), lambda text: None)
    sigmas = scene.sigmas("simple", 2)
    made = scene.host(sigmas, searched(scene.patcher), sampler)
    assert len(begun) == 1, "PILOT's own sampler is none of the KSampler's, so only the look is seen"
    assert bool(made.isfinite().all()) and not torch.equal(made, scene.host(sigmas, sampler=sampler))


def test_a_prompt_in_an_area_searches_there(begun: list[torch.Tensor]) -> None:
    """A hole beside the area keeps its noise, bit for bit; a ControlNet takes part."""
    hole = boxes((16, 13), (slice(9, 12), slice(2, 6)), (slice(0, 3), slice(8, 12)))
    scene = Scene("sd15", True, True, torch.float32, hole=hole)
    scene.add_controlnet()
    (scene.positive,) = host_nodes.ConditioningSetArea().append(scene.positive, 64, 64, 0, 64, 1.0)
    scene.host(scene.sigmas("simple", 2), searched(scene.patcher))
    assert not torch.equal(begun[-1][0], scene.noise[0])
    assert torch.equal(begun[-1][1], scene.noise[1])


def test_where_no_positive_prompt_acts_the_noise_stays(begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", True, True, torch.float32)
    (scene.positive,) = host_nodes.ConditioningSetTimestepRange().set_range(scene.positive, 0.5, 1.0)
    said: list[str] = []
    scene.host(scene.sigmas("simple", 3), searched(scene.patcher, announce=said.append))
    assert torch.equal(begun[-1], scene.noise)
    assert "no positive prompt" in said[-1]


def test_negative_prompts_are_not_evaluated_for_it() -> None:
    scene, rows = Scene("sd15", True, True, torch.float32), []
    handle = scene.model.diffusion_model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    try:
        scene.host(scene.sigmas("simple", 2), searched(scene.patcher, steps=2))
    finally:
        handle.remove()
    pictures = len(scene.noise)
    assert rows[:2] == [pictures] * 2 and sum(rows) == 2 * pictures + 2 * 2 * pictures


def test_after_an_interrupt_nothing_stays_behind() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas, model = scene.sigmas("simple", 2), searched(scene.patcher)
    before, expected = scene.host(sigmas), scene.host(sigmas, model)

    def interrupt(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> Any:
        raise comfy.model_management.InterruptProcessingException

    broken = model.clone()
    broken.set_model_output_block_patch(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        scene.host(sigmas, broken)
    assert torch.equal(scene.host(sigmas), before)
    assert torch.equal(scene.host(sigmas, model), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, begun: list[torch.Tensor]) -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)
    scene.host(sigmas, searched(scene.patcher))
    exact = begun[-1]
    half = Scene("sd15", True, True, dtype)
    half.host(sigmas, searched(half.patcher))
    step, right = (found - scene.noise for found in (begun[-1], exact))
    assert float(torch.cosine_similarity(step.flatten(), right.flatten(), dim=0)) > 0.9


@pytest.mark.quick
def test_a_model_without_a_unet_gets_one_sentence() -> None:
    class Patcher:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"^Noise Search works on SD1\.5, SD2 and SDXL.*\.$") as refused:
        sampling_run.with_method(Patcher(), NoiseSearch())
    assert "\n" not in str(refused.value)


def test_what_is_not_finite_is_named() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas, model = scene.sigmas("simple", 2), searched(scene.patcher)
    ((text, options),) = scene.positive
    scene.positive = [[torch.full_like(text, float("nan")), options]]
    with pytest.raises(RuntimeError, match=r"^Noise Search's gradient is not finite in float32: the prompt, .*\.$"):
        scene.host(sigmas, model)
    scene.positive = [[text, options]]
    scene.latent[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^Noise Search was given a latent with NaN or infinite values: .*\.$"):
        scene.host(sigmas, model)
