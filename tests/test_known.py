"""Known latents through the host's real sampling, against the literal float64 form of HD-Painter's section 3.5.

Errors are the greatest absolute difference over the standard deviation of the literal result. With float64 weights what
remains is the host's own rounding: it keeps latents in float32, and noise of deviation 37 (the x4 model's) leaves 4e-6
of that to each of them. Without the patch the same runs are 2e-6 to 6e-6 from the oracle, and 4e-5 with eta 1.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from truefill_testing.host import pack_module
from truefill_testing.literal_sampling import alpha_bar, nearest_timestep, training_betas
from truefill_testing.literal_unet import as_float64
from truefill_testing.literal_upscale import Run, Unet, literal_upscale
from truefill_testing.scene import randn, relative_error
from truefill_testing.small_models import small_conditioning, small_model, small_upscaler, upscaler_conditioning

import comfy.model_sampling  # isort: skip
import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip
from comfy.k_diffusion import sampling as k_diffusion  # isort: skip

with_known = pack_module("model_patches.known").with_known
with_rasg = pack_module("model_patches.guidance").with_rasg
RASG = pack_module("model_patches.rasg").RASG

TOLERANCE = 1e-5
ROUNDING = 5e-5
"""Where more of the host's own rounding adds up: many steps, one step from all the noise, eta 1, uni_pc's own noise."""
CFG = 7.5
SEED = 17
NOISE_LEVEL = 20
KINDS = ("x4", "sd15")
SIZES = {"x4": (13, 9), "sd15": (9, 14)}
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc")


@cache
def patcher_of(kind: str, dtype: torch.dtype):
    return small_upscaler(dtype) if kind == "x4" else small_model("sd15", inpainting=False, dtype=dtype)


@cache
def exact_unet(kind: str) -> torch.nn.Module:
    return as_float64(patcher_of(kind, torch.float32).model.diffusion_model)


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    for cached in (patcher_of, exact_unet, literal_of, plain_of):
        cached.cache_clear()


def soft_masks(batch: int, size: tuple[int, int], factor: int = 4) -> torch.Tensor:
    """Masks [B, factor h, factor w]: of each picture another part known, another part hole, the rest grey."""
    height, width = size
    masks = randn(batch, height * factor, width * factor, seed=11).sigmoid().float()
    for picture, mask in enumerate(masks):
        if picture % 2:
            mask[: 6 * factor, : 3 * factor] = 0.0
            mask[height * factor // 2 :, 4 * factor :] = 1.0
        else:
            mask[:, 6 * factor :] = 0.0
            mask[: 5 * factor, : 4 * factor] = 1.0
    return masks


def area_mean(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[B, n h, n w] -> [B, 1, h, w], float64."""
    height, width = size
    blocks = masks.double().unflatten(1, (height, -1)).unflatten(3, (width, -1))
    return blocks.mean(dim=(2, 4))[:, None]


class Scene:
    """A small model with its two prompts, noise, an empty latent, and what is known of the result."""

    def __init__(self, kind: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> None:
        self.kind, self.batch, self.size = kind, batch, SIZES[kind]
        self.patcher = patcher_of(kind, dtype)
        self.model = self.patcher.model
        self.scale = self.model.latent_format.scale_factor
        self.shape = (batch, 4, *self.size)
        self.noise = randn(*self.shape, seed=3).float()
        self.known = (randn(*self.shape, seed=4) / self.scale).float()
        self.latent = torch.zeros(self.shape)
        self.mask = soft_masks(batch, self.size)
        if kind == "x4":
            self.image = randn(batch, *self.size, 3, seed=5).sigmoid().float()
            self.positive, self.negative = upscaler_conditioning(self.image, NOISE_LEVEL, seed=1)
        else:
            self.positive, self.negative = small_conditioning(kind, seed=1), small_conditioning(kind, seed=2)

    def sigmas(self, scheduler: str = "simple", steps: int = 6) -> torch.Tensor:
        return comfy.samplers.calculate_sigmas(self.model.model_sampling, scheduler, steps)

    def patched(self, model: Any = None, **changes: Any):
        arguments = {"latent": self.known, "mask": self.mask, **changes}
        return with_known(self.patcher if model is None else model, **arguments)

    def blended_prediction(self, model: Any = None):
        """A model whose prediction is M X0pred + (1 - M) X0, so that every sampler's noise goes with that."""
        cells = area_mean(self.mask, self.size)

        def blend(arguments: dict[str, Any]) -> torch.Tensor:
            return (cells * arguments["denoised"] + (1.0 - cells) * self.known.double() * self.scale).float()

        model = (self.patcher if model is None else model).clone()
        model.set_model_sampler_post_cfg_function(blend)
        return model

    def host(
        self,
        model: Any,
        sampler: str = "euler",
        sigmas: torch.Tensor | None = None,
        callback: Callable[..., None] | None = None,
        noise_mask: torch.Tensor | None = None,
        **sampler_options: Any,
    ) -> torch.Tensor:
        """The host's own sampling, in inference mode as in a real run; the final latent in the model's scale."""
        chosen = comfy.samplers.sampler_object(sampler)
        chosen.extra_options = {**chosen.extra_options, **sampler_options}
        with torch.inference_mode():
            latent = comfy.sample.sample_custom(
                model,
                self.noise.clone(),
                CFG,
                chosen,
                (self.sigmas() if sigmas is None else sigmas).clone(),  # uni_pc writes into it
                self.positive,
                self.negative,
                self.latent,
                noise_mask=noise_mask,
                callback=callback,
                disable_pbar=True,
                seed=SEED,
            )
        return latent.double() * self.scale

    def unet(self, x: torch.Tensor, timestep: int, conditional: bool) -> torch.Tensor:
        """The model's output in float64, from what the host would give it."""
        ((context, _),) = self.positive if conditional else self.negative
        inputs: dict[str, Any] = {"context": context.double().expand(self.batch, -1, -1), "transformer_options": {}}
        if self.kind == "x4":
            x = torch.cat([x, self.noised_image()], dim=1)
            inputs["y"] = torch.full((self.batch,), NOISE_LEVEL)
        with torch.inference_mode():
            return exact_unet(self.kind)(x, torch.full((self.batch,), timestep), **inputs)

    def noised_image(self) -> torch.Tensor:
        """The low-resolution picture in [-1, 1] with the noise of its level; the host seeds that with its seed - 10."""
        alpha = (1.0 - training_betas(start=0.0001, end=0.02)).cumprod(dim=0)[NOISE_LEVEL]
        image = 2.0 * self.image.double().movedim(-1, 1) - 1.0
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(SEED - 10))
        return alpha.sqrt() * image + (1.0 - alpha).sqrt() * noise

    def literal(
        self,
        sigmas: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        unet: Unet | None = None,
        cfg: float = CFG,
        v_prediction: bool | None = None,
        **options: Any,
    ) -> Run:
        """The oracle; `mask` [B or 1, 1, h, w], `known` in the model's scale."""
        levels = [float(sigma) for sigma in (self.sigmas() if sigmas is None else sigmas)]
        table = self.model.model_sampling.sigmas
        alphas = [alpha_bar(level) for level in levels]
        # From the very end of the noise the host starts as the paper does, from anywhere else with noised latents.
        start = self.noise.double()
        if levels[0] < float(table[-1]) * (1 - 1e-5):
            start = alphas[0] ** 0.5 * self.latent.double() * self.scale + (1.0 - alphas[0]) ** 0.5 * start
        return literal_upscale(
            self.unet if unet is None else unet,
            [nearest_timestep(level, table) for level in levels[:-1]],
            alphas,
            start,
            self.known.double() * self.scale if known is None else known,
            area_mean(self.mask, self.size) if mask is None else mask,
            cfg,
            v_prediction=self.kind == "x4" if v_prediction is None else v_prediction,
            **options,
        )

    def default_noises(self, count: int) -> list[torch.Tensor]:
        """What the host's default noise sampler draws for the seed."""
        draw = k_diffusion.default_noise_sampler(self.noise, seed=SEED)
        return [draw(None, None) for _ in range(count)]


