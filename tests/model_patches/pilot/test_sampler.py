"""PILOT through the host's real sampling, against the literal form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.literal_pilot import PilotSettings, literal_pilot
from truefill_testing.oracle import kept
from truefill_testing.pilot_scene import CALM, HOLE, Spied, sampler, scene_of
from truefill_testing.pilot_scene import one_thread_and_no_leftovers as one_thread_and_no_leftovers
from truefill_testing.pilot_scene import spied as spied
from truefill_testing.scene import Scene, boxes, exact_unet, relative_error

import comfy.samplers  # isort: skip

sampling_run = pack_module("model_patches.core.sampling_run")
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary


def literal(scene: Scene, sigmas: torch.Tensor, settings: PilotSettings, **options: Any) -> Any:
    """The latent and the iterations of a `PilotRun`: the kept ones if there are any."""
    of_iterations = ("step", "x", "background", "centralisation", "gradient")
    return kept(
        ("latent", *(f"iterations.{name}" for name in of_iterations)),
        literal_pilot,
        exact_unet(scene.family, False),
        scene.model.model_sampling.sigmas,
        sigmas,
        scene.noise,
        scene.latent * scene.scale,
        scene.prompt(scene.positive, words_alone=True),
        scene.prompt(scene.negative),
        scene.CFG,
        (scene.hole > 0.5).double(),
        settings,
        v_prediction=scene.v_prediction,
        **options,
    )


def literal_settings(**settings: Any) -> PilotSettings:
    names = {"learning_rate": "lr", "first_learning_rate": "lr_warmup", "coefficient": "coef"}
    given = {names.get(name, name): value for name, value in {**CALM, **settings}.items()}
    return PilotSettings(**{**given, "boundary": given.get("boundary", 1.0) or None})


def each_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of any number, relative to that number."""
    return float(((found.double() - expected).abs() / expected.abs()).max())


@pytest.mark.parametrize(
    ("family", "v_prediction"), [("sd15", False), ("sd15", True), ("sd2", False), ("sd2", True), ("sdxl", False)]
)
def test_losses_gradients_and_trajectory(family: str, v_prediction: bool, spied: Spied) -> None:
    scene = scene_of(family, v_prediction)
    sigmas = scene.sigmas("simple", 5)
    settings = {"interval": 2, "iterations": 2}
    ours = scene.host(sigmas, sampler=sampler(**settings))
    expected = literal(scene, sigmas, literal_settings(**settings))
    assert len(spied.gradients) == len(expected.iterations) == 6
    for number, step in enumerate(expected.iterations):
        factor = (1.0 + float(sigmas[int(step.step)]) ** 2) ** 0.5
        # The first is computed at the same place; the others where the trajectory has led.
        tolerance = 1e-5 if number == 0 else 1e-3
        assert relative_error(spied.x[number], step.x) < tolerance
        assert each_error(spied.losses[number], step.background) < tolerance
        assert float((spied.centralisation[number] - step.centralisation).abs().max()) < tolerance
        assert relative_error(spied.gradients[number] * factor, step.gradient) < tolerance
    assert relative_error(ours, expected.latent) < 1e-3


@pytest.mark.quick
def test_float32_follows(spied: Spied) -> None:
    """Two optimised steps of two iterations each, with gradients of both losses that are about equally large."""
    scene = scene_of(dtype=torch.float32)
    sigmas = scene.sigmas("simple", 4)[1:4]
    settings = {"interval": 1, "iterations": 2, "coefficient": 1e6}
    ours = scene.host(sigmas, sampler=sampler(**settings))
    expected = literal(scene, sigmas, literal_settings(**settings))
    assert len(spied.gradients) == len(expected.iterations) == 4
    for number, step in enumerate(expected.iterations):
        factor = (1.0 + float(sigmas[int(step.step)]) ** 2) ** 0.5
        assert relative_error(spied.x[number], step.x) < 5e-5
        assert each_error(spied.losses[number], step.background) < 5e-6
        assert float((spied.centralisation[number] - step.centralisation).abs().max()) < 1e-6
        assert relative_error(spied.gradients[number] * factor, step.gradient) < 2e-4
    assert relative_error(ours, expected.latent) < 1e-4


def test_semantic_centralisation_counts(spied: Spied) -> None:
    """With a coefficient at which the background's gradient is nothing beside it."""
    scene = scene_of()
    sigmas = scene.sigmas("simple", 2)
    settings = {"iterations": 1, "interval": 1, "coefficient": 1e9, "learning_rate": 0.0, "first_learning_rate": 0.0}
    scene.host(sigmas, sampler=sampler(**settings))
    expected = literal(scene, sigmas, literal_settings(**settings))
    for number, step in enumerate(expected.iterations[:1]):
        factor = (1.0 + float(sigmas[int(step.step)]) ** 2) ** 0.5
        assert each_error(spied.centralisation[number], step.centralisation) < 1e-5
        assert relative_error(spied.gradients[number] * factor, step.gradient) < 1e-5


def test_the_optimisers_step_in_both_coordinates(spied: Spied) -> None:
    """The host's latent is the paper's times sqrt(1 + s^2), and so is the step; the momentum is the paper's."""
    scene = scene_of()
    sigmas = scene.sigmas("simple", 3)
    after: list[torch.Tensor] = []
    chosen = sampler(interval=1, iterations=3, learning_rate=3e-3, first_learning_rate=2e-3, momentum=0.6)
    scene.host(sigmas, sampler=chosen, callback=lambda step, x0, x, total: after.append(x.clone()))
    momentum = torch.zeros_like(spied.x[0])
    for number, (x, gradient) in enumerate(zip(spied.x, spied.gradients, strict=True)):
        step, iteration = divmod(number, 3)
        sigma = float(sigmas[step])
        to_paper = (1.0 + sigma**2) ** -0.5
        timestep = float(scene.model.model_sampling.timestep(sigmas[step]))
        rate = 2e-3 if step == 0 else 3e-3 * 1.002 ** (1000.0 - timestep)
        # dL/dz = dL/dx dx/dz
        momentum = (0.6 * momentum if iteration else 0.0) - rate * gradient.double() / to_paper
        z = x.double() * to_paper + momentum
        moved = after[4 * step + iteration].double() * to_paper
        assert relative_error(moved - x.double() * to_paper, z - x.double() * to_paper) < 1e-3


