"""LAR-Gen's checkpoint, put together from random weights of the published names and shapes, through the host's loaders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from devtools.pack import load_pack, pack_module
from truefill_testing.checkpoints import checkpoint
from truefill_testing.stand_ins import SMALL_CLIP_H
from truefill_testing.subject_weights import write_adapter, write_vision

load_pack()

import comfy.clip_vision  # noqa: E402
import comfy.sd  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402

lar_gen = pack_module("weights.lar_gen")
loading = pack_module("model_patches.lar_gen.checkpoint")
branches = pack_module("model_patches.lar_gen.branch")
unet_attention = pack_module("model_patches.core.unet_attention")


def autoencoder() -> dict[str, torch.Tensor]:
    """SDXL's, all zeros."""
    config = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    with torch.device("meta"):
        found = AutoencoderKL(ddconfig=config, embed_dim=4).state_dict()
    return {f"first_stage_model.{name}": torch.zeros(of.shape) for name, of in found.items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As `read_checkpoint` gives them; the reference network is the UNet's own weights, with 4 input channels."""
    folder: Path = tmp_path_factory.mktemp("largen")
    write_adapter(folder / "adapter.safetensors", checkpoint("sdxl", inpainting=True))
    write_vision(folder / "vision.safetensors")
    state = load_file(checkpoint("sdxl", inpainting=True))
    # The random checkpoint has a smaller autoencoder, which no LAR-Gen file has.
    state = {
        name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.")
    } | autoencoder()
    prefix = "model.diffusion_model."
    for key in [key for key in state if key.startswith(prefix) and ".out." not in key]:
        tensor = state[key]
        if key == f"{prefix}input_blocks.0.0.weight":
            tensor = tensor[:, :4]
        state[f"{prefix}ref_{key.removeprefix(prefix)}"] = tensor
    subject = load_file(folder / "adapter.safetensors")
    embedder = "conditioner.embedders.5."
    places = [
        key.removesuffix("to_k.weight")
        for key in sorted(state)
        if key.endswith("attn2.to_k.weight") and "ref_" not in key
    ]
    for place in places:
        inner = state[f"{place}to_k.weight"].shape
        for kind in ("to_k", "to_v"):
            state[f"{place}{kind}_ip.weight"] = torch.zeros(inner)
    state |= {
        f"{embedder}image_proj_model.{name.removeprefix('image_proj.')}": tensor
        for name, tensor in subject.items()
        if name.startswith("image_proj.")
    }
    state |= {f"{embedder}image_encoder.{name}": of for name, of in load_file(folder / "vision.safetensors").items()}
    state |= {
        f"{embedder}patch_projector.weight": torch.zeros(2048, 1280),
        f"{embedder}patch_projector.bias": torch.ones(2048),
    }
    return lar_gen.take_apart(state, "largen.pth")


@pytest.fixture
def _small_vision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.clip_vision.ClipVisionModel, "__init__", comfy.clip_vision.ClipVisionModel.__init__)
    monkeypatch.syspath_prepend(str(SMALL_CLIP_H.parent))
    sys.modules.pop("small_clip_h", None)
    __import__("small_clip_h")


@pytest.mark.usefixtures("_small_vision")
def test_the_hosts_loaders_take_every_part(parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, clip, vae, vision, pooled = loading.load_checkpoint(parts.base, parts.vision, "largen.pth")
    assert "missing" not in caplog.text.replace("left over", "")
    unet = model.model.diffusion_model
    assert type(model.model).__name__ == "SDXL" and unet.in_channels == 9
    assert pooled.shape == (1, 1280)
    again = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)[1]
    assert torch.equal(pooled, again)
    assert vision.config["hidden_size"] == 1280
    assert vae.latent_channels == 4
    places = [t.place for t in unet_attention.transformer_places(unet)]
    assert parts.subject.by_place(places).keys() == set(places)
    branch = branches.branch_from_tensors(parts.subject.branch, parts.subject.detail, pooled, "largen.pth")
    own = branch.model.model.diffusion_model
    assert own.in_channels == 4 and [t.place for t in unet_attention.transformer_places(own)] == places
    for name, weight in own.named_parameters():
        expected = dict(unet.named_parameters())[name]
        expected = expected[:, :4] if name == "input_blocks.0.0.weight" else expected
        if not name.startswith("out."):
            assert torch.equal(weight, expected), name


@pytest.mark.parametrize("part", ["CLIP Vision", "UNet"])
def test_a_part_that_the_host_does_not_know_is_named(parts: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, vision = parts.base, parts.vision
    if part == "CLIP Vision":
        monkeypatch.setattr(
            comfy.sd, "load_state_dict_guess_config", lambda *_, **__: (object(), object(), object(), None)
        )
        vision = {"x": torch.zeros(1)}
    else:
        base = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}
        vision = {"x": torch.zeros(1)}
        monkeypatch.setattr(comfy.sd, "load_state_dict_guess_config", lambda *_, **__: None)
    with pytest.raises(ValueError, match=rf"^largen\.pth is incomplete or changed: ComfyUI finds no {part} in it"):
        loading.load_checkpoint(base, vision, "largen.pth")


def test_a_reference_network_without_its_projection_gets_one_sentence(parts: Any) -> None:
    with pytest.raises(ValueError, match=r"^largen\.pth has a reference network without a detail projection .*\.$"):
        branches.branch_from_tensors(parts.subject.branch, {}, None, "largen.pth")
