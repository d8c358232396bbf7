"""Exported files, of untrained networks, in the host's own classes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from devtools.pack import ensure_host, pack_module
from truefill_testing.demo_weights import untrained_networks, write_untrained

ensure_host()

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.taesd.taesd  # noqa: E402

demo_models = pack_module("training.demo.networks")
export = pack_module("training.demo.export")
vocabulary = pack_module("training.demo.vocabulary")
demo_model = pack_module("weights.demo_model")


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    return untrained_networks()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_untrained(tmp_path_factory.mktemp("export"))
    return {name: folder / file for name, file in demo_model.FILES.items()}


def test_the_recipe_says_how_each_stage_was_trained(files):
    recipe = json.loads((files["vae"].parent / "recipe.json").read_text())
    assert recipe["world_version"] == pack_module("training.world.attributes").WORLD_VERSION
    assert list(recipe["stages"]) == ["vae", "text2image", "inpaint", "classifier"]
    stage = recipe["stages"]["inpaint"]
    assert (stage["steps"], stage["trained_steps"], stage["learning_rate"], stage["seed"]) == (1, 0, 1e-3, 0)
    # A run that has not ended has no figures.
    assert stage["figures"] == {}


def test_stages_that_were_not_trained_again_stay_in_the_recipe(files, tmp_path):
    record = tmp_path / "out" / "recipe.json"
    record.parent.mkdir()
    theirs = {"steps": 7, "figures": {"dev_loss": 0.5}}
    record.write_text(json.dumps({"world_version": 1, "torch": "1.0", "stages": {"elsewhere": theirs, "vae": {}}}))
    write_untrained(tmp_path)
    stages = json.loads(record.read_text())["stages"]
    assert stages["elsewhere"] == theirs
    assert stages["vae"]["steps"] == 1 and "inpaint" in stages

    record.write_text(json.dumps({"world_version": 0, "stages": {}}))
    with pytest.raises(ValueError, match="is of version 0 of the world"):
        write_untrained(tmp_path)


def test_everything_together_is_small(files):
    assert sum(path.stat().st_size for path in files.values()) < 40e6
    for path in files.values():
        kinds = {tensor.dtype for name, tensor in load_file(path).items() if name != "token_ids"}
        assert kinds == {torch.float16}


def test_the_host_takes_the_vae_for_a_taesd(files, networks):
    vae = demo_model.host_vae(demo_model.read("vae", files["vae"].parent))
    assert isinstance(vae.first_stage_model, comfy.taesd.taesd.TAESD)
    pixels = torch.rand(1, 64, 64, 3)
    latent = vae.encode(pixels)
    assert latent.shape == (1, 4, 8, 8)
    with torch.no_grad():
        expected = networks["vae"].encode(pixels.movedim(-1, 1))
        torch.testing.assert_close(latent.float().cpu() * demo_model.LATENT_SCALE, expected, atol=0.02, rtol=0.02)
        decoded = networks["vae"].decode(expected).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(vae.decode(latent).float().cpu(), decoded, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("name", "channels"), [("text2image", 4), ("inpaint", 9)])
def test_the_hosts_model_takes_the_unet(files, networks, name, channels):
    patcher = demo_model.host_unet(demo_model.read(name, files[name].parent))
    assert isinstance(patcher, comfy.model_patcher.CoreModelPatcher)
    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model
    assert model.diffusion_model.in_channels == channels
    assert (len(model.concat_keys) > 0) == (channels == 9)
    device = comfy.model_management.get_torch_device()
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, demo_model.CONTEXT_DIM)
    known = torch.randn(2, 5, 16, 16) if channels == 9 else None
    sigma = model.model_sampling.sigma(torch.tensor([300, 300]))
    with torch.no_grad():
        sent = [None if tensor is None else tensor.to(device) for tensor in (x, sigma, known, context)]
        denoised = model.apply_model(sent[0], sent[1], c_concat=sent[2], c_crossattn=sent[3]).cpu()
        scaled = x / (sigma[:, None, None, None] ** 2 + 1).sqrt()
        inputs = scaled if known is None else torch.cat([scaled, known], dim=1)
        noise = demo_models.predict_noise(networks[name], inputs, torch.tensor([300, 300]), context)
    torch.testing.assert_close(denoised, x - sigma[:, None, None, None] * noise, atol=0.05, rtol=0.05)


def test_a_unet_of_another_size_is_refused(files):
    state = demo_model.read("inpaint", files["inpaint"].parent)
    state["model.diffusion_model.input_blocks.0.0.bias"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        demo_model.host_unet(state)


def test_the_hosts_clip_takes_the_text_encoder(files, networks):
    clip = demo_model.host_clip(demo_model.read("text", files["text"].parent))
    caption = "a red striped star and a blue circle on a wooden table"
    context = clip.encode_from_tokens(clip.tokenize(caption)).float().cpu()
    with torch.no_grad():
        expected = networks["text"](vocabulary.world_vocabulary().batch([caption]))
    torch.testing.assert_close(context, expected, atol=0.02, rtol=0.02)
    # Words the world does not have are all the same to it, and do no harm.
    unknown = [clip.encode_from_tokens(clip.tokenize(f"a {word} on the sand")) for word in ("dog", "cat")]
    assert torch.equal(*unknown)


def test_a_text_encoder_of_another_size_is_refused(files):
    state = demo_model.read("text", files["text"].parent)
    del state["cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"]
    with pytest.raises(RuntimeError, match=r"does not fit: .*fc1\.weight"):
        demo_model.host_clip(state)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no truefill_demo_vae\.safetensors: `python dev\.py train export`"
    ):
        demo_model.read("vae", tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train one first"):
        export.export(tmp_path, tmp_path / "out")
