"""Known latents beside what else happens to a model: other patches, noise masks, other runs, an error, little memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from truefill_testing.known_scene import (
    CFG,
    RASG,
    ROUNDING,
    Previews,
    Scene,
    area_mean,
    assert_same,
    forget_scenes,
    kinds,
    literal_of,
    masked,
    plain_of,
    with_method,
)
from truefill_testing.literal_sampling import alpha_bar, nearest_timestep
from truefill_testing.scene import randn


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_scenes()


def described(model: Any) -> Any:
    """What a patch could leave on a model: its options, its patches, the UNet's hooks and the inner model's attributes."""
    inner = model.model
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in inner.diffusion_model.modules()]
    options = repr({key: value for key, value in model.model_options.items()})
    return options, repr(model.wrappers), repr(model.callbacks), list(model.object_patches), hooks, sorted(vars(inner))


@kinds
def test_nothing_that_was_given_is_changed(kind: str) -> None:
    scene = Scene(kind, dtype=torch.float32)
    known, mask, before = scene.known.clone(), scene.mask.clone(), copy.deepcopy(described(scene.patcher))
    plain = scene.host(scene.patcher)
    model = scene.patched()
    patched = copy.deepcopy(described(model))
    assert model is not scene.patcher and model.is_clone(scene.patcher)
    first = scene.host(model)
    assert torch.equal(scene.host(model), first)
    assert torch.equal(scene.host(model, "euler_ancestral"), scene.host(model, "euler_ancestral"))
    assert torch.equal(scene.known, known) and torch.equal(scene.mask, mask)
    assert described(scene.patcher) == before and described(model) == patched
    assert torch.equal(scene.host(scene.patcher), plain)


def test_other_runs_between_do_not_matter() -> None:
    """The size, the sampler and the schedule of a run are that run's own."""
    scene, other = Scene("x4", dtype=torch.float32), Scene("x4", batch=1, dtype=torch.float32)
    model = scene.patched()
    first = scene.host(model)
    scene.host(model, "dpmpp_2m", scene.sigmas("karras", 3))
    scene.host(model, "euler_ancestral", scene.sigmas("simple", 6))
    other.host(model)
    assert torch.equal(scene.host(model), first)


