"""Every method on a model that is not on the CPU, but on a device without float64: tensors of the two are never mixed.

No hardware is needed: see `truefill_testing.other_device`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from devtools.pack import load_pack, pack_module
from truefill_testing.area_vae import AreaVAE
from truefill_testing.joint_scene import JointScene, transformer_of
from truefill_testing.methods import METHODS, sampled
from truefill_testing.other_device import OTHER, Placed, other_device, placed
from truefill_testing.scene import Scene, forget_models, patcher_of, relative_error
from truefill_testing.small_models import small_model, small_upscaler, upscaler_conditioning
from truefill_testing.tuned_subject import learned

import comfy.model_management as host_memory  # isort: skip
import comfy.samplers  # isort: skip

load_pack()
with_method = pack_module("model_patches.core.sampling_run").with_method
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary
pilot = pack_module("model_patches.pilot.sampler")
two_stage_sampler = pack_module("model_patches.dreammix.two_stage_sampler")
region_plan = pack_module("imaging.region_plan")
upscaling = pack_module("model_patches.hd_painter.super_resolution")
Harmony = pack_module("imaging.harmonize").Harmony
tuning = pack_module("training.subject_lora.tuning")


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # PILOT has the function itself.
    monkeypatch.setattr(pilot, "get_free_memory", lambda device: host_memory.get_free_memory(device))
    host_memory.unload_all_models()
    yield
    forget_models()
    transformer_of.cache_clear()


@pytest.mark.quick
def test_the_device_is_as_strict_as_a_real_one() -> None:
    with other_device():
        there = torch.ones(2, 3).to(OTHER)
        assert there.device == OTHER and isinstance(there + 1, Placed)
        assert torch.equal((2 * there).cpu(), torch.full((2, 3), 2.0))
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            torch.add(there, torch.ones(2, 3))
        for made in (there.double, lambda: torch.zeros(2, dtype=torch.float64, device=OTHER)):
            with pytest.raises(TypeError, match=r"has no torch\.float64"):
                made()


@pytest.mark.parametrize("name", METHODS)
def test_it_does_what_it_does_on_the_cpu(name: str) -> None:
    inpainting = METHODS[name].inpainting
    expected = sampled(name, small_model("sd15", inpainting))
    host_memory.unload_all_models()
    with other_device():
        made = sampled(name, placed(small_model("sd15", inpainting)))
    assert type(made) is torch.Tensor
    assert relative_error(made, expected) < 1e-4


@pytest.mark.parametrize(
    "on",
    [
        lambda model: with_method(model, SemanticBoundary()),
        lambda model: with_method(model, PAIntA(end_percent=1.0)),
    ],
    ids=["SBC", "PAIntA"],
)
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_it_does_so_on_a_transformer(family: str, on: Callable[[Any], Any]) -> None:
    hole = torch.zeros(1, 1, 11, 14)
    hole[..., 3:9, 4:13] = 1.0
    scene = JointScene(family, hole=hole)
    expected = scene.host(on(scene.patcher))
    host_memory.unload_all_models()
    with other_device():
        made = scene.host(on(placed(scene.patcher)))
    assert relative_error(made, expected) < 1e-4


def test_two_stages_make_what_they_make_on_the_cpu() -> None:
    picture = torch.rand(1, 101, 124, 3, generator=torch.Generator().manual_seed(3))
    hole = torch.zeros(1, 101, 124)
    hole[:, 30:52, 41:80] = 1.0
    settings = two_stage_sampler.TwoStages(
        local_share=0.5, region=region_plan.RegionSettings.local(64, 0.5, 8), feather=8
    )

    def made(place: Callable[[Any], Any]) -> torch.Tensor:
        scene = Scene("sd15", True, True, torch.float32)
        guider = comfy.samplers.CFGGuider(place(scene.patcher))
        guider.set_conds(scene.positive, scene.negative)
        guider.set_cfg(2.0)
        sampler, sigmas = comfy.samplers.sampler_object("euler"), scene.sigmas("karras", 4)[1:]
        run = two_stage_sampler.Run(guider=guider, vae=AreaVAE(8), sampler=sampler, sigmas=sigmas, seed=7)
        with torch.inference_mode():
            return two_stage_sampler.sample_in_two_stages(picture, hole, run, settings, lambda text: None)[0]

    expected = made(lambda patcher: patcher)
    host_memory.unload_all_models()
    forget_models()
    with other_device():
        there = made(placed)
    assert torch.allclose(there, expected, atol=1e-4) and not torch.allclose(expected, picture, atol=0.1)


def test_a_hole_is_upscaled_as_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(1)
    picture, small = torch.rand(1, 64, 96, 3, generator=generator), torch.rand(1, 16, 24, 3, generator=generator)
    hole = torch.zeros(1, 64, 96)
    hole[:, 10:40, 20:60] = 1.0

    def made(place: Callable[[Any], Any]) -> torch.Tensor:
        positive, negative = upscaler_conditioning(torch.zeros(1, 8, 8, 3), 0, seed=1)
        model = place(small_upscaler())
        diffusion = upscaling.Diffusion(model=model, positive=positive, negative=negative, vae=AreaVAE(4))
        sampling, layout = upscaling.UpscaleSampling(steps=2, seed=3), upscaling.Layout(tile=64)
        with torch.inference_mode():
            return upscaling.upscale_hole(picture, small, hole, diffusion, None, sampling, layout, Harmony("off"))

    # The stand-in's attention is this one.
    with sdpa_kernel(SDPBackend.MATH):
        expected = made(lambda patcher: patcher)
    host_memory.unload_all_models()
    with other_device():
        there = made(placed)
    assert torch.allclose(there, expected, atol=1e-4) and not torch.allclose(expected, picture, atol=0.1)


def test_a_subject_is_learned_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes any weight that is no plain tensor for a quantized one.
    monkeypatch.setattr(tuning, "check", lambda model: None)
    expected = learned(patcher_of("sd15", False, torch.float32))
    host_memory.unload_all_models()
    forget_models()
    with other_device():
        made = learned(placed(patcher_of("sd15", False, torch.float32)))
    assert expected.any() and float((made - expected).norm() / expected.norm()) < 1e-4
