"""PILOT's nodes in graphs that a running ComfyUI executes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devtools.client import Client, GraphFailed, Progress
from devtools.pack import pack_module
from devtools.server import Server
from truefill_testing.graphs import hole_in, node, pictures, run_and_interrupt, scaled_photo

morphology = pack_module("imaging.morphology")

# Sizes that no VAE takes as they are.
WIDTH, HEIGHT, FEATHER = 131, 99, 4
METHOD = {
    "preset": "text",
    "coherence": 1.0,
    "interval": 2,
    "iterations": 2,
    "learning_rate": 0.025,
    "first_rate": 0.007,
    "momentum": 0.7,
    "coefficient": 150.0,
    "boundary": 1.0,
    "memory": "auto",
}


def scene(checkpoint: str = "sd15") -> dict[str, Any]:
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{checkpoint}.safetensors"),
        **scaled_photo(WIDTH, HEIGHT),
        "positive": node(
            "TrueFillEncodePrompt", clip=["checkpoint", 1], prompt="a cookie", quality_suffix=False, suffix=""
        ),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text="blurry"),
    }


def in_one_box(checkpoint: str = "sd15", **changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["checkpoint", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "vae": ["checkpoint", 2],
        "image": ["picture", 0],
        "mask": ["photo", 1],
        "seed": 1,
        "steps": 3,
        "cfg": 7.5,
        "scheduler": "ddim_uniform",
        **METHOD,
        "feather": FEATHER,
    }
    return {
        **scene(checkpoint),
        "pilot": node("TrueFillPILOT", **inputs | changes),
        "save": node("PreviewImage", images=["pilot", 1]),
    }


def as_sampler(steps: int = 3, seed: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        **scene(),
        "crop": node("ImageScale", image=["photo", 0], upscale_method="area", width=128, height=96, crop="disabled"),
        "encoded": node("VAEEncode", pixels=["crop", 0], vae=["checkpoint", 2]),
        "latent": node("SetLatentNoiseMask", samples=["encoded", 0], mask=["photo", 1]),
        "pilot": node("TrueFillPILOTSampler", **METHOD | changes),
        "sigmas": node("BasicScheduler", model=["checkpoint", 0], scheduler="ddim_uniform", steps=steps, denoise=1.0),
        "guider": node(
            "CFGGuider", model=["checkpoint", 0], positive=["positive", 0], negative=["negative", 0], cfg=7.5
        ),
        "noise": node("RandomNoise", noise_seed=seed),
        "sampled": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["pilot", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["checkpoint", 2]),
        "save": node("PreviewImage", images=["decoded", 0]),
    }


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_the_hole_is_filled_and_nothing_else_is_touched(server: Client, family: str) -> None:
    images = server.run(in_one_box(family)).images
    before, after = pictures(images["save picture"])[0], pictures(images["save"])[0]
    hole = hole_in(images["save hole"][0], (HEIGHT, WIDTH))
    reach = morphology.grow((hole > 0).float(), FEATHER + 1)[0, 0].numpy() > 0
    assert after.shape == before.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(after[~reach], before[~reach])
    inside = hole[0, 0].numpy() == 1
    assert (after[inside] != before[inside]).any(axis=1).mean() > 0.9


def test_a_batch_twice_and_another_picture_in_it(server: Client) -> None:
    graph = in_one_box(image=["pictures", 0])
    graph["mirrored"] = node("ImageFlip", image=["picture", 0], flip_method="y-axis: horizontally")
    graph["pictures"] = node("ImageBatch", image1=["picture", 0], image2=["mirrored", 0])
    first = pictures(server.run(graph).images["save"])
    assert len(first) == 2 and not np.array_equal(*first)
    graph["pilot"]["inputs"]["seed"] = 2
    assert not np.array_equal(pictures(server.run(graph).images["save"]), first)
    graph["pilot"]["inputs"]["seed"] = 1
    # The other seed has made the host forget.
    assert np.array_equal(pictures(server.run(graph).images["save"]), first)


def test_an_empty_mask_leaves_the_picture_as_it_is(server: Client) -> None:
    graph = in_one_box(mask=["nothing", 0])
    graph["nothing"] = node("SolidMask", value=0.0, width=64, height=64)
    images = server.run(graph).images
    assert np.array_equal(pictures(images["save"]), pictures(images["save picture"]))


def test_the_sampler_in_a_graph_of_the_hosts_own_nodes(server: Client, comfyui: Server) -> None:
    progress: list[Progress] = []
    result = server.run(as_sampler(), progress.append)
    made = pictures(result.images["save"])
    assert made.shape == (1, 96, 128, 3)
    # Steps 0 and 2 of three, with two passes each.
    counted = [(note.value, note.maximum) for note in progress if note.node_type == "SamplerCustomAdvanced"]
    assert (7, 7) in counted and {maximum for _, maximum in counted if maximum > 1} == {7}
    said = "PILOT: 4 passes with a gradient (2 at 2 of 3 steps) and 3 guided steps."
    assert said in comfyui.log.read_text(encoding="utf-8")
    again = pictures(server.run(as_sampler(coherence=0.4)).images["save"])
    assert np.array_equal(again, made), "the preset counts, not the coherence"
    other = pictures(server.run(as_sampler(preset="custom", coherence=0.4)).images["save"])
    assert not np.array_equal(other, made)


def test_interrupted_among_the_passes_and_run_again(server: Client) -> None:
    expected = pictures(server.run(as_sampler(seed=5)).images["save"])
    run_and_interrupt(server, as_sampler(seed=6, iterations=1000), "SamplerCustomAdvanced")
    # Not from the host's cache: another graph has run.
    server.run(as_sampler(seed=7))
    assert np.array_equal(pictures(server.run(as_sampler(seed=5)).images["save"]), expected)


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (in_one_box("sd15-inpainting"), r"has 9 channels in, not 4: load the plain checkpoint"),
        (
            {**in_one_box(mask=["all", 0]), "all": node("SolidMask", value=1.0, width=64, height=64)},
            r"The mask covers the whole picture",
        ),
        (
            {**as_sampler(), "latent": node("SetLatentNoiseMask", samples=["encoded", 0], mask=["none", 0])}
            | {"none": node("SolidMask", value=0.0, width=64, height=64)},
            r"The mask has no hole",
        ),
    ],
    ids=["an inpainting model", "all is hole", "no hole"],
)
def test_a_mistake_is_answered_in_one_sentence(server: Client, graph: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GraphFailed, match=sentence) as failed:
        server.run(graph)
    assert "\n" not in failed.value.message.strip()
    assert server.run(in_one_box(steps=1)).status == "success"
