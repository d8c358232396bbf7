"""The random checkpoints are what the host takes for SD1.5, SD2 and SDXL, and they work."""

from __future__ import annotations

import logging
import runpy

import pytest
import torch

from devtools.pack import ensure_host
from truefill_testing.checkpoints import FAMILIES, checkpoint, write_checkpoint
from truefill_testing.stand_ins import SMALL_TEXT_ENCODERS

CONFIG = {"sd15": "SD15", "sd2": "SD20", "sdxl": "SDXL"}


@pytest.mark.parametrize("inpainting", [False, True], ids=["plain", "inpainting"])
@pytest.mark.parametrize("family", FAMILIES)
def test_host_loads_encodes_and_samples(family: str, inpainting: bool, caplog: pytest.LogCaptureFixture) -> None:
    ensure_host()
    import comfy.sd

    import nodes

    with caplog.at_level(logging.WARNING), torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint(family, inpainting)))
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
        assert type(model.model.model_config).__name__ == CONFIG[family]
        assert bool(model.model.concat_keys) == inpainting

        positive, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red fox in the snow", "blurry")
        )
        assert torch.isfinite(positive[0][0]).all() and not torch.equal(positive[0][0], negative[0][0])
        pooled = positive[0][1]["pooled_output"]
        assert torch.isfinite(pooled).all()
        if family == "sdxl":
            assert not torch.equal(pooled, negative[0][1]["pooled_output"])

        pixels = torch.rand(1, 128, 64, 3)
        if inpainting:
            mask = torch.zeros(1, 128, 64)
            mask[:, 32:96, 16:48] = 1
            positive, negative, latent = nodes.InpaintModelConditioning().encode(
                positive, negative, pixels, vae, mask, noise_mask=True
            )
        else:
            latent = {"samples": vae.encode(pixels)}
        (result,) = nodes.common_ksampler(model, 0, 2, 5.0, "euler", "normal", positive, negative, latent)
        samples = result["samples"]
        assert samples.shape == (1, 4, 16, 8)
        assert torch.isfinite(samples).all() and 0.1 < samples.std() < 1000
        image = vae.decode(samples)
        assert image.shape == (1, 128, 64, 3) and torch.isfinite(image).all() and image.std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_servers_text_encoders_of_few_layers_encode_as_whole_ones(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_host()
    import comfy.clip_model
    import comfy.sd

    def encoded() -> tuple[int, torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            _, clip, *_ = comfy.sd.load_checkpoint_guess_config(
                str(checkpoint(family, inpainting=False)), output_vae=False, output_model=False
            )
            layers = sum(isinstance(part, comfy.clip_model.CLIPLayer) for part in clip.cond_stage_model.modules())
            tokens = clip.tokenize("a (red:1.3) fox in the snow")
            return layers, *clip.encode_from_tokens(tokens, return_pooled=True)

    text_model = comfy.clip_model.CLIPTextModel
    whole = encoded()
    # Put back after the test.
    monkeypatch.setattr(text_model, "__init__", text_model.__init__)
    runpy.run_path(str(SMALL_TEXT_ENCODERS / "__init__.py"))
    few = encoded()
    assert few[0] < whole[0]
    assert torch.equal(few[1], whole[1]) and torch.equal(few[2], whole[2])


def test_host_takes_the_x4_upscaler_and_its_vae_for_what_they_are(caplog: pytest.LogCaptureFixture) -> None:
    ensure_host()
    import comfy.sd

    with caplog.at_level(logging.WARNING), torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint("x4", inpainting=False)))
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
        assert type(model.model).__name__ == "SD_X4Upscaler" and model.model.model_type.name == "V_PREDICTION"
        assert clip.encode_from_tokens(clip.tokenize("a red fox")).shape == (1, 77, 1024)
        latent = vae.encode(torch.rand(1, 64, 32, 3))
        assert latent.shape == (1, 4, 16, 8) and torch.isfinite(latent).all()
        picture = vae.decode(latent)
        assert picture.shape == (1, 64, 32, 3) and torch.isfinite(picture).all() and picture.std() > 0.01


def test_same_seed_same_file(tmp_path) -> None:
    first = write_checkpoint(tmp_path / "a.safetensors", "sd15", inpainting=False, seed=3)
    second = write_checkpoint(tmp_path / "b.safetensors", "sd15", inpainting=False, seed=3)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_unknown_family_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="'flux'; choose one of sd15, sd2, sdxl"):
        write_checkpoint(tmp_path / "x.safetensors", "flux", inpainting=True)
