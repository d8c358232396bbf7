"""DreamMix's nodes in graphs that a running ComfyUI executes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devtools.client import Client, GraphFailed, Progress
from devtools.pack import pack_module
from devtools.server import Server
from truefill_testing.graphs import SMALL_DREAMMIX, hole_in, node, picture, pictures, run_and_interrupt, scaled_photo

seam = pack_module("imaging.seam")

# Sizes that no VAE takes as they are.
WIDTH, HEIGHT, FEATHER = 181, 139, SMALL_DREAMMIX["feather"]


def scene(checkpoint: str) -> dict[str, Any]:
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{checkpoint}.safetensors"),
        **scaled_photo(WIDTH, HEIGHT),
        "prompt": node(
            "TrueFillEncodePrompt", clip=["checkpoint", 1], prompt="a cookie", quality_suffix=False, suffix=""
        ),
        "positive": node(
            "TrueFillSubstituteAttribute",
            conditioning=["prompt", 0],
            clip=["checkpoint", 1],
            attributes="brownish",
            strength=1.0,
            jointly=False,
            pooled=True,
            prefix="a photo of a",
        ),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text="blurry"),
    }


def in_one_box(checkpoint: str = "sd15-inpainting", **changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["checkpoint", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "vae": ["checkpoint", 2],
        "image": ["picture", 0],
        "mask": ["photo", 1],
        "seed": 1,
        "steps": 4,
        "cfg": 4.0,
        "sampler_name": "dpmpp_2m_sde",
        "scheduler": "karras",
        "denoise": 1.0,
        **SMALL_DREAMMIX,
    }
    return {
        **scene(checkpoint),
        "dreammix": node("TrueFillDreamMix", **inputs | changes),
        "save": node("PreviewImage", images=["dreammix", 0]),
        "save switch": node("PreviewImage", images=["dreammix", 1]),
        "changed": node("MaskToImage", mask=["dreammix", 2]),
        "save changed": node("PreviewImage", images=["changed", 0]),
    }


def with_guider(**changes: Any) -> dict[str, Any]:
    inputs = {
        "guider": ["guider", 0],
        "sampler": ["sampler", 0],
        "sigmas": ["sigmas", 0],
        "vae": ["checkpoint", 2],
        "image": ["picture", 0],
        "mask": ["photo", 1],
        "seed": 1,
        **SMALL_DREAMMIX,
    }
    return {
        **scene("sd15-inpainting"),
        "guider": node(
            "CFGGuider", model=["checkpoint", 0], positive=["positive", 0], negative=["negative", 0], cfg=4.0
        ),
        "sampler": node("KSamplerSelect", sampler_name="dpmpp_2m_sde"),
        "sigmas": node("BasicScheduler", model=["checkpoint", 0], scheduler="karras", steps=4, denoise=1.0),
        "dreammix": node("TrueFillDreamMixSampler", **inputs | changes),
        "save": node("PreviewImage", images=["dreammix", 0]),
    }


@pytest.mark.parametrize("checkpoint", ["sd15-inpainting", "sd2", "sdxl"])
def test_the_hole_is_filled_and_nothing_else_is_touched(server: Client, checkpoint: str) -> None:
    images = server.run(in_one_box(checkpoint)).images
    before, after, at_switch = (picture(images[name][0]) for name in ("save picture", "save", "save switch"))
    hole = hole_in(images["save hole"][0], (HEIGHT, WIDTH))
    ramp = seam.square_ramp(hole, FEATHER)[0, 0].numpy()
    assert after.shape == before.shape == at_switch.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(after[ramp == 0], before[ramp == 0])
    assert np.array_equal(at_switch[ramp == 0], before[ramp == 0])
    assert (after[ramp == 1] != before[ramp == 1]).any(axis=1).mean() > 0.9
    assert not np.array_equal(at_switch, after)
    assert np.array_equal(picture(images["save changed"][0])[..., 0] > 0, ramp > 0)


def test_a_guider_and_a_sampler_are_the_same_and_a_graph_runs_twice(server: Client, comfyui: Server) -> None:
    progress: list[Progress] = []
    first = pictures(server.run(in_one_box(), progress.append).images["save"])
    counted = [(note.value, note.maximum) for note in progress if note.node_type == "TrueFillDreamMix"]
    assert (4, 4) in counted and {maximum for _, maximum in counted if maximum > 1} == {4}
    # The crop holds half of the picture's width, and the hole.
    assert "DreamMix: 2 of 4 steps on " in comfyui.log.read_text(encoding="utf-8")
    assert np.array_equal(pictures(server.run(with_guider()).images["save"]), first)
    other = pictures(server.run(in_one_box(seed=2)).images["save"])
    assert not np.array_equal(other, first)
    assert np.array_equal(pictures(server.run(in_one_box()).images["save"]), first)


def test_its_parts_in_a_graph_of_nodes(server: Client) -> None:
    """Crop Region, the host's samplers, Stitch Region and Restart From Picture."""
    graph = {
        **with_guider(),
        "crop": node(
            "TrueFillCropRegion",
            image=["picture", 0],
            mask=["photo", 1],
            native_size=128,
            context_percent=0.0,
            feather=0.0,
            context_pixels=0,
            min_side=1,
            max_upscale=1.0,
            max_aspect=1.0,
            multiple=64,
            width=0,
            height=0,
            framing="DreamMix's local region",
            fill_box=False,
        ),
        "conditions": node(
            "InpaintModelConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["checkpoint", 2],
            pixels=["crop", 0],
            mask=["crop", 1],
            noise_mask=True,
        ),
        "local": node(
            "CFGGuider", model=["checkpoint", 0], positive=["conditions", 0], negative=["conditions", 1], cfg=4.0
        ),
        "split": node("SplitSigmas", sigmas=["sigmas", 0], step=2),
        "noise": node("RandomNoise", noise_seed=1),
        "sampled": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["local", 0],
            sampler=["sampler", 0],
            sigmas=["split", 0],
            latent_image=["conditions", 2],
        ),
        "decoded": node("VAEDecode", samples=["sampled", 1], vae=["checkpoint", 2]),
        "stitched": node(
            "TrueFillStitchRegion",
            image=["decoded", 0],
            region=["crop", 2],
            harmonize="off",
            color="mean",
            band=32,
            mixed_gradients=False,
        ),
        "restart": node(
            "TrueFillRestart",
            image=["stitched", 0],
            vae=["checkpoint", 2],
            sigmas=["sigmas", 0],
            done=0.5,
            mask=["photo", 1],
        ),
        "all": node(
            "InpaintModelConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["checkpoint", 2],
            pixels=["decoded whole", 0],
            mask=["photo", 1],
            noise_mask=True,
        ),
        "decoded whole": node("VAEDecode", samples=["restart", 0], vae=["checkpoint", 2]),
        "whole": node("CFGGuider", model=["checkpoint", 0], positive=["all", 0], negative=["all", 1], cfg=4.0),
        "other noise": node("RandomNoise", noise_seed=2),
        "finished": node(
            "SamplerCustomAdvanced",
            noise=["other noise", 0],
            guider=["whole", 0],
            sampler=["sampler", 0],
            sigmas=["restart", 1],
            latent_image=["restart", 0],
        ),
        "last": node("VAEDecode", samples=["finished", 0], vae=["checkpoint", 2]),
        "save parts": node("PreviewImage", images=["last", 0]),
    }
    made = pictures(server.run(graph).images["save parts"])
    # Continued to what the VAE takes.
    assert made.shape == (1, 144, 184, 3)


def test_interrupted_in_the_second_stage_and_run_again(server: Client) -> None:
    expected = pictures(server.run(in_one_box(seed=5)).images["save"])
    run_and_interrupt(server, in_one_box(seed=6, steps=1000, local_share=0.0), "TrueFillDreamMix")
    # Not from the host's cache: another graph has run.
    server.run(in_one_box(seed=7))
    assert np.array_equal(pictures(server.run(in_one_box(seed=5)).images["save"]), expected)


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (
            in_one_box(vae=["other", 2]) | {"other": node("CheckpointLoaderSimple", ckpt_name="x4.safetensors")},
            "4 channels of cells of 4 pixels, and the model takes 4 of 8",
        ),
        (with_guider(sigmas=["none", 1]) | {"none": node("SplitSigmas", sigmas=["sigmas", 0], step=4)}, "have no step"),
    ],
    ids=["another VAE", "no step"],
)
def test_a_mistake_is_answered_in_one_sentence(server: Client, graph: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GraphFailed, match=sentence) as failed:
        server.run(graph)
    assert "\n" not in failed.value.message.strip()
