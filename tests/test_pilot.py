"""PILOT through the host's real sampling, against the literal form, and next to what else is on MODEL and CONDITIONING."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from truefill_testing.host import pack_module
from truefill_testing.literal_pilot import PilotRun, PilotSettings, literal_pilot
from truefill_testing.scene import Scene, boxes, exact_unet, forget_models, relative_error

import comfy.model_management  # isort: skip
import comfy.samplers  # isort: skip

pilot = pack_module("model_patches.pilot")
guidance = pack_module("model_patches.guidance")
PAIntA = pack_module("model_patches.painta").PAIntA
RASG = pack_module("model_patches.rasg").RASG
SemanticBoundary = pack_module("model_patches.boundary").SemanticBoundary
PILOT = pilot.PILOT

# Both leave known pixels and pixels of the hole on more than one level.
HOLE = boxes((16, 13), (slice(2, 12), slice(3, 13)), (slice(4, 16), slice(0, 9)))
TWO_AT_EVERY_SECOND = {"interval": 2, "iterations": 2}
TWO_AT_EACH = {"interval": 1, "iterations": 2}
# Random networks predict far away pictures: the released rates would throw the latent out of any sensible range.
CALM = {"learning_rate": 1e-4, "first_learning_rate": 5e-5}


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_no_leftovers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget_models()


def scene_of(family: str = "sd15", v_prediction: bool = False, **options: Any) -> Scene:
    return Scene(family, False, True, v_prediction=v_prediction, **{"hole": HOLE, **options})


def sampler(**settings: Any) -> Any:
    return pilot.pilot_sampler(PILOT(**{**CALM, **settings}), lambda text: None)


@dataclass
class Spied:
    """What the optimiser asked for and got, in the host's coordinates."""

    x: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    centralisation: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    found = Spied()
    gradient, background = pilot._Job._gradient, pilot.background_loss
    centralisation = pilot.Centralisation.loss

    def spy_gradient(self, x, rows, timestep):
        denoised, result = gradient(self, x, rows, timestep)
        found.x.append(x.clone())
        found.gradients.append(result.clone())
        return denoised, result

    def spy(of: Callable[..., torch.Tensor], into: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noting(*arguments: Any) -> torch.Tensor:
            result = of(*arguments)
            into.append(result.detach().clone())
            return result

        return noting

    monkeypatch.setattr(pilot._Job, "_gradient", spy_gradient)
    monkeypatch.setattr(pilot, "background_loss", spy(background, found.losses))
    monkeypatch.setattr(pilot.Centralisation, "loss", spy(centralisation, found.centralisation))
    return found


def literal(scene: Scene, sigmas: torch.Tensor, settings: PilotSettings, **options: Any) -> PilotRun:
    return literal_pilot(
        exact_unet(scene.family, False),
        scene.model.model_sampling.sigmas,
        sigmas,
        scene.noise,
        scene.latent * scene.scale,
        scene.prompt(scene.positive),
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
        factor = (1.0 + float(sigmas[step.step]) ** 2) ** 0.5
        # The first is computed at the same place; the others where the trajectory has led.
        tolerance = 1e-5 if number == 0 else 1e-3
        assert relative_error(spied.x[number], step.x) < tolerance
        assert each_error(spied.losses[number], step.background) < tolerance
        assert float((spied.centralisation[number] - step.centralisation).abs().max()) < tolerance
        assert relative_error(spied.gradients[number] * factor, step.gradient) < tolerance
    assert relative_error(ours, expected.latent) < 1e-3


def test_semantic_centralisation_counts(spied: Spied) -> None:
    """With a coefficient at which the background's gradient is nothing beside it."""
    scene = scene_of()
    sigmas = scene.sigmas("simple", 2)
    settings = {"iterations": 1, "interval": 1, "coefficient": 1e9, "learning_rate": 0.0, "first_learning_rate": 0.0}
    scene.host(sigmas, sampler=sampler(**settings))
    expected = literal(scene, sigmas, literal_settings(**settings))
    for number, step in enumerate(expected.iterations[:1]):
        factor = (1.0 + float(sigmas[step.step]) ** 2) ** 0.5
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
        expected = literal(
            scene, sigmas, literal_settings(**settings), blend_noise=lambda step, first=first: noise[step - first]
        )
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
        model = guidance.with_boundary(scene.patcher, SemanticBoundary(strength, mask=HOLE))
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
    hole = boxes(size, (slice(2, 7), slice(3, 9)))
    soft = hole.clone()
    soft[:, :, 1] = 0.5 * hole[:, :, 2]
    soft[:, :, 6] *= 0.6
    sigmas = scene_of().sigmas("simple", 2)
    results = [scene_of(hole=mask).host(sigmas, sampler=sampler(interval=1, iterations=2)) for mask in (hole, soft)]
    assert results[0].isfinite().all() and results[0].shape[-2:] == size
    assert torch.equal(*results)


def test_a_picture_without_a_hole_comes_along_in_a_batch(spied: Spied) -> None:
    scene = scene_of(hole=torch.cat([HOLE[:1], torch.zeros(1, 1, 16, 13)]))
    sigmas = scene.sigmas("simple", 2)
    ours = scene.host(sigmas, sampler=sampler(interval=1, iterations=2))
    expected = literal(scene, sigmas, literal_settings(interval=1, iterations=2))
    assert torch.allclose(spied.centralisation[0].double(), expected.iterations[0].centralisation, rtol=1e-5, atol=0.0)
    assert float(spied.centralisation[0][1]) == 0.0
    assert relative_error(ours, expected.latent) < 1e-3


class TestRuns:
    def test_every_pass_is_reported_and_forecast(self) -> None:
        scene, told, passes = scene_of(), [], []
        settings = PILOT(**{**CALM, "interval": 2, "iterations": 3, "gamma": 0.5})
        chosen = pilot.pilot_sampler(settings, told.append)
        sigmas = scene.sigmas("simple", 6)
        scene.host(sigmas, sampler=chosen, callback=lambda step, x0, x, total: passes.append((step, total)))
        # Steps 0 and 2 of the three before the middle.
        assert told == ["PILOT: 6 passes with a gradient (3 at 2 of 6 steps) and 6 guided steps."]
        assert passes == [(number, 12) for number in range(12)]

    def test_twice_is_the_same_and_another_seed_is_not(self) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 3)
        first, again = (scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND, gamma=0.6)) for _ in range(2))
        assert torch.equal(first, again)
        scene.noise = scene.noise.flip(0)
        assert relative_error(scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND, gamma=0.6)), first) > 1e-3

    @pytest.mark.parametrize("stop_at", [1, 2, 3])
    def test_an_interrupt_leaves_nothing_behind(self, stop_at: int) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        before, calls = scene.host(sigmas), itertools.count(1)
        expected = scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND))

        def interrupt(step, x0, x, total):
            if next(calls) == stop_at:
                comfy.model_management.interrupt_current_processing()

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND), callback=interrupt)
        assert next(calls) <= stop_at + 2, "it went on"
        assert torch.equal(scene.host(sigmas), before)
        assert torch.equal(scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND)), expected)
        assert not any(module.__dict__.get("forward") for module in scene.model.diffusion_model.modules())

    def test_weights_that_the_host_may_evict_are_not_differentiated_through(self) -> None:
        """Dynamic patchers are for GPUs; what counts here is which copy of the model is sampled."""
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        expected = scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND))
        asked = []

        class Dynamic(type(scene.patcher)):
            def is_dynamic(self):
                return True

            def clone(self, disable_dynamic=False, **keywords):
                asked.append(disable_dynamic)
                return super().clone(**keywords) if not disable_dynamic else scene.patcher.clone()

        model = scene.patcher.clone()
        model.__class__ = Dynamic
        assert torch.equal(scene.host(sigmas, model, sampler=sampler(**TWO_AT_EVERY_SECOND)), expected)
        assert asked == [True]


