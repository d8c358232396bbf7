"""Refine through the host's sampling: the host with a literal reference branch in every block of its decoder, and properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing import literal_refine
from truefill_testing.literal_refine import refined_literally
from truefill_testing.pilot_scene import CALM, pilot
from truefill_testing.scene import Scene, boxes, forget_models, randn, relative_error
from truefill_testing.small_models import small_model
from truefill_testing.subject_weights import random_assign

import comfy.model_management  # isort: skip
import nodes as host_nodes  # isort: skip

load_pack()
reference = pack_module("model_patches.lar_gen.reference")
Refine = reference.Refine
branches = pack_module("model_patches.lar_gen.branch")
best_start = pack_module("model_patches.starts.best_start")
sampling_run = pack_module("model_patches.core.sampling_run")
unet_attention = pack_module("model_patches.core.unet_attention")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


def latents(subjects: int = 1, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """As a VAE gives them."""
    return 5.0 * randn(subjects, 4, *size, seed=31).float()


def refined(model: Any, z: torch.Tensor | None = None, is_one: bool = True, **options: Any) -> Any:
    settings = Refine(latents=latents() if z is None else z, is_one=is_one, **options)
    return sampling_run.with_method(model, settings)


@pytest.mark.parametrize(
    ("family", "inpainting", "subjects", "is_one", "options"),
    [
        pytest.param("sd15", True, 1, True, {}, marks=pytest.mark.quick),
        ("sd15", False, 2, False, {}),
        ("sd15", True, 3, True, {"strength": 0.6}),
        ("sd2", True, 1, True, {}),
        ("sdxl", False, 2, True, {}),
        ("sdxl", True, 2, False, {"strength": 0.6}),
    ],
)
def test_it_is_the_formula(family: str, inpainting: bool, subjects: int, is_one: bool, options: dict[str, Any]) -> None:
    scene = Scene(family, inpainting, True, v_prediction=family == "sd2")
    sigmas, z = scene.sigmas("simple", 3), latents(subjects)
    plain, ours = scene.host(sigmas), scene.host(sigmas, refined(scene.patcher, z, is_one, **options))
    with refined_literally(scene, z.double() * scene.scale, is_one, **options):
        right = scene.host(sigmas)
    assert relative_error(ours, right) < 1e-5 and relative_error(ours, plain) > 1e-2
    assert torch.equal(scene.host(sigmas), plain)


class Trained:
    """A reference network with weights of its own, and what CLIP says of so many subjects."""

    def __init__(self, family: str, subjects: int, pooled: int | None, dtype: torch.dtype = torch.float64) -> None:
        self.model = small_model(family, False, dtype, seed=7)
        width = next(
            t.cross.to_k.weight.shape[1] for t in unet_attention.transformer_places(self.model.model.diffusion_model)
        )
        self.details = randn(subjects, 6, 1280, seed=41).float()
        self.weight, self.bias = randn(width, 1280, seed=42).float() / 36, randn(width, seed=43).float()
        self.pooled = None if pooled is None else randn(1, pooled, seed=44).float()

    def settings(self) -> dict[str, Any]:
        branch = branches.Branch(model=self.model, weight=self.weight, bias=self.bias, pooled=self.pooled)
        return {"branch": branch, "details": self.details}

    def literal(self) -> Any:
        context = self.details.double() @ self.weight.double().T + self.bias.double()
        return literal_refine.Branch(self.model.model.diffusion_model, context, self.pooled)


@pytest.mark.parametrize(
    ("family", "inpainting", "subjects", "is_one", "options"),
    [
        ("sd15", True, 2, True, {}),
        ("sd15", False, 2, False, {"strength": 0.6}),
        ("sd2", True, 1, True, {}),
        ("sdxl", True, 2, True, {}),
        ("sdxl", True, 2, False, {"strength": 0.6}),
    ],
)
def test_a_trained_reference_network_is_the_formula(
    family: str, inpainting: bool, subjects: int, is_one: bool, options: dict[str, Any]
) -> None:
    scene = Scene(family, inpainting, True, v_prediction=family == "sd2")
    pooled = scene.positive[0][1]["pooled_output"].shape[1] if family == "sdxl" else None
    sigmas, z, trained = scene.sigmas("simple", 3), latents(subjects), Trained(family, subjects, pooled)
    ours = scene.host(sigmas, refined(scene.patcher, z, is_one, **trained.settings(), **options))
    with refined_literally(scene, z.double() * scene.scale, is_one, branch=trained.literal(), **options):
        right = scene.host(sigmas)
    assert relative_error(ours, right) < 1e-5
    assert relative_error(ours, scene.host(sigmas, refined(scene.patcher, z, is_one, **options))) > 1e-2


def test_the_reference_network_is_loaded_by_the_host_and_let_go() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    trained = Trained("sd15", 1, None, torch.float32)
    model = refined(scene.patcher, **trained.settings())
    (key,) = (key for key in model.additional_models if "Refine" in key)
    assert [one.model for one in model.get_additional_models_with_key(key)] == [trained.model.model]
    assert not refined(model, strength=0.0).get_additional_models_with_key(key)
    assert scene.host(scene.sigmas("simple", 1), model).isfinite().all()


@pytest.mark.quick
def test_a_reference_network_that_does_not_fit_gets_one_sentence() -> None:
    scene, other = Scene("sd15", True, True, torch.float32), Scene("sdxl", True, True, torch.float32)
    with pytest.raises(ValueError, match=r"^Refine's reference network and this MODEL have other blocks: .*\.$"):
        refined(other.patcher, **Trained("sd15", 1, None, torch.float32).settings())
    with pytest.raises(ValueError, match=r"^Refine's reference network is SDXL's, .* Load LAR-Gen, .*\.$"):
        refined(other.patcher, **Trained("sdxl", 1, None, torch.float32).settings())
    narrow = Trained("sd15", 1, None, torch.float32)
    narrow.weight = narrow.weight[:-1]
    with pytest.raises(ValueError, match=r"^Refine's reference network and this MODEL have other blocks: .*\.$"):
        refined(scene.patcher, **narrow.settings())


def test_where_a_mask_says() -> None:
    """In pixels; each cell of a grid as much as the mask covers of it."""
    scene = Scene("sd15", True, True)
    where = boxes((16, 13), (slice(0, 9), slice(2, 13)), (slice(4, 16), slice(0, 7)))
    mask = torch.nn.functional.interpolate(where, scale_factor=8)[:, 0]
    sigmas = scene.sigmas("simple", 2)

    def region(grid: tuple[int, int]) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(where.double(), grid).flatten(1)

    ours = scene.host(sigmas, refined(scene.patcher, mask=mask, strength=0.8))
    with refined_literally(scene, latents().double() * scene.scale, True, strength=0.8, region=region):
        right = scene.host(sigmas)
    assert relative_error(ours, right) < 1e-5
    assert relative_error(ours, scene.host(sigmas, refined(scene.patcher, strength=0.8))) > 1e-3


@pytest.mark.quick
def test_strength_0_an_empty_mask_and_a_closed_window_are_no_node() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)
    plain = scene.host(sigmas)
    for options in ({"strength": 0.0}, {"mask": torch.zeros(128, 104)}, {"start_percent": 1.0}):
        assert torch.equal(scene.host(sigmas, refined(scene.patcher, **options)), plain), options
    late = scene.host(sigmas, refined(scene.patcher, start_percent=0.5))
    assert relative_error(late, plain) > 1e-3
    assert relative_error(late, scene.host(sigmas, refined(scene.patcher))) > 1e-3


def test_twice_is_the_same_and_the_branchs_noise_is_of_the_runs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scene's own noise stays what it was: only the branch reads the seed."""
    scene = Scene("sd15", True, True)
    sigmas, model, arguments = scene.sigmas("simple", 2), refined(scene.patcher), scene.host_arguments
    first = scene.host(sigmas, model)
    assert torch.equal(scene.host(sigmas, model), first)
    monkeypatch.setattr(scene, "host_arguments", lambda: {**arguments(), "seed": 5})
    other = scene.host(sigmas, model)
    with refined_literally(scene, latents().double() * scene.scale, True, seed=5):
        right = scene.host(sigmas)
    assert relative_error(other, right) < 1e-5 < 1e-3 < relative_error(other, first)