class Previews:
    """A callback that keeps the x0 of every step."""

    def __init__(self) -> None:
        self.x0: list[torch.Tensor] = []

    def __call__(self, step: int, x0: torch.Tensor, x: torch.Tensor, total_steps: int) -> None:
        assert step == len(self.x0)
        self.x0.append(x0.clone())


def assert_same(
    ours: torch.Tensor,
    literal: torch.Tensor,
    known_where: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Within `tolerance` of the literal latents' deviation, and of the known ones' where those are (bool [B, 1, h, w])."""
    assert relative_error(ours, literal) < tolerance
    if known_where is not None:
        where = known_where.expand_as(literal)
        assert relative_error(ours[where], literal[where]) < tolerance


def masked(scene: Scene) -> torch.Tensor:
    return area_mean(scene.mask, scene.size) == 0


@cache
def literal_of(kind: str, batch: int = 2) -> Run:
    return Scene(kind, batch).literal()


@cache
def plain_of(kind: str, sampler: str) -> torch.Tensor:
    """The host's own sampling, float32 weights."""
    scene = Scene(kind, dtype=torch.float32)
    return scene.host(scene.patcher, sampler)


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_deterministic_samplers_are_the_paper(kind: str, batch: int, sampler: str) -> None:
    scene = Scene(kind, batch)
    literal = literal_of(kind, batch)
    assert masked(scene).any() and (area_mean(scene.mask, scene.size) == 1).any()
    assert_same(scene.host(scene.patched(), sampler), literal.x0, masked(scene))


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
    last = scene.literal(shorter).steps[-1]
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
    literal = scene.literal(noises=scene.default_noises(5), **eta)
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


@kinds
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_hole_is_no_patch(kind: str, sampler: str) -> None:
    scene = Scene(kind, dtype=torch.float32)
    assert torch.equal(scene.host(scene.patched(mask=torch.ones(2, 50, 31)), sampler), plain_of(kind, sampler))


@pytest.mark.parametrize("size", [(52, 36), (5, 3), (1, 13, 9), (2, 300, 201)], ids=str)
def test_all_hole_of_any_size_is_no_patch(size: tuple[int, ...]) -> None:
    scene = Scene("x4", dtype=torch.float32)
    assert torch.equal(scene.host(scene.patched(mask=torch.ones(size))), plain_of("x4", "euler"))


@kinds
@pytest.mark.parametrize("sampler", SAMPLERS)
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
    literal = scene.literal(mask=area_mean(mask if mask.ndim == 3 else mask[None], scene.size).expand(2, -1, -1, -1))
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
        seen.append(arguments["denoised"].double())
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
    for preview, prediction, step in zip(previews.x0, seen, literal.steps, strict=True):
        assert_same(preview, step.x0)
        assert_same(0.8 * prediction, step.predicted)


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
    model = with_rasg(scene.patched(), rasg) if known_first else scene.patched(with_rasg(scene.patcher, rasg))
    literal = scene.literal(eta=0.5, noises=scene.default_noises(5))
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
