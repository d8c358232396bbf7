"""Known latents through the host's real sampling, against the literal float64 form of HD-Painter's section 3.5.

Errors are the greatest absolute difference over the standard deviation of the literal result. With float64 weights what
remains is the host's own rounding: it keeps latents in float32, and noise of deviation 37 (the x4 model's) leaves 4e-6
of that to each of them. Without the patch the same runs are 2e-6 to 6e-6 from the oracle, and 4e-5 with eta 1.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from truefill_testing.pairwise import all_pairs
from truefill_testing.scene import randn, relative_error
from truefill_testing.small_models import small_model

import comfy.model_sampling  # isort: skip
import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip
from truefill_testing.known_scene import (
    CFG,
    KINDS,
    ROUNDING,
    SAMPLERS,
    SEED,
    TOLERANCE,
    Previews,
    Scene,
    area_mean,
    assert_same,
    forget_scenes,
    kinds,
    literal_of,
    masked,
    plain_of,
    soft_masks,
)


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_scenes()


@pytest.mark.parametrize(("kind", "batch", "sampler"), all_pairs(KINDS, (1, 2), ("euler", "ddim")))
def test_deterministic_samplers_are_the_paper(kind: str, batch: int, sampler: str) -> None:
    scene = Scene(kind, batch)
    literal = literal_of(kind, batch)
    assert masked(scene).any() and (area_mean(scene.mask, scene.size) == 1).any()
    assert_same(scene.host(scene.patched(), sampler), literal.x0, masked(scene))


@pytest.mark.quick
@kinds
def test_float32_is_as_exact_as_the_host(kind: str) -> None:
    """With float32 weights the model's own rounding counts, CFG times; the deviation is less with the known part in it."""
    scene = Scene(kind, dtype=torch.float32)
    ours = relative_error(scene.host(scene.patched()), literal_of(kind).x0)
    hosts_own = relative_error(plain_of(kind, "euler"), scene.literal(mask=torch.ones(1, 1, 1, 1)).x0)
    assert ours < 4 * hosts_own < 2e-4


@kinds
def test_the_new_noise_is_not_the_papers(kind: str) -> None:
    """A blend of the prediction alone, which euler takes for a prediction of the noise too, is told apart."""
    scene = Scene(kind)
    assert relative_error(scene.host(scene.blended_prediction()), literal_of(kind).x0) > 0.01


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc"])
def test_other_samplers_take_the_blend_for_the_prediction(sampler: str) -> None:
    scene = Scene("x4")
    ours, theirs = scene.host(scene.patched(), sampler), scene.host(scene.blended_prediction(), sampler)
    somewhere = ~masked(scene).expand(scene.shape)
    assert_same(ours[somewhere], theirs[somewhere], tolerance=2e-4)  # rounded in another order, times noise and CFG


@kinds
@pytest.mark.parametrize(
    ("scheduler", "steps", "tolerance"),
    [("normal", 6, TOLERANCE), ("karras", 4, TOLERANCE), ("exponential", 20, ROUNDING), ("simple", 1, ROUNDING)],
)
def test_schedules(kind: str, scheduler: str, steps: int, tolerance: float) -> None:
    scene = Scene(kind)
    sigmas = scene.sigmas(scheduler, steps)
    assert_same(scene.host(scene.patched(), sigmas=sigmas), scene.literal(sigmas).x0, masked(scene), tolerance)


@kinds
def test_part_of_a_schedule(kind: str) -> None:
    """From noised latents (img2img), and to a noise level above 0, where the known part is X0 with the old noise."""
    scene = Scene(kind)
    scene.latent = (randn(*scene.shape, seed=6) / scene.scale).float()
    sigmas = scene.sigmas("normal", 8)[3:]
    assert_same(scene.host(scene.patched(), sigmas=sigmas), scene.literal(sigmas).x0, masked(scene))
    shorter = scene.sigmas("normal", 8)[3:7]
    last = scene.literal(shorter, parts=("steps.x0", "steps.eps")).steps[-1]
    expected = last.x0 + float(shorter[-1]) * last.eps
    assert_same(scene.host(scene.patched(), sigmas=shorter), expected)


def test_the_ksampler() -> None:
    scene = Scene("x4")
    with torch.inference_mode():
        latent = comfy.sample.sample(
            scene.patched(),
            scene.noise.clone(),
            6,
            CFG,
            "ddim",
            "normal",
            scene.positive,
            scene.negative,
            scene.latent,
            disable_pbar=True,
            seed=SEED,
        )
    assert_same(latent.double() * scene.scale, scene.literal(scene.sigmas("normal", 6)).x0, masked(scene))


