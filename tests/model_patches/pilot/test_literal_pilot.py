"""The literal PILOT, checked against differences of its losses, numbers by hand and the literal sampling loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from truefill_testing.literal_boundary import Boundary
from truefill_testing.literal_pilot import (
    PilotRun,
    PilotSettings,
    Predictor,
    background_preservation,
    learning_rate,
    literal_pilot,
    loss_weights,
    losses,
    semantic_centralisation,
)
from truefill_testing.literal_sampling import alpha_bar, literal_sample, nearest_timestep
from truefill_testing.literal_unet import CrossScores, literal_unet
from truefill_testing.scene import Scene, boxes, exact_unet, forget_models, randn, relative_error

# Four levels: 16x13, 8x7, 4x4, 2x2. Both holes leave known pixels and pixels of the hole on the first three.
HOLE = boxes((16, 13), (slice(2, 12), slice(3, 13)), (slice(4, 16), slice(0, 9)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_no_leftovers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(threads)
    forget_models()


def scene_of(hole: torch.Tensor = HOLE, v_prediction: bool = False) -> Scene:
    return Scene("sd15", False, True, hole=hole, v_prediction=v_prediction)


def arguments(scene: Scene) -> dict[str, Any]:
    """What `literal_pilot` and `literal_sample` have in common."""
    return {
        "unet": exact_unet("sd15", False),
        "table": scene.model.model_sampling.sigmas,
        "noise": scene.noise,
        "latent": scene.latent * scene.scale,
        "cfg": scene.CFG,
        "v_prediction": scene.v_prediction,
    }


def pilot(scene: Scene, sigmas: torch.Tensor, settings: PilotSettings, **options: Any) -> PilotRun:
    return literal_pilot(
        sigmas=sigmas,
        positive=scene.prompt(scene.positive),
        negative=scene.prompt(scene.negative),
        hole=scene.hole,
        settings=settings,
        **{**arguments(scene), **options},
    )


def layer_of(probabilities: torch.Tensor, grid: tuple[int, int]) -> CrossScores:
    """A recorded layer of one picture whose softmax is [heads, N, L]; the scores have an offset that drops out."""
    return CrossScores(("input", 4, 0), grid, probabilities[None].log() + 2.0)


class TestLosses:
    HOLE = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    PROBABILITIES = torch.tensor(
        [
            [[0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [0.5, 0.1, 0.4], [0.4, 0.4, 0.2]],
            [[0.3, 0.3, 0.4], [0.4, 0.5, 0.1], [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]],
        ],
        dtype=torch.float64,
    )

    def test_background_by_hand(self) -> None:
        source = torch.zeros(4, 2, 2, dtype=torch.float64)
        x0 = torch.arange(4.0, dtype=torch.float64).reshape(1, 2, 2).expand(4, -1, -1)
        assert background_preservation(source, x0, self.HOLE).item() == 2.0**2 + 3.0**2

    def test_centralisation_by_hand(self) -> None:
        layer = layer_of(self.PROBABILITIES, (2, 2))
        tokens = torch.tensor([False, True, True])
        known, hole = (0.5 + 0.6 + 0.3 + 0.8) / 4, (0.9 + 0.8 + 0.7 + 0.6) / 4
        assert semantic_centralisation([layer], 0, tokens, self.HOLE).item() == pytest.approx(known - hole)
        tokens[2] = False
        known, hole = (0.1 + 0.4 + 0.2 + 0.3) / 4, (0.5 + 0.2 + 0.3 + 0.5) / 4
        assert semantic_centralisation([layer], 0, tokens, self.HOLE).item() == pytest.approx(known - hole)

    def test_a_layer_that_is_all_known_counts_0_in_the_mean(self) -> None:
        layer, tokens = layer_of(self.PROBABILITIES, (2, 2)), torch.tensor([False, True, True])
        alone = semantic_centralisation([layer], 0, tokens, self.HOLE)
        one_cell = layer_of(self.PROBABILITIES[:, :1], (1, 1))
        assert semantic_centralisation([layer, one_cell], 0, tokens, self.HOLE).item() == pytest.approx(alone / 2)
        for hole in (torch.zeros(2, 2), torch.ones(2, 2)):
            assert semantic_centralisation([layer, one_cell], 0, tokens, hole.double()).item() == 0.0

    def test_centralisation_falls_when_the_prompt_moves_into_the_hole(self) -> None:
        tokens = torch.tensor([False, True, False])
        before = semantic_centralisation([layer_of(self.PROBABILITIES, (2, 2))], 0, tokens, self.HOLE)
        moved = self.PROBABILITIES.clone()
        moved[:, :2, 1] += 0.05
        moved[:, :2, 0] -= 0.05
        moved[:, 2:, 1] -= 0.05
        moved[:, 2:, 0] += 0.05
        after = semantic_centralisation([layer_of(moved, (2, 2))], 0, tokens, self.HOLE)
        assert after.item() == pytest.approx(before.item() - 0.1)

    def test_weights_and_rates_by_hand(self) -> None:
        hole = torch.ones(2, 1, 64, 64)
        hole.view(2, -1)[0, :1499] = 0.0
        settings = PilotSettings()
        for timestep, expected in ((999, 150.0), (300, 15.0), (299, 15.0), (0, 15.0), (533, 60.0)):
            assert loss_weights(timestep, hole, settings).tolist() == pytest.approx([expected, 0.0])
        assert learning_rate(999, True, settings) == 0.007
        assert learning_rate(990, False, settings) == pytest.approx(0.025 * 1.0201809)

    def test_the_selected_layers_are_those_below_the_latents_grid(self) -> None:
        scene, prompt = scene_of(), scene_of().prompt(scene_of().positive)
        predict = Predictor(exact_unet("sd15", False), None)
        _, recorded = predict(randn(2, 4, 16, 13, seed=1), 500, 0.3, prompt)
        assert [layer.place for layer in recorded] == (
            [("input", i, 0) for i in (4, 5, 7, 8)] + [("middle", 0, 0)] + [("output", i, 0) for i in range(3, 9)]
        )
        assert [layer.grid for layer in recorded[:5:2]] == [(8, 7), (4, 4), (2, 2)]
        _, by_default = literal_unet(
            exact_unet("sd15", False),
            scene.noise.double(),
            torch.tensor([500, 500]),
            prompt.context.double().expand(2, -1, -1),
            record=True,
        )
        assert [layer.grid for layer in by_default] == [(4, 4)] * 5


# A coefficient so large that the semantic loss is most of the gradient; the usual one; and none.
@pytest.mark.parametrize(
    ("coef", "strength", "v_prediction"),
    [(0.0, None, False), (150.0, 1.0, True), (1e10, 1.0, False), (1e10, None, True)],
)
def test_the_gradient_is_the_slope_of_the_losses(coef: float, strength: float | None, v_prediction: bool) -> None:
    scene = scene_of(v_prediction=v_prediction)
    sigmas = scene.sigmas("simple", 4)[1:3]
    settings = PilotSettings(interval=1, iterations=1, coef=coef, boundary=strength)
    (iteration,) = pilot(scene, sigmas, settings).iterations
    abar = alpha_bar(float(sigmas[0]))
    z = iteration.x * math.sqrt(abar)
    predict = Predictor(
        exact_unet("sd15", False), None if strength is None else Boundary(scene.hole, strength), v_prediction
    )
    prompt = scene.prompt(scene.positive)
    source = (scene.latent * scene.scale).double()

    def loss(z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            background, centralisation = losses(
                predict, z, iteration.timestep, abar, prompt, source, scene.hole.double()
            )
        return background + loss_weights(iteration.timestep, scene.hole, settings) * centralisation

    at_z = loss(z)
    weights = loss_weights(iteration.timestep, scene.hole, settings)
    assert torch.allclose(at_z, iteration.background + weights * iteration.centralisation, rtol=1e-12, atol=0)
    if coef > 1e3:
        assert (weights * iteration.centralisation.abs() > 100 * iteration.background).all()
    for seed in range(2):
        direction, step = randn(*z.shape, seed=seed), 1e-5
        slopes = (loss(z + step * direction) - loss(z - step * direction)) / (2 * step)
        expected = (iteration.gradient * direction).sum(dim=(1, 2, 3))
        assert slopes.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_optimiser_by_hand() -> None:
    scene = scene_of()
    sigmas = scene.sigmas("simple", 3)
    run = pilot(scene, sigmas, PilotSettings(interval=2, iterations=3))
    assert [(step.step, step.timestep) for step in run.iterations] == [(0, 999)] * 3 + [(2, 333)] * 3
    for index, rate in ((0, 0.007), (2, 0.025 * 1.002**667)):
        first, second, third = (step for step in run.iterations if step.step == index)
        scale = math.sqrt(1 + float(sigmas[index]) ** 2)
        g1, g2, g3 = (scale * rate * step.gradient for step in (first, second, third))
        assert torch.allclose(second.x, first.x - g1)
        assert torch.allclose(third.x, second.x - 0.7 * g1 - g2)
        assert torch.allclose(run.steps[index], third.x - 0.49 * g1 - 0.7 * g2 - g3)
        assert (third.background < first.background).all()
    # No known latent takes part in the start at the largest sigma.
    assert torch.allclose(run.iterations[0].x, scene.noise.double() * math.sqrt(1 + float(sigmas[0]) ** 2))


@pytest.mark.parametrize(("strength", "v_prediction"), [(None, False), (1.0, True)])
def test_without_optimisation_it_is_the_literal_loop(strength: float | None, v_prediction: bool) -> None:
    scene = scene_of(v_prediction=v_prediction)
    settings = PilotSettings(interval=4, boundary=strength)
    latent = scene.latent * scene.scale
    for sigmas, start_latent in ((scene.sigmas("simple", 3), latent), (scene.sigmas("simple", 4)[1:], None)):
        run = pilot(scene, sigmas, settings, start_latent=start_latent)
        expected = literal_sample(
            sigmas=sigmas,
            positive=[scene.prompt(scene.positive)],
            negative=[scene.prompt(scene.negative)],
            hole=scene.hole,
            boundary=strength,
            **arguments(scene),
        )
        assert not run.iterations
        assert relative_error(run.latent, expected.latent) < 1e-12
        for x, step in zip(run.steps, expected.steps, strict=True):
            assert relative_error(x, step.x) < 1e-12


def test_the_blend_stage() -> None:
    scene = scene_of()
    sigmas = scene.sigmas("simple", 4)
    table = scene.model.model_sampling.sigmas
    assert [nearest_timestep(float(sigma), table) for sigma in sigmas[:-1]] == [999, 749, 499, 249]
    noises = randn(4, 2, 4, *scene.size, seed=9)
    settings = {"interval": 1, "iterations": 1}
    run = pilot(scene, sigmas, PilotSettings(gamma=0.501, **settings), blend_noise=noises)
    assert [step.step for step in run.iterations] == [0, 1, 2]
    run = pilot(scene, sigmas, PilotSettings(gamma=0.5, **settings), blend_noise=noises)
    assert [step.step for step in run.iterations] == [0, 1]
    known = scene.hole.expand(-1, 4, -1, -1) == 0.0
    source = (scene.latent * scene.scale).double()
    for index in (2, 3):
        noised = source + float(sigmas[index]) * noises[index]
        assert relative_error(run.steps[index][known], noised[known]) < 1e-12
        assert relative_error(run.steps[index][~known], noised[~known]) > 0.1


def test_no_hole_all_hole_and_a_picture_of_its_own() -> None:
    hole = torch.cat([HOLE[:1], torch.zeros(1, 1, 16, 13), torch.ones(1, 1, 16, 13)])
    scene = scene_of(hole)
    sigmas = scene.sigmas("simple", 2)
    settings = PilotSettings(interval=1, iterations=2)
    run = pilot(scene, sigmas, settings)
    for iteration in run.iterations:
        assert iteration.centralisation[0] != 0.0
        assert iteration.centralisation[1:].tolist() == [0.0, 0.0]
        assert (iteration.background[:2] > 0.0).all()
        assert iteration.background[2] == 0.0
        assert not iteration.gradient[2].any()
    without = pilot(scene, sigmas, PilotSettings(interval=1, iterations=2, boundary=None))
    assert torch.equal(run.latent[1:], without.latent[1:])
    assert relative_error(run.latent[:1], without.latent[:1]) > 1e-3

    latent = (scene.latent * scene.scale)[:1]
    alone = pilot(scene_of(HOLE[:1]), sigmas, settings, noise=scene.noise[:1], latent=latent)
    assert relative_error(alone.latent, run.latent[:1]) < 1e-9


def test_a_soft_hole_is_refused() -> None:
    scene = scene_of(0.5 * HOLE)
    with pytest.raises(ValueError, match="binary"):
        pilot(scene, scene.sigmas("simple", 2), PilotSettings())
