"""Exported files, of untrained networks, in the host's own classes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from truefill_testing.host import ensure_host, pack_module

ensure_host()

import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.taesd.taesd  # noqa: E402

demo_models = pack_module("training.demo_models")
export = pack_module("training.export")
loop = pack_module("training.loop")
narrow_taesd = pack_module("training.narrow_taesd")
vocabulary = pack_module("training.vocabulary")
Classifier = pack_module("training.classifier").Classifier


class Untrained(loop.Task):
    """A stage that only has weights."""

    def __init__(self, name: str, **networks: torch.nn.Module) -> None:
        self.name, self.networks = name, torch.nn.ModuleDict(networks)

    def batch(self, seed, step, size):
        raise NotImplementedError

    def losses(self, batch, generator):
        raise NotImplementedError


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    unet = demo_models.new_unet(4, seed=0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return {
        "vae": narrow_taesd.NarrowTAESD(),
        "text": demo_models.TextEncoder(vocabulary.world_vocabulary(), seed=1),
        "text2image": unet,
        "inpaint": demo_models.inpainting_unet(unet.state_dict()),
        "classifier": Classifier(),
    }


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    stages = (
        Untrained("vae", vae=networks["vae"]),
        Untrained("text2image", unet=networks["text2image"], text=networks["text"]),
        Untrained("inpaint", unet=networks["inpaint"]),
        Untrained("classifier", classifier=networks["classifier"]),
    )
    settings = loop.Settings(steps=1, batch=1, learning_rate=1e-3)
    for stage in stages:
        loop.Trainer(stage, settings, folder / "runs" / stage.name, torch.device("cpu")).save()
    written = export.export(folder / "runs", folder / "out")
    assert [path.name for path in written] == list(export.FILES.values())
    return dict(zip(export.FILES, written, strict=True))


def test_everything_together_is_small(files):
    assert sum(path.stat().st_size for path in files.values()) < 40e6
    for path in files.values():
        kinds = {tensor.dtype for name, tensor in load_file(path).items() if name != "token_ids"}
        assert kinds == {torch.float16}


def test_the_host_takes_the_vae_for_a_taesd(files, networks):
    vae = comfy.sd.VAE(sd=load_file(files["vae"]))
    assert isinstance(vae.first_stage_model, comfy.taesd.taesd.TAESD)
    pixels = torch.rand(1, 64, 64, 3)
    latent = vae.encode(pixels)
    assert latent.shape == (1, 4, 8, 8)
    with torch.no_grad():
        expected = networks["vae"].encode(pixels.movedim(-1, 1))
        torch.testing.assert_close(latent.float().cpu() * demo_models.LATENT_SCALE, expected, atol=0.02, rtol=0.02)
        decoded = networks["vae"].decode(expected).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(vae.decode(latent).float().cpu(), decoded, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("name", "channels"), [("text2image", 4), ("inpaint", 9)])
def test_the_hosts_model_takes_the_unet(files, networks, name, channels):
    model = demo_models.host_model(export.read_unet(files[name]))
    assert model.diffusion_model.in_channels == channels
    assert (len(model.concat_keys) > 0) == (channels == 9)
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, demo_models.CONTEXT_DIM)
    known = torch.randn(2, 5, 16, 16) if channels == 9 else None
    sigma = model.model_sampling.sigma(torch.tensor([300, 300]))
    with torch.no_grad():
        denoised = model.apply_model(x, sigma, c_concat=known, c_crossattn=context)
        scaled = x / (sigma[:, None, None, None] ** 2 + 1).sqrt()
        inputs = scaled if known is None else torch.cat([scaled, known], dim=1)
        noise = demo_models.predict_noise(networks[name], inputs, torch.tensor([300, 300]), context)
    torch.testing.assert_close(denoised, x - sigma[:, None, None, None] * noise, atol=0.05, rtol=0.05)


def test_a_unet_of_another_size_is_refused(files):
    state = export.read_unet(files["inpaint"])
    state["input_blocks.0.0.bias"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        demo_models.host_model(state)


def test_the_hosts_clip_takes_the_text_encoder(files, networks):
    target = comfy.supported_models.SD15(demo_models.unet_config(4)).clip_target()
    target.params = {}
    clip = comfy.sd.CLIP(target, model_options=demo_models.clip_options())
    missing, unexpected = clip.load_sd(export.read_text(files["text"]))
    assert not missing and not unexpected
    caption = "a red striped star and a blue circle on a wooden table"
    context = clip.encode_from_tokens(clip.tokenize(caption)).float().cpu()
    with torch.no_grad():
        expected = networks["text"](vocabulary.world_vocabulary().batch([caption]))
    torch.testing.assert_close(context, expected, atol=0.02, rtol=0.02)
    # Words the world does not have are all the same to it, and do no harm.
    unknown = [clip.encode_from_tokens(clip.tokenize(f"a {word} on the sand")) for word in ("dog", "cat")]
    assert torch.equal(*unknown)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train one first"):
        export.export(tmp_path, tmp_path / "out")