@pytest.mark.quick
def test_the_branch_ends_at_the_last_block_that_is_read() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    unet, calls = scene.model.diffusion_model, []
    handles = [
        unet.out[-1].register_forward_hook(lambda *_: calls.append("out")),
        unet.time_embed[-1].register_forward_hook(lambda *_: calls.append("begun")),
    ]
    try:
        scene.host(scene.sigmas("simple", 2), refined(scene.patcher))
    finally:
        for handle in handles:
            handle.remove()
    # One pass of the branch for both prompts, and the model's own.
    assert calls == ["begun", "begun", "out"] * 2


def test_features_that_are_used_again() -> None:
    """For so many noise levels, each prompt's own; the others are what they were with a branch at each."""
    scene = Scene("sd15", True, True, torch.float32)
    sigmas, unet, calls = scene.sigmas("simple", 5), scene.model.diffusion_model, []
    exact = scene.host(sigmas, refined(scene.patcher))
    handle = unet.time_embed[-1].register_forward_hook(lambda *_: calls.append(1))
    try:
        reused = scene.host(sigmas, refined(scene.patcher, reuse=2))
    finally:
        handle.remove()
    assert len(calls) == 5 + 3
    assert 1e-4 < relative_error(reused, exact) < relative_error(scene.host(sigmas), exact)


