"""The literal oracles, checked against the host without our pack, against other formulations and numbers by hand.

Errors are the greatest absolute difference over the standard deviation of the expected tensor. Measured on a CPU:
UNet 2e-14 in float64 (1e-6 for SD2, whose attention the host casts to float32), 1.2e-5 with the host in float32;
sampling in 4 steps at CFG 7.5 6.6e-6 with float64 weights (the host rounds every prediction and latent to float32),
3.7e-5 with the host in float32.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from truefill_testing.literal_painta import Painta, Place, Row, level_mask, relevance_weights, score_factors, smooth3x3
from truefill_testing.literal_rasg import mean_maps, normalised, objective
from truefill_testing.literal_sampling import (
    PaintaSettings,
    alpha_bar,
    literal_sample,
    nearest_timestep,
    released_sigma,
    training_betas,
    true_ddim_sigma,
)
from truefill_testing.literal_unet import as_float64, literal_unet
from truefill_testing.scene import Scene, exact_unet, forget_models, patcher_of, randn, relative_error, token_set
from truefill_testing.small_models import CONTEXT_DIM, FAMILIES, small_conditioning, small_model

import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip

# The transformer blocks at 1/16 and 1/32 of the image, and those whose cross-attention RASG reads (1/32).
PAINTA_PLACES = {
    "sd15": [("input", i, 0) for i in (4, 5, 7, 8)] + [("output", i, 0) for i in (3, 4, 5, 6, 7, 8)],
    "sdxl": [("input", i, d) for i in (4, 5) for d in range(2)]
    + [("input", i, d) for i in (7, 8) for d in range(3)]
    + [("output", i, d) for i in (0, 1, 2) for d in range(3)]
    + [("output", i, d) for i in (3, 4, 5) for d in range(2)],
}
RASG_PLACES = {
    "sd15": [("input", i, 0) for i in (7, 8)] + [("output", i, 0) for i in (3, 4, 5)],
    "sdxl": [("input", i, d) for i in (7, 8) for d in range(3)]
    + [("middle", 0, d) for d in range(3)]
    + [("output", i, d) for i in (0, 1, 2) for d in range(3)],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_no_leftovers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(threads)
    forget_models()


def unet_inputs(family: str, channels: int, batch: int, size: tuple[int, int]) -> tuple:
    """x, timesteps, context, y; the timesteps differ within the batch."""
    y = randn(batch, 2816, seed=3) if family == "sdxl" else None
    timesteps = torch.tensor([981, 400, 3, 700])[:batch]
    return randn(batch, channels, *size, seed=1), timesteps, randn(batch, 77, CONTEXT_DIM[family], seed=2), y


def two_holes(height: int, width: int) -> torch.Tensor:
    hole = torch.zeros(2, 1, height, width)
    hole[0, :, 2 : height - 6, 5:] = 1.0
    hole[1, :, 6:, 2 : width - 4] = 1.0
    return hole


def cond_and_uncond(tokens: torch.Tensor) -> list[Row]:
    """Two pictures in the order [uncond 0, uncond 1, cond 0, cond 1]."""
    uncond = [Row(role="uncond", sample=sample, tokens=None) for sample in (0, 1)]
    return uncond + [Row(role="cond", sample=sample, tokens=tokens) for sample in (0, 1)]


class TestUNet:
    @pytest.mark.parametrize("size", [(16, 16), (17, 13), (25, 19)])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_the_hosts_unet(self, family: str, size: tuple[int, int]) -> None:
        unet = patcher_of(family, size == (17, 13)).model.diffusion_model
        x, timesteps, context, y = unet_inputs(family, unet.in_channels, 3, size)
        in_float32 = [value if value is None else value.float() for value in (x, context, y)]
        exact = exact_unet(family, size == (17, 13))
        with torch.no_grad():
            literal = literal_unet(exact, x, timesteps, context, y)
            host_in_float64 = exact(x, timesteps, context, y)
            host = unet(in_float32[0], timesteps, in_float32[1], in_float32[2])
            literal_in_float32 = literal_unet(unet, in_float32[0], timesteps, in_float32[1], in_float32[2])
        assert literal.dtype == torch.float64
        assert literal_in_float32.dtype == torch.float32
        assert relative_error(host_in_float64, literal) < (5e-6 if family == "sd2" else 1e-12)
        assert relative_error(host, literal) < 3e-5
        assert relative_error(literal_in_float32, literal) < 3e-5

    def test_the_float64_copy_leaves_the_model_alone(self) -> None:
        unet = small_model("sd15", inpainting=False).model.diffusion_model
        as_float64(unet)
        assert unet.dtype == torch.float32
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


class TestLevelMask:
    def test_keeps_cells_at_least_half_covered(self) -> None:
        hole = torch.zeros(1, 1, 4, 4)
        hole[0, 0, :2, :2] = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        hole[0, 0, :2, 2:] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        hole[0, 0, 2:, :2] = torch.tensor([[1.0, 0.9], [0.0, 0.0]])
        assert level_mask(hole, (2, 2)).tolist() == [[[[True, True], [False, False]]]]

    def test_a_small_hole_keeps_its_best_cells(self) -> None:
        hole = torch.zeros(2, 1, 4, 4)
        hole[0, 0, 3, 0] = 0.02
        hole[0, 0, 0, 0] = 0.01
        hole[1, 0, 0, 1:3] = 1.0
        assert level_mask(hole, (2, 2)).squeeze(1).tolist() == [
            [[False, False], [True, False]],
            [[True, True], [False] * 2],
        ]

    def test_an_empty_hole_stays_empty(self) -> None:
        assert not level_mask(torch.zeros(1, 1, 4, 4), (2, 2)).any()

    def test_odd_sizes_average_overlapping_windows(self) -> None:
        # Rows 0-1, 1-3 and 3-4 of five: adaptive average pooling, as interpolate(mode="area") does it.
        hole = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 5, 1)
        assert level_mask(hole, (3, 1)).flatten().tolist() == [True, True, False]
        noise = torch.rand(3, 1, 65, 49)
        assert torch.equal(
            level_mask(noise, (17, 13)), F.interpolate(noise.double(), size=(17, 13), mode="area") >= 0.5
        )


class TestWeights:
    def test_smoothing_is_a_separable_convolution(self) -> None:
        image = randn(5, 4, seed=0)
        weights = torch.tensor([0.2119, 0.5761, 0.2119], dtype=torch.float64)
        expected = F.conv2d(image[None, None], torch.outer(weights, weights)[None, None], padding=1)[0, 0]
        assert torch.allclose(smooth3x3(image), expected, rtol=0, atol=1e-14)
        assert smooth3x3(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(0.5761**2)

    def test_c_by_hand(self) -> None:
        # Two heads, four pixels, three tokens, softmax weights given by their logarithms; ind(prompt) is token 1.
        first = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.6, 0.2], [0.6, 0.3, 0.1], [0.3, 0.5, 0.2]], dtype=torch.float64)
        second = torch.tensor([[0.6, 0.1, 0.3], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3], [0.3, 0.4, 0.3]], dtype=torch.float64)
        tokens = torch.tensor([False, True, False])
        c = relevance_weights(torch.stack([first, second]).log() + 3.0, tokens, (2, 2), smooth=False)
        # s = .1, .7, .3, .45; the lower median is .3, the maximum .7.
        assert c.tolist() == pytest.approx([0.0, 0.4 / 0.7, 0.0, 0.15 / 0.7])

    def test_an_empty_token_set_is_refused(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            relevance_weights(randn(2, 4, 3, seed=0), torch.zeros(3, dtype=torch.bool), (2, 2), smooth=True)

    @pytest.mark.parametrize("strength", [1.0, 0.25])
    def test_only_hole_to_known_scores_are_weakened(self, strength: float) -> None:
        c = torch.rand(6, dtype=torch.float64)
        hole = torch.tensor([True, False, False, True, True, False])
        factors = score_factors(c, hole, strength)
        for i in range(6):
            for j in range(6):
                weakened = 1 - strength * (1 - c[j].item())
                assert factors[i, j].item() == pytest.approx(weakened if hole[i] and not hole[j] else 1.0)


class HostHooks:
    """PAIntA and the recording of scores on the host's own forward, through its hooks: a second formulation.

    Rows are `cond_and_uncond`. The block's input comes from a hook on its norm1, c from the host's own sub-modules.
    """

    def __init__(self, unet: torch.nn.Module, family: str, context: torch.Tensor, painta: Painta) -> None:
        self.context, self.painta = context, painta
        self.factors: dict[Place, torch.Tensor] = {}
        self.scores: list[torch.Tensor] = []
        self.handles = []
        for place in PAINTA_PLACES[family]:
            block = self.find(unet, place)
            self.handles.append(block.norm1.register_forward_pre_hook(self.watcher(place, block)))
        self.transformer_options = {
            "patches_replace": {
                "attn1": dict.fromkeys(PAINTA_PLACES[family], self.attend_reweighted),
                "attn2": dict.fromkeys(RASG_PLACES[family], self.attend_recorded),
            }
        }

    @staticmethod
    def find(unet: torch.nn.Module, place: Place) -> torch.nn.Module:
        side, index, depth = place
        block = getattr(unet, f"{side}_blocks")[index]
        return block[1].transformer_blocks[depth]

    def watcher(self, place: Place, block: torch.nn.Module):
        def watch(_, arguments):
            (x,) = arguments
            n = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias)
            z = block.norm2(x + block.attn1(n))
            heads = block.n_heads
            q, k = (t.unflatten(2, (heads, -1)) for t in (block.attn2.to_q(z), block.attn2.to_k(self.context)))
            weights = (torch.einsum("bihd,bjhd->bhij", q, k) * block.d_head**-0.5).softmax(-1).mean(1)
            grid = self.grids[x.shape[1]]
            kernel = torch.tensor([0.2119, 0.5761, 0.2119], dtype=x.dtype)
            kernel = torch.outer(kernel, kernel)[None, None]
            self.factors[place] = torch.ones(4, x.shape[1], x.shape[1], dtype=x.dtype)
            for cond, uncond in ((2, 0), (3, 1)):
                tokens = self.painta.rows[cond]["tokens"].nonzero().flatten()
                s = weights[cond][:, tokens].sum(-1)
                s = F.conv2d(s.reshape(1, 1, *grid), kernel, padding=1).flatten()
                c = ((s - s.sort().values[(len(s) - 1) // 2]) / s.amax()).clip(0, 1)
                hole = level_mask(self.painta.hole[uncond : uncond + 1], grid).flatten()
                for row in (cond, uncond):
                    self.factors[place][row, hole] = torch.where(hole, 1.0, c)

        return watch

    def attend(self, q, k, v, extra_options, factors):
        q, k, v = (t.unflatten(2, (extra_options["n_heads"], -1)) for t in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * extra_options["dim_head"] ** -0.5
        weights = (scores if factors is None else scores * factors[:, None]).softmax(-1)
        return scores, torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)

    def attend_reweighted(self, q, k, v, extra_options):
        place = (*extra_options["block"], extra_options["block_index"])
        return self.attend(q, k, v, extra_options, self.factors[place])[1]

    def attend_recorded(self, q, k, v, extra_options):
        scores, output = self.attend(q, k, v, extra_options, None)
        self.scores.append(scores)
        return output

    def run(self, unet: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None):
        height, width = x.shape[2:]
        halves = [(height, width)]
        for _ in range(2):
            halves.append(tuple(-(-side // 2) for side in halves[-1]))
        self.grids = {rows * columns: (rows, columns) for rows, columns in halves}
        output = unet(x, timesteps, self.context, y, transformer_options=self.transformer_options)
        for handle in self.handles:
            handle.remove()
        return output


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
class TestPaintaInTheUNet:
    SIZE = (18, 13)

    def inputs(self, family: str) -> tuple:
        unet = exact_unet(family, True)
        return unet, *unet_inputs(family, 9, 4, self.SIZE)

    def test_equals_the_same_on_the_hosts_hooks(self, family: str) -> None:
        unet, x, timesteps, context, y = self.inputs(family)
        painta = Painta(cond_and_uncond(token_set(1, 2, 5)), two_holes(*self.SIZE))
        with torch.no_grad():
            literal, recorded = literal_unet(unet, x, timesteps, context, y, painta=painta, record=True)
            hooks = HostHooks(unet, family, context, painta)
            host = hooks.run(unet, x, timesteps, y)
            plain = literal_unet(unet, x, timesteps, context, y)
        assert relative_error(host, literal) < 1e-12
        assert relative_error(plain, literal) > 1e-2
        assert [layer.place for layer in recorded] == RASG_PLACES[family]
        for layer, scores in zip(recorded, hooks.scores, strict=True):
            assert relative_error(scores, layer.scores) < 1e-12

    def test_covers_the_right_blocks_with_weights_that_differ(self, family: str) -> None:
        unet, x, timesteps, context, y = self.inputs(family)
        painta = Painta(cond_and_uncond(token_set(1, 2, 5)), two_holes(*self.SIZE))
        literal_unet(unet, x, timesteps, context, y, painta=painta)
        assert list(painta.c) == [(place, sample) for place in PAINTA_PLACES[family] for sample in (0, 1)]
        for (c,) in painta.c.values():
            assert ((c > 0) & (c < 1)).double().mean() > 0.3
            assert c.max() > 0.1

    def test_nothing_to_do_changes_nothing(self, family: str) -> None:
        unet, x, timesteps, context, y = self.inputs(family)
        rows = cond_and_uncond(token_set(1, 2, 5))
        hole = two_holes(*self.SIZE)
        plain = literal_unet(unet, x, timesteps, context, y)
        empty = Painta(rows, torch.zeros_like(hole))
        assert torch.equal(literal_unet(unet, x, timesteps, context, y, painta=empty), plain)
        everything = Painta(rows, torch.ones_like(hole))
        assert torch.equal(literal_unet(unet, x, timesteps, context, y, painta=everything), plain)
        powerless = Painta(rows, hole, strength=0.0)
        assert torch.equal(literal_unet(unet, x, timesteps, context, y, painta=powerless), plain)

    def test_one_picture_does_not_touch_another(self, family: str) -> None:
        unet, x, timesteps, context, y = self.inputs(family)
        rows, hole = cond_and_uncond(token_set(1, 2, 5)), two_holes(*self.SIZE)
        both = literal_unet(unet, x, timesteps, context, y, painta=Painta(rows, hole))
        hole[1] = 0.0
        first = literal_unet(unet, x, timesteps, context, y, painta=Painta(rows, hole))
        assert torch.equal(both[[0, 2]], first[[0, 2]])
        assert relative_error(first[[1, 3]], both[[1, 3]]) > 1e-2

    def test_separate_calls_hand_c_over(self, family: str) -> None:
        unet, x, timesteps, context, y = self.inputs(family)
        rows, hole = cond_and_uncond(token_set(1, 2, 5)), two_holes(*self.SIZE)
        together = literal_unet(unet, x, timesteps, context, y, painta=Painta(rows, hole))

        def call(part: slice, painta: Painta) -> torch.Tensor:
            return literal_unet(
                unet, x[part], timesteps[part], context[part], y if y is None else y[part], painta=painta
            )

        first = Painta(rows[2:], hole)
        cond = call(slice(2, 4), first)
        uncond = call(slice(0, 2), Painta(rows[:2], hole, c=first.c))
        assert relative_error(torch.cat([uncond, cond]), together) < 1e-12
        with pytest.raises(KeyError):
            call(slice(0, 2), Painta(rows[:2], hole))


class TestSeveralConditionalRows:
    def test_each_uses_its_own_c_and_the_unconditional_row_their_mean(self) -> None:
        scores, cross = randn(3, 2, 6, 6, seed=1), randn(3, 2, 6, 77, seed=2)
        hole = torch.zeros(1, 1, 2, 3)
        hole[0, 0, 0, :2] = 1.0
        rows = [
            Row(role="cond", sample=0, tokens=token_set(1)),
            Row(role="uncond", sample=0, tokens=None),
            Row(role="cond", sample=0, tokens=token_set(4, 5)),
        ]
        painta = Painta(rows, hole, strength=0.5)
        new = painta.reweight(("input", 4, 0), (2, 3), scores, cross)
        first = relevance_weights(cross[0], token_set(1), (2, 3), smooth=True)
        second = relevance_weights(cross[2], token_set(4, 5), (2, 3), smooth=True)
        assert (first - second).abs().max() > 0.05
        for row, c in enumerate([first, (first + second) / 2, second]):
            expected = scores[row].clone()
            expected[:, :2, 2:] *= (1 + c[2:]) / 2
            assert torch.allclose(new[row], expected, rtol=0, atol=1e-14)


class TestRasg:
    def test_objective_is_equation_9(self) -> None:
        unet = exact_unet("sd15", True)
        x, timesteps, context, _ = unet_inputs("sd15", 9, 1, (18, 13))
        _, recorded = literal_unet(unet, x, timesteps, context, record=True)
        hole = two_holes(18, 13)[1:]
        tokens = [2, 3, 9]
        value = objective(recorded, 0, token_set(*tokens), hole)
        mask = level_mask(hole, (5, 4)).flatten().double()
        expected = 0.0
        for k in tokens:
            a = sum(layer.scores[0, :, :, k].sum(0) for layer in recorded) / (5 * 4)
            assert torch.allclose(a, mean_maps(recorded, 0)[:, k], rtol=0, atol=1e-12)
            probability = torch.sigmoid(a - 1.0)
            expected += (mask * probability.log() + (1 - mask) * (1 - probability).log()).sum() / 20
        assert float(value) == pytest.approx(float(expected), rel=1e-12)

    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    @pytest.mark.parametrize("with_painta", [False, True])
    def test_gradient_is_the_slope_of_the_objective(self, family: str, with_painta: bool) -> None:
        unet = exact_unet(family, True)
        x, timesteps, context, y = unet_inputs(family, 9, 1, (18, 13))
        tokens, hole = token_set(1, 2, 5), two_holes(18, 13)[:1]
        rows = [Row(role="cond", sample=0, tokens=tokens)]

        def score(latent: torch.Tensor, detached_c: bool = False) -> torch.Tensor:
            painta = DetachedPainta(rows, hole) if detached_c else Painta(rows, hole)
            unet_input = torch.cat([latent, x[:, 4:]], dim=1)
            _, recorded = literal_unet(
                unet, unet_input, timesteps, context, y, painta=painta if with_painta else None, record=True
            )
            return objective(recorded, 0, tokens, hole)

        latent = x[:, :4].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(latent), latent)
        direction = normalised(gradient)
        assert float(direction.std()) == pytest.approx(1.0)
        with torch.no_grad():
            step = 1e-6
            slope = float(score(latent + step * direction) - score(latent - step * direction)) / (2 * step)
        assert slope > 0.0
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5)
        if with_painta:
            (without_c,) = torch.autograd.grad(score(latent, detached_c=True), latent)
            assert relative_error(without_c, gradient) > 1e-2


class DetachedPainta(Painta):
    """PAIntA whose c is a constant for autograd: what the gradient must not be."""

    def reweight(self, place, grid, scores, cross):
        return super().reweight(place, grid, scores, cross.detach())


class TestSchedule:
    def test_the_training_schedule_is_the_hosts(self) -> None:
        sigmas = patcher_of("sd15", False).model.model_sampling.sigmas
        abar = torch.cumprod(1.0 - training_betas(), dim=0)
        assert torch.allclose(((1 - abar) / abar).sqrt(), sigmas.double(), rtol=1e-6, atol=0)

    def test_timesteps_between_the_tables_sigmas_are_the_hosts(self) -> None:
        model_sampling = patcher_of("sd15", False).model.model_sampling
        sigmas = torch.linspace(-3.6, 2.7, 200).exp()
        timesteps = [nearest_timestep(float(sigma), model_sampling.sigmas) for sigma in sigmas]
        assert timesteps == model_sampling.timestep(sigmas).tolist()

    def test_both_sigmas_at_the_first_of_50_steps(self) -> None:
        model_sampling = patcher_of("sd15", False).model.model_sampling
        first, second = comfy.samplers.calculate_sigmas(model_sampling, "simple", 50)[:2].tolist()
        t, s = (nearest_timestep(sigma, model_sampling.sigmas) for sigma in (first, second))
        betas = training_betas()
        assert (t, s) == (999, 979)
        assert true_ddim_sigma(alpha_bar(first), alpha_bar(second)) == pytest.approx(0.460, abs=5e-4)
        assert released_sigma(float(betas[t]), float(betas[s])) == pytest.approx(0.0185, abs=5e-5)

    def test_the_hosts_ancestral_step_is_ddims(self) -> None:
        from comfy.k_diffusion.sampling import get_ancestral_step

        t, s, eta = 7.3, 4.1, 0.4
        down, up = get_ancestral_step(t, s, eta)
        abar_s = alpha_bar(s)
        sigma = eta * true_ddim_sigma(alpha_bar(t), abar_s)
        assert sigma / math.sqrt(abar_s) == pytest.approx(up)
        assert math.sqrt((1 - abar_s - sigma**2) / abar_s) == pytest.approx(down)


@pytest.mark.parametrize(
    ("family", "inpainting", "masked", "dtype"),
    [
        ("sd15", False, False, torch.float64),
        ("sd15", False, True, torch.float64),
        ("sd15", True, False, torch.float64),
        ("sd15", True, True, torch.float64),
        ("sd15", True, True, torch.float32),
        ("sd2", True, False, torch.float64),
        ("sdxl", False, True, torch.float64),
        ("sdxl", False, True, torch.float32),
        ("sdxl", True, False, torch.float64),
    ],
)
def test_ddim_without_noise_is_the_hosts_euler(family: str, inpainting: bool, masked: bool, dtype: torch.dtype) -> None:
    scene = Scene(family, inpainting, masked, dtype)
    host = comfy.sample.sample(
        scene.patcher, scene.noise.clone(), 4, scene.CFG, "euler", "normal", **scene.host_arguments()
    )
    scene.assert_same(host, scene.literal(scene.sigmas("normal", 4)))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_v_prediction_and_a_partial_denoise(family: str) -> None:
    scene = Scene(family, inpainting=False, masked=True, v_prediction=True)
    host = comfy.sample.sample(
        scene.patcher, scene.noise.clone(), 3, scene.CFG, "euler", "karras", denoise=0.6, **scene.host_arguments()
    )
    scene.assert_same(host, scene.literal(scene.sigmas("karras", 5)[-4:]))


@pytest.mark.parametrize("inpainting", [False, True])
@pytest.mark.parametrize("eta", [0.25, 1.0])
def test_ddim_with_noise_is_the_hosts_euler_ancestral(inpainting: bool, eta: float) -> None:
    scene = Scene("sd15", inpainting, masked=not inpainting)
    sigmas = scene.sigmas("normal", 5)
    noises = randn(5, 2, 4, *scene.size, seed=9)
    steps = {float(sigma): index for index, sigma in enumerate(sigmas)}
    options = {"eta": eta, "noise_sampler": lambda sigma, _: noises[steps[float(sigma)]].float()}
    sampler = comfy.samplers.ksampler("euler_ancestral", options)
    host = comfy.sample.sample_custom(
        scene.patcher, scene.noise.clone(), scene.CFG, sampler, sigmas, **scene.host_arguments()
    )
    scene.assert_same(host, scene.literal(sigmas, eta=eta, guidance=lambda index: noises[index]))


@pytest.mark.parametrize("sigma_choice", ["ddim", "released"])
def test_a_rasg_step_adds_the_normalised_gradient(sigma_choice: str) -> None:
    scene = Scene("sd15", inpainting=True, masked=False)
    sigmas = scene.sigmas("simple", 4)
    run = scene.literal(sigmas, eta=0.25, sigma_choice=sigma_choice, guidance="rasg", painta=PaintaSettings())
    assert [step.timestep for step in run.steps] == [999, 749, 499, 249]
    betas = training_betas()
    after = [step.x for step in run.steps[1:]] + [run.latent]
    for index, step in enumerate(run.steps):
        sigma, next_sigma = sigmas[index].item(), sigmas[index + 1].item()
        if next_sigma == 0.0:
            up = 0.0
        elif sigma_choice == "ddim":
            up = 0.25 * next_sigma * math.sqrt(sigma**2 - next_sigma**2) / sigma
        else:
            t, s = (betas[run.steps[i].timestep].item() for i in (index, index + 1))
            up = 0.25 * math.sqrt(s / t * (1 - (1 - t) / (1 - s))) * math.sqrt(1 + next_sigma**2)
        assert step.sigma_up == pytest.approx(up)
        direction = (step.x - step.x0) / sigma
        pull = step.gradient / step.gradient.std(dim=(1, 2, 3), keepdim=True)
        expected = step.x0 + math.sqrt(next_sigma**2 - up**2) * direction + up * pull
        assert relative_error(after[index], expected) < 1e-12


def test_the_gradient_is_in_the_hosts_coordinates() -> None:
    scene = Scene("sdxl", inpainting=True, masked=True)
    sigmas = scene.sigmas("simple", 4)
    step = scene.literal(sigmas[:2], guidance="rasg", painta=PaintaSettings()).steps[0]
    sigma, tokens = sigmas[0].item(), token_set(1, 2, 5)
    prompt = scene.prompt(scene.positive)
    known = (scene.latent * scene.scale).double() + sigma * scene.noise.double()
    x = (scene.hole * step.x + (1 - scene.hole) * known).requires_grad_()
    unet_input = torch.cat([x / math.sqrt(1 + sigma**2), scene.hole.round(), scene.masked_latent * scene.scale], dim=1)
    rows = [Row(role="cond", sample=sample, tokens=tokens) for sample in (0, 1)]
    _, recorded = literal_unet(
        exact_unet("sdxl", True),
        unet_input.double(),
        torch.tensor([999, 999]),
        prompt.context.double().expand(2, -1, -1),
        prompt.y.double().expand(2, -1),
        painta=Painta(rows, scene.hole),
        record=True,
    )
    total = sum(objective(recorded, sample, tokens, scene.hole[sample : sample + 1]) for sample in (0, 1))
    (gradient,) = torch.autograd.grad(total, x)
    assert relative_error(step.gradient, gradient) < 1e-10


def test_painta_runs_in_the_first_half_only() -> None:
    scene = Scene("sd15", inpainting=True, masked=False)
    sigmas = scene.sigmas("simple", 4)
    plain, painted = scene.literal(sigmas), scene.literal(sigmas, painta=PaintaSettings())
    assert relative_error(painted.steps[0].x0, plain.steps[0].x0) > 1e-2
    late = scene.sigmas("simple", 4)[2:]
    assert torch.equal(scene.literal(late, painta=PaintaSettings()).latent, scene.literal(late).latent)


def test_several_prompts_of_a_side_are_averaged() -> None:
    scene = Scene("sd15", inpainting=False, masked=False)
    sigmas = scene.sigmas("normal", 3)
    other = small_conditioning("sd15", seed=7)
    arguments = scene.host_arguments()
    arguments["positive"] = arguments["positive"] + other
    host = comfy.sample.sample(scene.patcher, scene.noise.clone(), 3, scene.CFG, "euler", "normal", **arguments)
    run = literal_sample(
        exact_unet("sd15", False),
        scene.model.model_sampling.sigmas,
        sigmas,
        scene.noise,
        scene.latent * scene.scale,
        [scene.prompt(scene.positive), scene.prompt(other)],
        [scene.prompt(scene.negative)],
        scene.CFG,
    )
    scene.assert_same(host, run)