@kinds
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_euler_ancestral_is_the_stochastic_form(kind: str, eta: float) -> None:
    scene = Scene(kind)
    literal = scene.literal(eta=eta, noises=scene.default_noises(5))
    ours = scene.host(scene.patched(), "euler_ancestral", eta=eta)
    assert_same(ours, literal.x0, masked(scene), ROUNDING if eta == 1.0 else TOLERANCE)
    assert relative_error(ours, literal_of(kind).x0) > 0.01


@kinds
def test_euler_ancestral_without_noise_is_euler(kind: str) -> None:
    scene = Scene(kind)
    assert_same(scene.host(scene.patched(), "euler_ancestral", eta=0.0), literal_of(kind).x0)


@kinds
@pytest.mark.parametrize(("sampler", "eta"), [("euler", {}), ("ddim", {}), ("euler_ancestral", {"eta": 0.5})])
def test_previews_show_the_blended_prediction(kind: str, sampler: str, eta: dict[str, float]) -> None:
    scene = Scene(kind)
    previews = Previews()
    scene.host(scene.patched(), sampler, callback=previews, **eta)
    literal = scene.literal(noises=scene.default_noises(5), parts=("steps.x0",), **eta)
    assert len(previews.x0) == len(literal.steps) == 6
    for preview, step in zip(previews.x0, literal.steps, strict=True):
        assert_same(preview, step.x0, masked(scene))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_previews_of_other_samplers_show_what_is_known(sampler: str) -> None:
    scene = Scene("x4", dtype=torch.float32)
    previews = Previews()
    scene.host(scene.patched(), sampler, callback=previews)
    where = masked(scene).expand(scene.shape)
    assert len(previews.x0) >= 6
    for preview in previews.x0[:6]:
        assert_same(preview[where], scene.known[where] * scene.scale, tolerance=ROUNDING)


@pytest.mark.parametrize(("kind", "sampler"), zip(KINDS * 3, SAMPLERS, strict=True))
def test_all_hole_is_no_patch(kind: str, sampler: str) -> None:
    scene = Scene(kind, dtype=torch.float32)
    assert torch.equal(scene.host(scene.patched(mask=torch.ones(2, 50, 31)), sampler), plain_of(kind, sampler))


@pytest.mark.parametrize("size", [(52, 36), (5, 3), (1, 13, 9), (2, 300, 201)], ids=str)
def test_all_hole_of_any_size_is_no_patch(size: tuple[int, ...]) -> None:
    scene = Scene("x4", dtype=torch.float32)
    assert torch.equal(scene.host(scene.patched(mask=torch.ones(size))), plain_of("x4", "euler"))


@pytest.mark.parametrize(("kind", "sampler"), zip(KINDS[::-1] * 3, SAMPLERS, strict=True))
def test_strength_0_is_no_patch(kind: str, sampler: str) -> None:
    scene = Scene(kind, dtype=torch.float32)
    assert torch.equal(scene.host(scene.patched(strength=0.0), sampler), plain_of(kind, sampler))


@pytest.mark.parametrize(("sampler", "eta"), [("euler", {}), ("euler_ancestral", {"eta": 0.5})])
def test_strength_is_a_share_of_the_blend(sampler: str, eta: dict[str, float]) -> None:
    scene = Scene("x4")
    mask = 1.0 - 0.4 * (1.0 - area_mean(scene.mask, scene.size))
    literal = scene.literal(mask=mask, noises=scene.default_noises(5), **eta)
    assert_same(scene.host(scene.patched(strength=0.4), sampler, **eta), literal.x0, tolerance=ROUNDING)


@kinds
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_known_comes_out(kind: str, sampler: str) -> None:
    scene = Scene(kind, dtype=torch.float32)
    ours = scene.host(scene.patched(), sampler)
    where = masked(scene).expand(scene.shape)
    assert_same(ours[where], scene.known[where] * scene.scale)
    assert relative_error(plain_of(kind, sampler)[where], ours[where]) > 0.1


@kinds
def test_nothing_to_fill_is_the_known_latent(kind: str) -> None:
    scene = Scene(kind)
    for sampler in ("euler", "dpmpp_2m"):
        ours = scene.host(scene.patched(mask=torch.zeros(8, 8)), sampler)
        assert_same(ours, scene.known.double() * scene.scale)


