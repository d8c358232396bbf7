"""What the benchmarks of time and memory run on: UNets of both families, here with few channels, and a picture for them."""

from __future__ import annotations

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.scene import forget_models

full_size = pack_module("evaluation.full_size")

import comfy.model_base  # noqa: E402
import comfy.samplers  # noqa: E402

CPU = torch.device("cpu")
SMALL = {
    "SD1.5": {"model_channels": 32, "num_heads": 2},
    "SDXL": {"model_channels": 64, "transformer_depth_middle": 1},
}
HOSTS = {"SD1.5": comfy.model_base.BaseModel, "SDXL": comfy.model_base.SDXL}


@pytest.mark.parametrize("inpainting", [True, False])
@pytest.mark.parametrize("family", HOSTS)
def test_a_model_of_each_family_samples_its_picture(
    monkeypatch: pytest.MonkeyPatch, family: str, inpainting: bool
) -> None:
    host_class, unet = full_size.FAMILIES[family]
    monkeypatch.setitem(full_size.FAMILIES, family, (host_class, {**unet, **SMALL[family]}))
    model = full_size.full_size_model(CPU, torch.float32, inpainting, family)
    scene = full_size.Scene(64, family)
    seen: list[torch.Tensor] = []

    def note(step: int, denoised: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        seen.append(denoised)

    with torch.inference_mode():
        scene.sample(model, comfy.samplers.sampler_object("euler"), callback=note)
    assert type(model.model) is HOSTS[family]
    assert model.model.diffusion_model.in_channels == (9 if inpainting else 4)
    (denoised,) = seen
    assert denoised.shape == scene.noise.shape and bool(denoised.isfinite().all())
    forget_models()