def test_a_part_of_the_schedule_is_blended() -> None:
    scene = scene_of()
    sigmas = scene.sigmas("simple", 6)
    noise: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        noise.append(torch.randn(scene.noise.shape, generator=generator))
    timesteps = [float(scene.model.model_sampling.timestep(sigma)) for sigma in sigmas[:-1]]
    for gamma in (0.0, 0.5):
        settings = {"interval": 1, "iterations": 1, "gamma": gamma}
        first = next(index for index, timestep in enumerate(timesteps) if timestep < 1000 - 1000 * gamma)
        assert first == (0 if gamma == 0 else 3)
        # The blend draws its first noise at the first step that it has.
        of_steps = torch.stack([noise[max(step - first, 0)] for step in range(6)])
        expected = literal(scene, sigmas, literal_settings(**settings), blend_noise=of_steps)
        assert relative_error(scene.host(sigmas, sampler=sampler(**settings)), expected.latent) < 1e-3


def test_gamma_0_without_the_boundary_is_blended_sampling() -> None:
    scene = scene_of()
    sigmas = scene.sigmas("simple", 4)
    ours = scene.host(sigmas, sampler=sampler(gamma=0.0, boundary=0.0))
    known, generator = 1.0 - scene.hole, torch.Generator().manual_seed(1)

    def blended(model, x, sigmas, extra_args=None, callback=None, disable=None):
        # Blended latent diffusion, with DDIM's steps, from pure noise.
        arguments = {name: value for name, value in extra_args.items() if name != "denoise_mask"}
        latent = scene.latent * scene.scale
        x = x - latent
        for sigma, following in itertools.pairwise(sigmas):
            noise = torch.randn(x.shape, generator=generator)
            x = scene.hole * x + known * (latent + sigma * noise)
            denoised = model.inner_model(x, sigma.expand(len(x)), **arguments)
            x = denoised + (x - denoised) * (following / sigma)
        return x

    expected = scene.host(sigmas, sampler=comfy.samplers.KSAMPLER(blended))
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(ours, scene.host(sigmas, sampler=sampler(gamma=0.0))) > 1e-3


def test_a_long_interval_is_plain_sampling_with_the_boundary() -> None:
    scene = Scene("sd15", False, False, hole=HOLE)
    scene.latent = torch.zeros_like(scene.latent)
    sigmas = scene.sigmas("simple", 4)
    for strength in (1.0, 0.0):
        ours = scene.host(sigmas, sampler=sampler(interval=5, boundary=strength, mask=HOLE))
        model = sampling_run.with_method(scene.patcher, SemanticBoundary(strength=strength, mask=HOLE))
        assert relative_error(ours, scene.host(sigmas, model)) < 1e-5
    assert relative_error(ours, scene.host(sigmas, sampler=sampler(interval=4, mask=HOLE))) > 1e-4


def test_each_picture_of_a_batch_is_its_own() -> None:
    sigmas = scene_of().sigmas("simple", 3)
    settings = {"interval": 1, "iterations": 2, "learning_rate": 1e-3, "first_learning_rate": 1e-3}
    together = scene_of().host(sigmas, sampler=sampler(**settings))
    for picture in range(2):
        alone = scene_of(hole=HOLE[picture : picture + 1])
        whole = scene_of()
        alone.noise, alone.latent = whole.noise[picture : picture + 1], whole.latent[picture : picture + 1]
        assert relative_error(alone.host(sigmas, sampler=sampler(**settings)), together[picture : picture + 1]) < 1e-4


@pytest.mark.parametrize("size", [(16, 16), (9, 21)], ids=str)
def test_any_size_and_a_soft_mask(size: tuple[int, int]) -> None:
    """Noise of up to 2/255 is known, the rest is hole, and so are the cells of which half is hole (imaging/masks.py)."""
    hole = boxes(size, (slice(2, 7), slice(3, 9)))
    soft = hole.clamp(min=2 / 255)
    soft[:, :, 1] = torch.maximum(soft[:, :, 1], 0.45 * hole[:, :, 2])
    soft[:, :, 6] *= torch.where(hole[:, :, 6] > 0, 0.5, 1.0)
    sigmas = scene_of().sigmas("simple", 2)
    results = [
        scene_of(hole=mask).host(sigmas, sampler=sampler(interval=1, iterations=2))
        for mask in (hole, soft, 0.02 * hole)
    ]
    assert results[0].isfinite().all() and results[0].shape[-2:] == size
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def test_a_picture_without_a_hole_comes_along_in_a_batch(spied: Spied) -> None:
    scene = scene_of(hole=torch.cat([HOLE[:1], torch.zeros(1, 1, 16, 13)]))
    sigmas = scene.sigmas("simple", 2)
    ours = scene.host(sigmas, sampler=sampler(interval=1, iterations=2))
    expected = literal(scene, sigmas, literal_settings(interval=1, iterations=2))
    assert torch.allclose(spied.centralisation[0].double(), expected.iterations[0].centralisation, rtol=1e-5, atol=0.0)
    assert float(spied.centralisation[0][1]) == 0.0
    assert relative_error(ours, expected.latent) < 1e-3
