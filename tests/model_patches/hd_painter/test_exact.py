"""PAIntA and RASG through the host's real sampling, against the literal float64 forms.

Errors are the greatest absolute difference over the standard deviation of the literal result. With float64 weights what
remains is the host's own rounding (it keeps latents in float32); `test_float32_is_as_exact_as_the_host` bounds float32.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.literal_sampling import PaintaSettings, training_betas
from truefill_testing.pairwise import all_pairs
from truefill_testing.scene import Scene, boxes, forget_models, relative_error
from truefill_testing.small_models import FAMILIES

import comfy.samplers  # isort: skip

sampling_run = pack_module("model_patches.core.sampling_run")
unet_attention = pack_module("model_patches.core.unet_attention")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG

TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


def with_guidance(scene: Scene, painta: bool, rasg: bool, eta: float = 0.1, **options):
    model = scene.patcher
    if painta:
        model = sampling_run.with_method(model, PAIntA(**options))
    if rasg:
        model = sampling_run.with_method(model, RASG(eta=eta))
    return model


def literal_options(painta: bool, rasg: bool, eta: float = 0.1, **options) -> dict:
    return {
        "painta": PaintaSettings(**options) if painta else None,
        "guidance": "rasg" if rasg else None,
        "eta": eta,
    }


def error(scene: Scene, sigmas: torch.Tensor, painta: bool, rasg: bool, **options) -> float:
    ours = scene.host(sigmas, with_guidance(scene, painta, rasg, **options))
    literal = scene.literal_latent(sigmas, **literal_options(painta, rasg, **options))
    plain = scene.literal_latent(sigmas)
    assert relative_error(ours, plain) > 1e-3, "the guidance changed nothing, so nothing was tested"
    return relative_error(ours, literal)


GUIDANCE = {"PAIntA": (True, False), "RASG": (False, True), "both": (True, True)}
which = pytest.mark.parametrize(("painta", "rasg"), list(GUIDANCE.values()), ids=list(GUIDANCE))


# What a checkpoint is, and where its hole is known from: its own channels, the latent's mask, or both.
MODELS = {"inpainting, masked": (True, True), "inpainting": (True, False), "plain, masked": (False, True)}


@pytest.mark.parametrize(("family", "model", "guidance"), all_pairs(FAMILIES, MODELS, GUIDANCE))
def test_every_family(family: str, model: str, guidance: str) -> None:
    scene = Scene(family, *MODELS[model])
    assert error(scene, scene.sigmas("simple", 4), *GUIDANCE[guidance]) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "size", "guidance"), all_pairs(FAMILIES, [(49, 65), (64, 64), (48, 72)], GUIDANCE), ids=str
)
def test_real_sizes(family: str, size: tuple[int, int], guidance: str) -> None:
    """520x392, 512x512 and 576x384 pixels; the step is one in which PAIntA acts."""
    height, width = size
    hole = boxes(size, (slice(height // 4, height // 2 + 3), slice(width // 3, width - 5)))
    scene = Scene(family, True, True, hole=hole)
    sigmas = scene.sigmas("simple", 4)[1:3]
    ours = scene.host(sigmas, with_guidance(scene, *GUIDANCE[guidance]))
    assert relative_error(ours, scene.literal_latent(sigmas, **literal_options(*GUIDANCE[guidance]))) < TOLERANCE


LEVELS = {"1/32": (4,), "1/16": (2,), "both": (2, 4)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", ["1/16", "both"])
def test_rasg_on_another_grid(family: str, grid: str) -> None:
    """Odd sides, and different holes."""
    scene = Scene(family, True, True)
    sigmas = scene.sigmas("simple", 3)
    ours = scene.host(sigmas, sampling_run.with_method(scene.patcher, RASG(eta=0.1, grid=grid)))
    on_paper_grid = scene.literal_latent(sigmas, **literal_options(False, True))
    literal = scene.literal_latent(sigmas, **literal_options(False, True), levels=LEVELS[grid])
    assert relative_error(on_paper_grid, literal) > 1e-3
    assert relative_error(ours, literal) < TOLERANCE


@pytest.mark.parametrize(
    ("pixels", "grid"),
    [
        ((512, 512), "1/32"),
        ((768, 768), "1/32"),
        ((768, 512), "1/32"),
        ((1024, 1024), "1/32"),
        ((2048, 512), "1/32"),
        ((256, 256), "1/16"),
        ((320, 256), "1/16"),
        ((360, 360), "1/16"),
        ((368, 368), "1/32"),
        ((56, 2048), "1/16"),
        ((8, 8), "1/16"),
    ],
    ids=str,
)
def test_the_picture_says_which_grid_is_read(pixels: tuple[int, int], grid: str) -> None:
    """The one whose side, as a ratio, is nearest to the paper's 16."""
    assert unet_attention.chosen_factors("auto", (pixels[0] // 8, pixels[1] // 8)) == LEVELS[grid]


@pytest.mark.parametrize(("size", "grid"), [((16, 13), "1/16"), ((46, 46), "1/32")], ids=str)
def test_auto_is_that_grid(size: tuple[int, int], grid: str) -> None:
    scene = Scene("sd15", False, True, torch.float32, hole=boxes(size, (slice(3, 9), slice(4, 11))))
    sigmas = scene.sigmas("simple", 2)
    auto, chosen = (
        scene.host(sigmas, sampling_run.with_method(scene.patcher, RASG(eta=0.1, grid=one))) for one in ("auto", grid)
    )
    assert torch.equal(auto, chosen)


@which
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_three_pictures_with_different_holes(family: str, painta: bool, rasg: bool) -> None:
    hole = boxes((13, 16), (slice(2, 7), slice(3, 16)), (slice(0, 13), slice(0, 4)), (slice(5, 12), slice(7, 12)))
    scene = Scene(family, True, True, hole=hole)
    assert error(scene, scene.sigmas("simple", 3), painta, rasg) < TOLERANCE


HOLES = {
    "one cell": boxes((12, 16), (slice(5, 6), slice(9, 10))),
    "half": boxes((12, 16), (slice(0, 12), slice(0, 8))),
    "all but one cell": 1.0 - boxes((12, 16), (slice(11, 12), slice(15, 16))),
    "all": torch.ones(1, 1, 12, 16),
}


@which
@pytest.mark.parametrize("name", list(HOLES))
def test_holes(name: str, painta: bool, rasg: bool) -> None:
    scene = Scene("sd15", False, True, hole=HOLES[name])
    sigmas = scene.sigmas("simple", 2)
    ours = scene.host(sigmas, with_guidance(scene, painta, rasg))
    literal = scene.literal_latent(sigmas, **literal_options(painta, rasg))
    # Where all but one cell is known the deviation is small; the host's float32 latents round with their range.
    assert float((ours - literal).abs().max() / literal.abs().max()) < TOLERANCE / 5
    # Without a known pixel (at the levels where it acts) PAIntA has nothing to turn down.
    unchanged = torch.equal(ours, scene.host(sigmas))
    assert unchanged == (painta and not rasg and name in ("all", "all but one cell"))


@which
@pytest.mark.parametrize("inpainting", [True, False])
def test_no_hole_is_no_node(inpainting: bool, painta: bool, rasg: bool) -> None:
    scene = Scene("sd15", inpainting, True, hole=torch.zeros(2, 1, 12, 16))
    sigmas = scene.sigmas("simple", 3)
    assert torch.equal(scene.host(sigmas, with_guidance(scene, painta, rasg)), scene.host(sigmas))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_strength_0_is_no_node(sampler: str) -> None:
    scene = Scene("sd15", True, True)
    sigmas = scene.sigmas("simple", 3)
    model = sampling_run.with_method(scene.patcher, PAIntA(strength=0.0))
    model = sampling_run.with_method(model, RASG(strength=0.0))
    assert torch.equal(scene.host(sigmas, model, sampler), scene.host(sigmas, sampler=sampler))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_strength_and_smoothing_of_painta(family: str) -> None:
    scene = Scene(family, True, True)
    sigmas = scene.sigmas("simple", 3)
    assert error(scene, sigmas, True, False, strength=0.4) < TOLERANCE
    assert error(scene, sigmas, True, False, smooth=False) < TOLERANCE


@which
def test_cfg_1_runs_the_conditional_half_alone(painta: bool, rasg: bool) -> None:
    scene = Scene("sd15", True, True)
    sigmas = scene.sigmas("simple", 3)
    ours = scene.host(sigmas, with_guidance(scene, painta, rasg), cfg=1.0)
    literal = scene.literal_latent(sigmas, cfg=1.0, **literal_options(painta, rasg))
    assert relative_error(ours, literal) < TOLERANCE


@pytest.mark.parametrize("painta", [False, True])
@pytest.mark.parametrize("v_prediction", [False, True])
def test_eta_0_is_the_deterministic_sampler(v_prediction: bool, painta: bool) -> None:
    scene = Scene("sd2", False, True, v_prediction=v_prediction)
    sigmas = scene.sigmas("karras", 3)
    model = with_guidance(scene, painta, True, eta=0.0)
    deterministic = scene.host(sigmas, with_guidance(scene, painta, False))
    assert relative_error(scene.host(sigmas, model), deterministic) < TOLERANCE
    assert relative_error(scene.host(sigmas, model, "euler_ancestral"), deterministic) < TOLERANCE


@pytest.mark.parametrize("sampler", ["euler", "ddim", "euler_ancestral"])
def test_released_sigma(sampler: str) -> None:
    scene = Scene("sd15", True, masked=False)
    sigmas = scene.sigmas("simple", 4)
    model = sampling_run.with_method(scene.patcher, RASG(eta=0.25, sigma="released"))
    literal = scene.literal_latent(sigmas, eta=0.25, sigma_choice="released", betas=training_betas(), guidance="rasg")
    ours = scene.host(sigmas, model, sampler)
    assert relative_error(ours, literal) < TOLERANCE
    assert relative_error(ours, scene.literal_latent(sigmas)) > 1e-4


class _Swapped(comfy.samplers.CFGGuider):
    """A guider that lists the negative prompt first, and so has the host's rows the other way round."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = [self.conds["negative"], self.conds["positive"]]
        uncond, cond = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return comfy.samplers.cfg_function(self.inner_model, cond, uncond, self.cfg, x, timestep, model_options)


@which
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_rows_in_any_order(family: str, painta: bool, rasg: bool) -> None:
    scene = Scene(family, True, True)
    sigmas = scene.sigmas("simple", 3)
    arguments = scene.host_arguments()
    guider = _Swapped(with_guidance(scene, painta, rasg))
    guider.set_conds(arguments["positive"], arguments["negative"])
    guider.set_cfg(scene.CFG)
    literal = scene.literal_latent(sigmas, **literal_options(painta, rasg))
    assert relative_error(scene.host_by_guider(guider, sigmas), literal) < TOLERANCE


@which
def test_halves_split_for_want_of_memory(painta: bool, rasg: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short of memory the host runs the negative prompt by itself, and first."""
    scene = Scene("sd15", True, True)
    sigmas = scene.sigmas("simple", 3)
    model = with_guidance(scene, painta, rasg)
    calls: list[list[int]] = []

    def note(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        calls.append(transformer_options["cond_or_uncond"])
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("diffusion_model", "test", note)
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    ours = scene.host(sigmas, model)
    assert all(len(rows) == 1 for rows in calls)
    literal = scene.literal_latent(sigmas, **literal_options(painta, rasg))
    assert relative_error(ours, literal) < TOLERANCE


def test_memory_that_runs_short_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative half, now first and alone, must not take the relevance of the step before."""
    scene = Scene("sd15", True, True)
    sigmas = scene.sigmas("simple", 6)
    model = with_guidance(scene, True, False)
    calls: list[int] = []

    def free_memory(self, device):
        calls.append(1)
        return 0 if len(calls) > 1 else 2**50

    monkeypatch.setattr(type(model), "get_free_memory", free_memory)
    literal = scene.literal_latent(sigmas, **literal_options(True, False))
    assert relative_error(scene.host(sigmas, model), literal) < TOLERANCE


def test_a_mask_input_overrules_the_masks_of_the_graph() -> None:
    """The scene's latents are sampled under one mask, and guided by another, given in pixels."""
    scene = Scene("sd15", True, True)
    sigmas = scene.sigmas("simple", 3)
    other = boxes((16, 13), (slice(0, 8), slice(0, 13)), (slice(8, 16), slice(2, 13)))
    pixels = torch.nn.functional.interpolate(other, scale_factor=8)[:, 0]
    model = sampling_run.with_method(scene.patcher, PAIntA(mask=pixels))
    model = sampling_run.with_method(model, RASG(eta=0.1, mask=pixels))
    literal = scene.literal_latent(sigmas, guided_hole=other, **literal_options(True, True))
    assert relative_error(scene.host(sigmas, model), literal) < TOLERANCE


QUICK = (("sd15", "PAIntA"), ("sd2", "RASG"), ("sdxl", "both"))


@pytest.mark.parametrize(
    ("family", "guidance"),
    [
        pytest.param(*case, marks=[pytest.mark.quick] if case in QUICK else [])
        for case in itertools.product(FAMILIES, GUIDANCE)
    ],
)
def test_float32_is_as_exact_as_the_host(family: str, guidance: str) -> None:
    """One evaluation and step in float32: the error is the host's own, within a factor, and 1e-5 of the latent's range."""
    scene = Scene(family, True, True, torch.float32)
    sigmas = scene.sigmas("simple", 4)[1:3]
    ours = scene.host(sigmas, with_guidance(scene, *GUIDANCE[guidance]))
    literal = scene.literal_latent(sigmas, **literal_options(*GUIDANCE[guidance]))
    assert float((ours - literal).abs().max() / literal.abs().max()) < 1e-5
    hosts_own = relative_error(scene.host(sigmas), scene.literal_latent(sigmas))
    assert relative_error(ours, literal) < max(4 * hosts_own, 1e-5)