def test_beside_the_other_methods_in_any_order() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 3)
    others = (PAIntA(end_percent=1.0), RASG(eta=0.1), SemanticBoundary(), random_assign(scene.model.diffusion_model))

    def guided(model: Any) -> Any:
        for settings in others:
            model = sampling_run.with_method(model, settings)
        return model

    for options in ({}, {"strength": 0.5}):
        together = scene.host(sigmas, refined(guided(scene.patcher), **options))
        assert torch.equal(together, scene.host(sigmas, guided(refined(scene.patcher, **options))))
        assert relative_error(together, scene.host(sigmas, guided(scene.patcher))) > 1e-3
        assert relative_error(together, scene.host(sigmas, refined(scene.patcher, **options))) > 1e-3


@pytest.mark.parametrize("memory", ["record", "recompute"])
def test_with_the_pilot_sampler(memory: str) -> None:
    """Its passes with a gradient look at the subject, too, once at each noise level."""
    scene = Scene("sd15", False, True, torch.float32)
    settings = pilot.PILOT(**CALM, interval=1, iterations=2, memory=memory)
    sigmas, unet, calls = scene.sigmas("simple", 2), scene.model.diffusion_model, []
    plain = scene.host(sigmas, sampler=pilot.pilot_sampler(settings, lambda text: None))
    handle = unet.out[-1].register_forward_hook(lambda *_: calls.append("out"))
    begun = unet.time_embed[-1].register_forward_hook(lambda *_: calls.append("begun"))
    try:
        for model in (random_assign(scene.model.diffusion_model), None):
            patched = scene.patcher if model is None else sampling_run.with_method(scene.patcher, model)
            for options in ({}, {"strength": 0.5}):
                calls.clear()
                made = scene.host(sigmas, refined(patched, **options), pilot.pilot_sampler(settings, lambda text: None))
                assert made.isfinite().all() and relative_error(made, plain) > 1e-3
                # At each level: the branch for the positive prompt and two passes, the branch for the negative one and a step.
                assert calls == ["begun", *["begun", "out"] * 2, "begun", "begun", "out"] * 2
    finally:
        handle.remove()
        begun.remove()


def test_best_start_goes_on_to_the_picture_of_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch's noise does not depend on what was sampled before."""
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 4)
    starts = best_start.BestStart(candidates=2, announce=lambda text: None)
    chosen = []
    monkeypatch.setattr(best_start, "_choice", lambda found, pictures: chosen.append(found[1].noise) or [1] * pictures)
    made = scene.host(sigmas, sampling_run.with_method(refined(scene.patcher), starts))
    (scene.noise,) = chosen
    assert torch.equal(made, scene.host(sigmas, refined(scene.patcher)))