def test_an_exception_leaves_nothing_behind() -> None:
    scene = Scene("x4", dtype=torch.float32)
    model = scene.patched()
    plain, patched = scene.host(scene.patcher), scene.host(model)
    calls = []

    def fail(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of luck")
        return executor(*args, **kwargs)

    failing = model.clone()
    failing.add_wrapper_with_key("diffusion_model", "test", fail)
    before = copy.deepcopy([described(patcher) for patcher in (scene.patcher, model, failing)])
    with pytest.raises(RuntimeError, match="out of luck"):
        scene.host(failing)
    assert len(calls) == 4
    assert [described(patcher) for patcher in (scene.patcher, model, failing)] == before
    assert torch.equal(scene.host(scene.patcher), plain)
    assert torch.equal(scene.host(model), patched)


@kinds
@pytest.mark.parametrize("known_first", [True, False])
def test_next_to_another_packs_post_cfg_function(kind: str, known_first: bool) -> None:
    """It sees and changes the model's own prediction, whose noise goes with it; the blend comes after it."""
    scene = Scene(kind)
    sigmas = scene.sigmas()
    seen = []

    def shrink(arguments: dict[str, Any]) -> torch.Tensor:
        seen.append([arguments[name].double() for name in ("input", "sigma", "denoised")])
        return arguments["denoised"] * 0.8

    model = scene.patched() if known_first else scene.patcher.clone()
    model.set_model_sampler_post_cfg_function(shrink)
    if not known_first:
        model = scene.patched(model)

    alphas = {nearest_timestep(float(s), scene.model.model_sampling.sigmas): alpha_bar(float(s)) for s in sigmas[:-1]}

    def shrunk(x: torch.Tensor, timestep: int, conditional: bool) -> torch.Tensor:
        """The eps that goes with 0.8 X0, CFG and all."""
        alpha = alphas[timestep]
        cond, uncond = scene.unet(x, timestep, True), scene.unet(x, timestep, False)
        output = uncond + CFG * (cond - uncond)
        if kind == "x4":
            x0 = alpha**0.5 * x - (1.0 - alpha) ** 0.5 * output
        else:
            x0 = (x - (1.0 - alpha) ** 0.5 * output) / alpha**0.5
        return (x - alpha**0.5 * 0.8 * x0) / (1.0 - alpha) ** 0.5

    literal = scene.literal(sigmas, unet=shrunk, cfg=1.0, v_prediction=False)
    previews = Previews()
    assert_same(scene.host(model, sigmas=sigmas, callback=previews), literal.x0, masked(scene))
    for preview, (x, sigma, prediction), step in zip(previews.x0, seen, literal.steps, strict=True):
        assert_same(preview, step.x0)
        # From the host's own latent: the float32 rounding of all steps before would grow with CFG and sigma.
        alpha, timestep = (
            alpha_bar(float(sigma[0])),
            nearest_timestep(float(sigma[0]), scene.model.model_sampling.sigmas),
        )
        x = alpha**0.5 * x
        assert_same(x, step.x)
        assert_same(0.8 * prediction, (x - (1.0 - alpha) ** 0.5 * shrunk(x, timestep, True)) / alpha**0.5)


@kinds
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_next_to_a_noise_mask(kind: str, sampler: str) -> None:
    """Where the latent's own mask is 0 its latent comes out, and the model sees it noised; elsewhere all is as ever."""
    scene = Scene(kind)
    scene.latent = (randn(*scene.shape, seed=6) / scene.scale).float()
    sampled = torch.ones(2, 1, *scene.size)
    sampled[0, :, 2:5, 3:] = 0.0
    sampled[1, :, 6:, :4] = 0.0
    sigmas = scene.sigmas("simple", 6)[1:]
    latent = scene.latent.double() * scene.scale
    previews = Previews()
    ours = scene.host(scene.patched(), sampler, sigmas, callback=previews, noise_mask=sampled)
    known = torch.where(sampled > 0, scene.known.double() * scene.scale, latent)
    mask = sampled * area_mean(scene.mask, scene.size)
    if sampler != "euler":
        where = (mask == 0).expand(scene.shape)
        assert_same(ours[where], known[where])
        return

    alphas = {nearest_timestep(float(s), scene.model.model_sampling.sigmas): alpha_bar(float(s)) for s in sigmas[:-1]}

    def as_the_host_shows_it(x: torch.Tensor, timestep: int, conditional: bool) -> torch.Tensor:
        alpha = alphas[timestep]
        noised = alpha**0.5 * latent + (1.0 - alpha) ** 0.5 * scene.noise
        return scene.unet(torch.where(sampled > 0, x, noised), timestep, conditional)

    literal = scene.literal(sigmas, mask=mask, known=known, unet=as_the_host_shows_it)
    assert_same(ours, literal.x0, mask == 0)
    for preview, step in zip(previews.x0, literal.steps, strict=True):
        assert_same(preview, step.x0, mask == 0)


@pytest.mark.parametrize("known_first", [True, False])
def test_next_to_rasg(known_first: bool) -> None:
    """RASG turns euler into its stochastic form; with next to nothing of its gradient that is eq. 3 with random noise."""
    scene = Scene("sd15")
    rasg = RASG(strength=1e-9, eta=0.5, mask=scene.mask)
    model = with_method(scene.patched(), rasg) if known_first else scene.patched(with_method(scene.patcher, rasg))
    literal = scene.literal(eta=0.5, noises=scene.default_noises(5), parts=("x0", "steps.x0"))
    previews = Previews()
    assert_same(scene.host(model, callback=previews), literal.x0, masked(scene), ROUNDING)
    for preview, step in zip(previews.x0, literal.steps, strict=True):
        assert_same(preview, step.x0, tolerance=ROUNDING)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_last_of_several_wins(sampler: str) -> None:
    scene = Scene("x4", dtype=torch.float32)
    other = scene.patched(latent=scene.known.flip(0), mask=1.0 - scene.mask)
    assert torch.equal(scene.host(scene.patched(other), sampler), scene.host(scene.patched(), sampler))
    assert torch.equal(scene.host(scene.patched(other, strength=0.0), sampler), plain_of("x4", sampler))


def test_short_of_memory_the_host_runs_the_halves_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("x4")
    model = scene.patched()
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    assert_same(scene.host(model), literal_of("x4").x0)