MASKS = {
    "[H, W]": lambda scene: scene.mask[1],
    "[1, H, W]": lambda scene: scene.mask[:1],
    "of the latent's size": lambda scene: soft_masks(2, scene.size, factor=1),
    "much larger": lambda scene: soft_masks(2, scene.size, factor=8),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_masks_of_any_size(name: str) -> None:
    scene = Scene("x4")
    mask = MASKS[name](scene)
    # Up to 2 of 255 levels are noise and count as known, in the whole pack.
    weights = torch.where((255 * mask).round() > 2, mask, 0.0)
    literal = scene.literal(mask=area_mean(weights.reshape(-1, *mask.shape[-2:]), scene.size).expand(2, -1, -1, -1))
    assert_same(scene.host(scene.patched(mask=mask)), literal.x0)


@pytest.mark.parametrize("size", [(50, 47), (14, 10), (7, 4)], ids=str)
def test_masks_that_do_not_fit_the_cells(size: tuple[int, int]) -> None:
    """Every cell is the mean of the mask's pixels that it touches."""
    scene = Scene("x4")
    mask = randn(2, *size, seed=12).sigmoid().float()
    literal = scene.literal(mask=F.adaptive_avg_pool2d(mask.double()[:, None], scene.size))
    assert_same(scene.host(scene.patched(mask=mask)), literal.x0)


def test_one_known_latent_for_every_picture() -> None:
    scene = Scene("sd15")
    known = scene.known[1:]
    literal = scene.literal(known=known.double().expand(2, -1, -1, -1) * scene.scale)
    assert_same(scene.host(scene.patched(latent=known)), literal.x0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_rectified_flow_keeps_the_old_noise_too(eta: float) -> None:
    """x = (1 - s) X0 + s eps: X0 is blended, eps stays. `euler_ancestral` (eta 1) takes the blend for the prediction."""
    scene = Scene("sd15")

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flow = small_model(
        "sd15", inpainting=False, dtype=torch.float64
    )  # its own: the host leaves such patches on a while
    flow.add_object_patch("model_sampling", Flow())
    sigmas = comfy.samplers.calculate_sigmas(flow.get_model_object("model_sampling"), "simple", 6)
    if eta:
        theirs = scene.host(scene.blended_prediction(flow), "euler_ancestral", sigmas)
        assert_same(scene.host(scene.patched(flow), "euler_ancestral", sigmas), theirs, masked(scene))
        return

    mask, known = area_mean(scene.mask, scene.size), scene.known.double() * scene.scale
    x = scene.noise.double()
    blended = x
    literal_steps = []
    for level, following in itertools.pairwise(sigmas.tolist()):
        timestep = float(torch.tensor(level) * 1000)
        cond, uncond = (scene.unet(x, timestep, conditional) for conditional in (True, False))
        predicted = x - level * (uncond + CFG * (cond - uncond))
        eps = (x - (1.0 - level) * predicted) / level
        blended = mask * predicted + (1.0 - mask) * known
        literal_steps.append(blended)
        x = (1.0 - following) * blended + following * eps
    previews = Previews()
    assert_same(scene.host(scene.patched(flow), sigmas=sigmas, callback=previews), x, masked(scene))
    for preview, step in zip(previews.x0, literal_steps, strict=True):
        assert_same(preview, step)


def one_sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(error.value)
    assert message[0].isupper() and message.endswith(".") and ". " not in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "mask",
    [torch.full((8, 8), torch.nan), torch.ones(8), torch.ones(1, 1, 1, 8, 8)],
    ids=["NaN", "one dimension", "five dimensions"],
)
def test_masks_that_are_none(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError) as error:
        Scene("x4").patched(mask=mask)
    assert "mask" in one_sentence(error)


@pytest.mark.parametrize(
    "latent",
    [torch.full((2, 4, 13, 9), torch.nan), torch.full((2, 4, 13, 9), torch.inf), torch.ones(4, 13, 9)],
    ids=["NaN", "infinite", "three dimensions"],
)
def test_latents_that_are_none(latent: torch.Tensor) -> None:
    with pytest.raises(ValueError) as error:
        Scene("x4").patched(latent=latent)
    assert "latent" in one_sentence(error)


@pytest.mark.parametrize("shape", [(2, 4, 13, 10), (2, 4, 26, 18), (1, 4, 9, 13), (2, 16, 13, 9)], ids=str)
def test_known_latents_of_another_size(shape: tuple[int, ...]) -> None:
    scene = Scene("x4")
    with pytest.raises(ValueError) as error:
        scene.host(scene.patched(latent=torch.ones(shape)))
    message = one_sentence(error)
    assert all(str(side) in message for side in (*shape[1:], 9, 13))