class TestBesideOthers:
    def test_a_controlnet_is_differentiated(self, spied: Spied) -> None:
        scene = scene_of()
        scene.add_controlnet()
        sigmas = scene.sigmas("simple", 1)
        with_control = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(with_control, scene_of().host(sigmas, sampler=sampler(**TWO_AT_EACH))) > 1e-4
        gradient, x = spied.gradients[0].double(), spied.x[0]
        weight = pilot.balance(999.0, 1.0 - HOLE, 150.0)

        def loss_at(where: torch.Tensor) -> float:
            """The loss of the first iteration, had it begun here."""
            spied.losses.clear()
            spied.centralisation.clear()
            scene.noise = (where / (1.0 + float(sigmas[0]) ** 2) ** 0.5).float()
            scene.host(sigmas, sampler=sampler(interval=1, iterations=1))
            return float((spied.losses[0] + weight * spied.centralisation[0]).double().sum())

        direction = torch.nn.functional.normalize(gradient.flatten(), dim=0).view_as(gradient)
        step = 0.02
        slope = (loss_at(x + step * direction) - loss_at(x - step * direction)) / (2 * step)
        assert abs(slope / float((gradient * direction).sum()) - 1) < 0.01

    def test_a_t2i_adapter_on_a_batch(self) -> None:
        """Its features are made for the rows of one call, and guided steps have twice those of the optimised passes."""
        import comfy.controlnet

        class Features(torch.nn.Module):
            unshuffle_amount = 8

            def __init__(self) -> None:
                super().__init__()
                self.conv = torch.nn.Conv2d(3, 32, 8, stride=8).requires_grad_(False)

            def forward(self, hint: torch.Tensor) -> dict[str, list[torch.Tensor | None]]:
                return {"input": [None, None, self.conv(hint)]}

        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        plain = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        torch.manual_seed(0)
        with torch.inference_mode():
            adapter = comfy.controlnet.T2IAdapter(Features(), 3, 8, "nearest-exact", torch.device("cpu"))
        hints = torch.rand(2, 3, 8 * 16, 8 * 13, generator=torch.Generator().manual_seed(5))
        for side in (scene.positive, scene.negative):
            side[0][1]["control"] = adapter.copy().set_cond_hint(hints, 1.0)
            side[0][1]["control_apply_to_uncond"] = False
        together = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(together, plain) > 1e-3
        for picture in range(2):
            alone = scene_of(hole=HOLE[picture : picture + 1])
            alone.noise, alone.latent = scene.noise[picture : picture + 1], scene.latent[picture : picture + 1]
            for side in (alone.positive, alone.negative):
                side[0][1]["control"] = adapter.copy().set_cond_hint(hints[picture : picture + 1], 1.0)
                side[0][1]["control_apply_to_uncond"] = False
            expected = alone.host(sigmas, sampler=sampler(**TWO_AT_EACH))
            assert relative_error(together[picture : picture + 1], expected) < 1e-4

    def test_an_image_prompt_of_another_pack(self, spied: Spied) -> None:
        """As IP-Adapter packs do it, with weights that they have loaded in inference mode."""
        from comfy.ldm.modules.attention import optimized_attention

        scene = scene_of()
        sigmas = scene.sigmas("simple", 1)
        place = ("output", 5, 0)
        cross = scene.model.diffusion_model.output_blocks[5][1].transformer_blocks[0].attn2
        with torch.inference_mode():
            generator = torch.Generator().manual_seed(3)
            tokens = torch.randn(1, 4, 24, generator=generator, dtype=torch.float64)
            to_k, to_v = (torch.nn.Linear(24, cross.to_k.out_features, bias=False).double() for _ in range(2))

        def with_image(q, k, v, extra_options):
            heads = extra_options["n_heads"]
            image = tokens.expand(len(q), -1, -1)
            return optimized_attention(q, k, v, heads) + optimized_attention(q, to_k(image), to_v(image), heads)

        scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        model = scene.patcher.clone()
        model.set_model_attn2_replace(with_image, *place)
        scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(spied.gradients[2], spied.gradients[0]) > 1e-3

    @pytest.mark.parametrize("first", ["painta", "boundary"])
    def test_painta_takes_part_in_any_order(self, first: str) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        model = guidance.with_painta(scene.patcher, PAIntA(end_percent=1.0))
        ours = scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(ours, scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))) > 1e-3
        if first == "painta":
            model = guidance.with_boundary(model, SemanticBoundary(mask=HOLE))
        else:
            model = guidance.with_boundary(scene.patcher, SemanticBoundary(mask=HOLE))
            model = guidance.with_painta(model, PAIntA(end_percent=1.0))
        assert torch.equal(scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH)), ours)

    def test_the_nodes_boundary_counts_if_there_is_one(self) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        model = guidance.with_boundary(scene.patcher, SemanticBoundary(0.4, mask=HOLE))
        results = [
            scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH, boundary=strength)) for strength in (1.0, 0.0)
        ]
        assert torch.equal(*results)
        assert torch.equal(results[0], scene.host(sigmas, sampler=sampler(**TWO_AT_EACH, boundary=0.4)))

    def test_packs_that_write_into_tensors_and_replace_attention(self) -> None:
        from comfy.ldm.modules.attention import optimized_attention

        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)

        def in_place(h, hsp, options):
            h *= 1.1
            return h, hsp

        def apart(h, hsp, options):
            return h * 1.1, hsp

        def replaced(q, k, v, extra_options):
            return 0.9 * optimized_attention(q, k, v, extra_options["n_heads"])

        results = []
        for patch in (in_place, apart):
            model = scene.patcher.clone()
            model.set_model_output_block_patch(patch)
            model.set_model_attn2_replace(replaced, "input", 1)
            results.append(scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH)))
        assert relative_error(*results) < 1e-4
        assert relative_error(results[0], scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))) > 1e-3

    def test_kernels_without_a_backward_pass_are_not_used_for_the_gradient(self, spied: Spied) -> None:
        from comfy.ldm.modules.attention import attention_pytorch

        scene = scene_of()
        sigmas = scene.sigmas("simple", 1)
        scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        model, calls = scene.patcher.clone(), []

        def fast(chosen, *args, **kwargs):
            calls.append(torch.is_grad_enabled())
            return attention_pytorch(*args, **kwargs).detach()

        model.model_options["transformer_options"]["optimized_attention_override"] = fast
        scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH))
        assert calls and not any(calls)
        assert relative_error(spied.gradients[2], spied.gradients[0]) < 1e-6

    def test_a_lora_takes_part(self) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        model = scene.patcher.clone()
        name = "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_q.weight"
        weight = scene.model.state_dict()[name]
        generator = torch.Generator().manual_seed(1)
        model.add_patches({name: ("diff", (0.5 * torch.randn(weight.shape, generator=generator),))})
        before = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH)), before) > 1e-4
        assert torch.equal(scene.host(sigmas, sampler=sampler(**TWO_AT_EACH)), before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_other_precisions(self, dtype: torch.dtype) -> None:
        scene = scene_of(dtype=dtype)
        sigmas = scene.sigmas("simple", 2)
        exact = scene_of().host(sigmas, sampler=sampler(**TWO_AT_EACH))
        ours = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        assert float((ours - exact).std() / exact.std()) < {torch.bfloat16: 0.2, torch.float32: 1e-4}[dtype]

    def test_several_prompts_areas_and_masks(self) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        ((context, options),) = scene.positive
        part = [context.flip(1), {**options, "mask": HOLE[:1, 0].roll(2, 1), "mask_strength": 1.0}]
        scene.positive = [[context, options], part, [context, {**options, "area": (10, 9, 2, 2), "strength": 0.5}]]
        assert scene.host(sigmas, sampler=sampler(**TWO_AT_EACH)).isfinite().all()


class TestMemory:
    """Less memory gives the same picture."""

    def run(self, scene: Scene, model: Any = None, **settings: Any) -> torch.Tensor:
        return scene.host(scene.sigmas("simple", 2), model, sampler=sampler(**TWO_AT_EACH, **settings))

    @pytest.mark.parametrize("beside", ["nothing", "painta", "controlnet", "a pack that writes"])
    def test_what_is_computed_again_is_the_same(self, beside: str) -> None:
        scene = scene_of(family="sdxl" if beside == "nothing" else "sd15")
        model = scene.patcher
        if beside == "painta":
            model = guidance.with_painta(model, PAIntA(end_percent=1.0))
        elif beside == "controlnet":
            scene.add_controlnet()
        elif beside == "a pack that writes":

            def in_place(h, hsp, options):
                h *= 1.1
                hsp += 0.1
                return h, hsp

            model = model.clone()
            model.set_model_output_block_patch(in_place)
        assert relative_error(self.run(scene, model, memory="recompute"), self.run(scene, model)) < 1e-6

    def test_less_is_kept(self) -> None:
        scene = scene_of()
        kept: dict[str, int] = {}
        for memory in ("record", "recompute"):
            largest = 0

            def count(tensor: torch.Tensor) -> torch.Tensor:
                nonlocal largest
                largest += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                self.run(scene, memory=memory)
            kept[memory] = largest
        assert kept["recompute"] < 0.25 * kept["record"]

    def test_auto_goes_by_the_hosts_free_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used = []
        recomputed = pilot.recomputed
        monkeypatch.setattr(pilot, "recomputed", lambda *arguments: used.append(1) or recomputed(*arguments))
        expected = self.run(scene_of())
        assert not used
        # Two pictures of 16x13 cells, two bytes short.
        needed = 2 * 16 * 13 * pilot.GRAPH_ELEMENTS["SD"] * 8
        monkeypatch.setattr(pilot, "get_free_memory", lambda device: needed - 2)
        assert relative_error(self.run(scene_of()), expected) < 1e-6 and len(used) == 4
        monkeypatch.setattr(pilot, "get_free_memory", lambda device: needed)
        self.run(scene_of())
        assert len(used) == 4

    def test_running_out_of_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = self.run(scene_of())
        gradient, recomputing = torch.autograd.grad, []

        def scarce(*arguments: Any, **keywords: Any) -> Any:
            if not recomputing:
                raise comfy.model_management.OOM_EXCEPTION
            return gradient(*arguments, **keywords)

        recomputed = pilot.recomputed
        monkeypatch.setattr(pilot, "recomputed", lambda *arguments: recomputing.append(1) or recomputed(*arguments))
        monkeypatch.setattr(torch.autograd, "grad", scarce)
        assert relative_error(self.run(scene_of()), expected) < 1e-6 and len(recomputing) == 4
        recomputing.clear()
        with pytest.raises(RuntimeError, match="or set memory to 'recompute'"):
            self.run(scene_of(), memory="record")
        monkeypatch.setattr(pilot, "recomputed", recomputed)
        with pytest.raises(RuntimeError, match=r"a smaller crop \(Crop Region\) or a smaller batch\.$"):
            self.run(scene_of(), memory="recompute")


class TestErrors:
    def run(self, scene: Scene, model: Any = None, **settings: Any) -> None:
        scene.host(scene.sigmas("simple", 2), model, sampler=sampler(**{"interval": 1, "iterations": 1, **settings}))

    def test_an_inpainting_model(self) -> None:
        with pytest.raises(ValueError, match="this model has 9 channels in, not 4: load the plain checkpoint"):
            self.run(Scene("sd15", True, True, torch.float32, hole=HOLE))

    @pytest.mark.parametrize(
        ("value", "sentence"), [(0.0, "The mask has no hole"), (1.0, "The mask covers the whole picture")]
    )
    def test_a_mask_of_one_kind(self, value: float, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            self.run(scene_of(hole=torch.full_like(HOLE, value)))

    def test_no_mask(self) -> None:
        with pytest.raises(ValueError, match="PILOT needs to know where the hole is"):
            self.run(Scene("sd15", False, False, hole=HOLE))

    def test_a_loss_that_is_not_a_number(self) -> None:
        scene = scene_of()
        scene.positive[0][0][0, 3] = float("nan")
        with pytest.raises(FloatingPointError, match=r"PILOT's loss is not a finite number at timestep 999: lower"):
            self.run(scene)

    def test_rasg_has_no_noise_to_replace(self) -> None:
        scene = scene_of()
        with pytest.raises(ValueError, match="RASG cannot change the noise of PILOTSampler"):
            self.run(scene, guidance.with_rasg(scene.patcher, RASG(eta=0.1)))

    def test_a_flow_model(self) -> None:
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        scene = scene_of()
        (model,) = ModelSamplingSD3().patch(scene.patcher, 3.0)
        with pytest.raises(ValueError, match="this one samples by ModelSamplingDiscreteFlow"):
            self.run(scene, model)
