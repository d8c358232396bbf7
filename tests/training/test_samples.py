"""The grids that models are judged by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from devtools.pack import pack_module

demo_models = pack_module("training.demo.networks")
narrow_taesd = pack_module("training.demo.narrow_taesd")
samples = pack_module("training.demo.samples")
triplets = pack_module("training.world.triplets")
vocabulary = pack_module("training.demo.vocabulary")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text():
    return demo_models.TextEncoder(vocabulary.world_vocabulary(), seed=0)


def test_every_picture_has_room_for_its_caption():
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    image = samples.grid([[picture, picture], [picture]], [["a", "a red striped star on the sand"], ["b"]])
    assert image.width == 128 and image.height > 2 * 64 + 24
    # Words are drawn on white, below black pictures.
    assert np.asarray(image)[64:].min() < 128


def test_the_world_can_be_shown():
    image = samples.world_grid(columns=2, rows=1, side=96)
    assert image.width == 192 and len(np.unique(np.asarray(image)[:96])) > 50


def test_text_to_image_samples_repeat(text):
    unet, words = demo_models.new_unet(4, seed=0), vocabulary.world_vocabulary()
    captions = ["a red star", "a blue ring on the sand"]
    first, again = (samples.sample(unet, text, words, captions, CPU, steps=2) for _ in range(2))
    assert first.shape == (2, 4, 32, 32) and torch.equal(first, again)


def test_inpainting_samples_keep_what_is_known(text):
    unet, vae = demo_models.new_unet(9, seed=0), narrow_taesd.NarrowTAESD()
    image = samples.inpaint_grid(unet, text, vae, vocabulary.world_vocabulary(), CPU, count=1, steps=2)
    triplet = triplets.make_triplet("dev", 0)
    lower = np.asarray(image)[image.height // 2 :][:256]
    known = ~triplet.hole
    np.testing.assert_array_equal(lower[known], triplet.scene.picture[known])
    assert (lower != triplet.scene.picture)[triplet.hole].any()
