"""The demo networks compute what the host's classes compute, and the loss and sampler fit together."""

from __future__ import annotations

import pytest
import torch

from devtools.pack import ensure_host, pack_module

ensure_host()

import comfy.utils  # noqa: E402
from comfy.sd1_clip import SD1Tokenizer  # noqa: E402

captions = pack_module("training.world.captions")
scenes = pack_module("training.world.scenes")
demo_models = pack_module("training.demo.networks")
diffusion = pack_module("training.diffusion")
latents = pack_module("training.demo.latents")
narrow_taesd = pack_module("training.demo.narrow_taesd")
vocabulary = pack_module("training.demo.vocabulary")
demo_model = pack_module("weights.demo_model")


@pytest.fixture(scope="module")
def words():
    return vocabulary.world_vocabulary()


def test_the_vocabulary_splits_captions_as_the_host_does(words):
    tokenizer = SD1Tokenizer()
    for index in range(40):
        for caption in (scenes.scene_caption("train", index, 0), scenes.scene_caption("test", index, 1, 0.3), ""):
            (chunk,) = tokenizer.tokenize_with_weights(caption)["l"]
            rows = words.rows(caption)
            assert [int(words.token_ids[row - 1]) for row in rows] == [token for token, _ in chunk]


def test_the_vocabulary_knows_every_phrase(words):
    for phrase in captions.all_phrases():
        assert 0 not in words.rows(phrase)
    with pytest.raises(KeyError):
        words.rows("a photograph")


def test_captions_have_to_fit(words):
    with pytest.raises(ValueError, match="75 tokens"):
        words.rows("a red star " * 40)


def test_the_text_encoder_is_the_hosts(words):
    encoder = demo_models.TextEncoder(words, seed=3)
    rows = words.batch(["a red striped star", "an orange ring by the sea", ""])
    with torch.no_grad():
        expected, _, _ = encoder.text_model(
            None, embeds=encoder.text_model.embeddings.token_embedding(rows), num_tokens=[1, 1, 1]
        )
        made = encoder(rows)
    assert made.shape == (3, 77, demo_model.CONTEXT_DIM)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_the_narrow_autoencoder_is_a_taesd():
    from comfy.taesd.taesd import TAESD

    narrow, full = narrow_taesd.NarrowTAESD(seed=1), TAESD()
    with torch.no_grad():
        # Blocks start as nothing; here they have to do something.
        for parameter in narrow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    full.load_state_dict(narrow_taesd.widen(narrow.state_dict(), demo_model.LATENT_SCALE))
    pixels = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        latent = narrow.encode(pixels)
        assert latent.shape == (1, 4, 6, 8)
        host_latent = full.encode(2 * pixels - 1)
        torch.testing.assert_close(host_latent * demo_model.LATENT_SCALE, latent, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(full.decode(host_latent) / 2 + 0.5, narrow.decode(latent), atol=1e-4, rtol=1e-4)


def test_only_narrow_autoencoders_can_be_widened():
    with pytest.raises(ValueError, match="no state dict of a narrow TAESD"):
        narrow_taesd.widen({"conv.weight": torch.zeros(1)}, 1.0)


def test_the_inpainting_unet_starts_as_the_text_to_image_one():
    unet = demo_models.new_unet(4, seed=0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    inpainting = demo_models.inpainting_unet(unet.state_dict())
    x, known, context = (
        torch.randn(2, 4, 16, 16),
        torch.randn(2, 5, 16, 16),
        torch.randn(2, 77, demo_model.CONTEXT_DIM),
    )
    times = torch.tensor([10, 700])
    with torch.no_grad():
        expected = demo_models.predict_noise(unet, x, times, context)
        made = demo_models.predict_noise(inpainting, torch.cat([x, known], dim=1), times, context)
        torch.testing.assert_close(unet(x, times, context), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_holes_and_grey_are_the_hosts():
    hole = (torch.rand(1, 1, 256, 256) > 0.6).float()
    expected = comfy.utils.common_upscale(hole, 32, 32, "bilinear", "center").round()
    torch.testing.assert_close(latents.latent_hole(hole), expected)
    pixels = torch.rand(1, 3, 256, 256)
    grey = latents.with_hole(pixels, hole)
    assert (grey[(hole > 0).expand_as(grey)] == 0.5).all()
    torch.testing.assert_close(grey[(hole == 0).expand_as(grey)], pixels[(hole == 0).expand_as(grey)])


def test_a_perfect_prediction_costs_nothing_and_samples_the_picture():
    clean = torch.randn(2, 4, 8, 8)
    shares = diffusion.signal_shares()
    assert shares.shape == (1000,) and (shares.diff() < 0).all()

    def perfect(x, times):
        share = shares[times][:, None, None, None]
        return (x - share.sqrt() * clean) / (1 - share).sqrt()

    assert diffusion.noise_loss(perfect, clean, torch.Generator().manual_seed(0)) < 1e-6
    assert diffusion.noise_loss(lambda x, t: torch.zeros_like(x), clean, torch.Generator().manual_seed(0)) > 0.1
    torch.testing.assert_close(diffusion.ddim(perfect, torch.randn(2, 4, 8, 8), 10), clean, atol=1e-3, rtol=1e-3)


def test_guidance_goes_from_the_empty_caption_through_the_caption():
    context, empty = torch.ones(2, 3, 1), torch.zeros(1, 3, 1)
    predict = diffusion.guided(lambda x, times, c: c.mean(dim=(1, 2))[:, None, None, None] + 0 * x, context, empty, 4.0)
    torch.testing.assert_close(predict(torch.zeros(2, 4, 2, 2), torch.zeros(2)), torch.full((2, 4, 2, 2), 4.0))
