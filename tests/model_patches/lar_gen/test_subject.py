"""A subject through the host's own CLIP vision class, small but of ViT-H's width."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devtools.pack import ensure_host, pack_module
from truefill_testing.subject_weights import random_resampler

ensure_host()

import comfy.clip_vision  # noqa: E402

subject = pack_module("model_patches.lar_gen.subject")
Resampler = pack_module("model_patches.lar_gen.resampler").Resampler
for_clip = pack_module("imaging.subject").for_clip

LAYERS = 3


def small_vision(width: int = 1280, **changes: Any) -> Any:
    config = {
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "intermediate_size": 64,
        "hidden_act": "gelu",
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 56,
        "projection_dim": 8,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        **changes,
    }
    vision = comfy.clip_vision.ClipVisionModel(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vision.model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if parameter.ndim < 2 else 1.0 / parameter.shape[-1] ** 0.5
        parameter.data.copy_(scale * noise + ("norm" in name and name.endswith("weight")))
    return vision


@pytest.fixture(scope="module")
def vision() -> Any:
    return small_vision()


def subjects() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size[0], size[1], 3, generator=generator) for size in ((30, 50), (80, 20))]


def states_of(vision: Any, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """What goes into the first layer and comes out of each, read by hooks."""
    read: list[torch.Tensor] = []
    layers = vision.model.vision_model.encoder.layers
    # The next layer adds to it in place.
    handles = [layer.register_forward_hook(lambda _module, _args, out: read.append(out.clone())) for layer in layers]
    with torch.no_grad():
        vision.model(pixel_values=pixel_values)
    for handle in handles:
        handle.remove()
    assert len(read) == LAYERS
    return read


def test_the_states_that_are_read(vision: Any) -> None:
    with torch.inference_mode():
        found = subject.clip_states(vision, subjects())
    squares = torch.stack([for_clip(one) for one in subjects()]).movedim(-1, 1)
    # The host rounds to levels of 255 before it normalises.
    mean, std = (torch.tensor(of).view(1, 3, 1, 1) for of in (vision.image_mean, vision.image_std))
    read = states_of(vision, ((255 * squares).round() / 255 - mean) / std)
    assert found.own.shape == (2, 17, 1280)
    assert torch.allclose(found.own, read[-2], atol=1e-4)
    assert torch.allclose(found.details, read[-1], atol=1e-4)
    nothing = states_of(vision, torch.zeros(1, 3, 224, 224))[-2]
    assert torch.allclose(found.nothing, nothing, atol=1e-5)
    # A black or a gray picture is something else.
    for level in (0.0, 0.5):
        (other,) = subject.clip_states(vision, [torch.full((9, 9, 3), level)]).own
        assert not torch.allclose(other, nothing[0], atol=1e-2)


@pytest.mark.quick
def test_tokens_of_several_subjects_and_of_views_of_one(vision: Any) -> None:
    resampler = Resampler.from_tensors(random_resampler(output=24))
    with torch.inference_mode():
        states = subject.clip_states(vision, subjects())
        each, one = (subject.Subject(states=states, latents=None, is_one=is_one) for is_one in (False, True))
        (own, nothing), (views, same) = each.tokens(resampler), one.tokens(resampler)
    assert own.shape == (2, 4, 24) and views.shape == (1, 8, 24) and nothing.shape == (1, 4, 24)
    assert same.shape == views.shape
    assert torch.equal(views[0], own.flatten(0, 1)) and torch.equal(nothing.repeat(1, 2, 1), same)
    assert torch.allclose(own[1], resampler(states.own[1:])[0], atol=1e-5)


@pytest.mark.parametrize("width", [1024, 1664], ids=["ViT-L", "bigG"])
def test_another_vision_model_gets_one_sentence(width: int) -> None:
    with torch.inference_mode():
        states = subject.clip_states(small_vision(width), subjects()[:1])
    seen = subject.Subject(states=states, latents=None, is_one=True)
    said = rf"reads what a CLIP Vision of width 1280 sees, .* of width {width}: .* CLIP ViT-H .*https://.*models/clip_vision\.$"
    with pytest.raises(ValueError, match=f"^Assign's adapter {said}"):
        seen.tokens(Resampler.from_tensors(random_resampler(output=24)))
    with pytest.raises(ValueError, match=f"^Refine's reference network {said}"):
        seen.branch_details(1280)


def test_what_is_no_clip_gets_one_sentence(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "model_type", "siglip_vision_model")
    with pytest.raises(
        ValueError, match=r"^Encode Subject was given .* \(siglip_vision_model\), and needs CLIP ViT-H.*https://"
    ):
        subject.clip_states(vision, subjects())


def test_what_was_not_encoded_gets_one_sentence() -> None:
    blind = subject.Subject(states=None, latents=None, is_one=True)
    with pytest.raises(ValueError, match=r"^Assign.s adapter .* Load CLIP Vision .*https://.*models/clip_vision\.$"):
        blind.tokens(Resampler.from_tensors(random_resampler(output=24)))
    with pytest.raises(ValueError, match=r"^Refine .* VAE to Encode Subject\.$"):
        blind.branch_latents()