def test_keys_of_another_pack_before_and_behind() -> None:
    """They are read with the subject and without it."""
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)

    def appended(model: Any) -> Any:
        def append(n: Any, context: Any, value: Any, extra_options: dict[str, Any]) -> Any:
            return n, torch.cat((context, 0.5 * context[:, :3]), dim=1), torch.cat((value, value[:, :3]), dim=1)

        model = model.clone()
        model.set_model_attn1_patch(append)
        return model

    theirs = scene.host(sigmas, appended(scene.patcher))
    nearly = scene.host(sigmas, refined(appended(scene.patcher), strength=1e-6))
    assert relative_error(nearly, theirs) < 1e-4 < 1e-3 < relative_error(theirs, scene.host(sigmas))
    assert relative_error(scene.host(sigmas, refined(appended(scene.patcher))), theirs) > 1e-3


def test_controlnet_areas_and_a_batch_split_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("sd15", True, True, torch.float32)
    scene.add_controlnet()
    (limited,) = host_nodes.ConditioningSetArea().append(scene.positive, 64, 64, 32, 32, 1.0)
    scene.positive = scene.positive + limited
    sigmas = scene.sigmas("simple", 2)
    model = refined(scene.patcher, latents(2), is_one=False, strength=0.7, mask=torch.ones(128, 104))
    together = scene.host(sigmas, model)
    monkeypatch.setattr(type(scene.patcher), "get_free_memory", lambda self, device: 0)
    assert relative_error(scene.host(sigmas, model), together) < 1e-4


@pytest.mark.quick
def test_each_picture_reads_its_own_subject() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas, z = scene.sigmas("simple", 2), latents(2)
    first = scene.host(sigmas, refined(scene.patcher, z, is_one=False))
    z[1] += 5.0
    second = scene.host(sigmas, refined(scene.patcher, z, is_one=False))
    assert relative_error(second[0], first[0]) < 1e-4 < 1e-2 < relative_error(second[1], first[1])


def test_subjects_of_another_size_and_odd_shape() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)
    for size in ((5, 9), (32, 32)):
        assert scene.host(sigmas, refined(scene.patcher, latents(1, size))).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    scene, single = Scene("sd15", True, True, dtype), Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)
    half, exact = (of.host(sigmas, refined(of.patcher)) for of in (scene, single))
    hosts_own = relative_error(scene.host(sigmas), single.host(sigmas))
    assert relative_error(half, exact) < 3 * hosts_own
    assert relative_error(exact, single.host(sigmas)) > 3 * hosts_own


def test_after_an_interrupt_nothing_stays_behind() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    sigmas, model = scene.sigmas("simple", 2), refined(scene.patcher, strength=0.5)
    before, expected = scene.host(sigmas), scene.host(sigmas, model)

    def interrupt(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> Any:
        raise comfy.model_management.InterruptProcessingException

    broken = model.clone()
    broken.set_model_output_block_patch(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        scene.host(sigmas, broken)
    assert torch.equal(scene.host(sigmas), before)
    assert torch.equal(scene.host(sigmas, model), expected)


@pytest.mark.quick
def test_messages() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    with pytest.raises(ValueError, match=r"^Refine was given 3 subjects for 2 pictures: .*\.$"):
        scene.host(scene.sigmas("simple", 1), refined(scene.patcher, latents(3), is_one=False))
    of_flux = torch.zeros(1, 16, 8, 8)
    with pytest.raises(
        ValueError, match=r"^Refine was given a subject's latent of 16 channels, and this MODEL's have 4: "
    ):
        refined(scene.patcher, of_flux)
    tiled = scene.patcher.clone()
    tiled.set_model_attn1_patch(lambda n, context, value, options: (n[:1], context[:1], value[:1]))
    with pytest.raises(ValueError, match=r"^Refine expected 4 rows in self-attention and found 1: another node .*\.$"):
        scene.host(scene.sigmas("simple", 1), refined(tiled))
