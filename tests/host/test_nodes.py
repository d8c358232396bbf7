"""Our nodes in graphs that a running ComfyUI executes: every family, repeated, interrupted, and fed with mistakes."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from devtools.client import Client, GraphFailed, GraphRejected
from truefill_testing.checkpoints import FAMILIES
from truefill_testing.graphs import node, picture, run_and_interrupt

SIZE = (128, 96)


def inpainting_graph(checkpoint: str, seed: int = 0, steps: int = 3) -> dict[str, Any]:
    """Text inpainting of the example photo at a small size, PAIntA and RASG on the model."""
    width, height = SIZE
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{checkpoint}.safetensors"),
        "photo": node("TrueFillExamplePhoto", photo="coffee"),
        "picture": node(
            "ImageScale", image=["photo", 0], upscale_method="area", width=width, height=height, crop="disabled"
        ),
        "positive": node(
            "TrueFillEncodePrompt",
            clip=["checkpoint", 1],
            prompt="a (chocolate:1.2) cookie",
            quality_suffix=True,
            suffix="Full HD",
        ),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text="blurry"),
        "conditioning": node(
            "InpaintModelConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["checkpoint", 2],
            pixels=["picture", 0],
            mask=["photo", 1],
            noise_mask=True,
        ),
        "painta": node(
            "TrueFillPAIntA", model=["checkpoint", 0], strength=1.0, start_percent=0.0, end_percent=0.5, smooth=True
        ),
        "rasg": node(
            "TrueFillRASG",
            model=["painta", 0],
            eta=0.1,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            sigma="ddim",
            grid="auto",
        ),
        "sampler": node(
            "KSampler",
            model=["rasg", 0],
            positive=["conditioning", 0],
            negative=["conditioning", 1],
            latent_image=["conditioning", 2],
            seed=seed,
            steps=steps,
            cfg=7.5,
            sampler_name="ddim",
            scheduler="ddim_uniform",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "result": node(
            "ImageCompositeMasked",
            destination=["picture", 0],
            source=["decoded", 0],
            x=0,
            y=0,
            resize_source=False,
            mask=["photo", 1],
        ),
        "mask": node("MaskToImage", mask=["photo", 1]),
        "save result": node("SaveImage", images=["result", 0], filename_prefix="result"),
        "save picture": node("SaveImage", images=["picture", 0], filename_prefix="picture"),
        "save mask": node("SaveImage", images=["mask", 0], filename_prefix="mask"),
    }


def changed(graph: dict[str, Any], **of_nodes: dict[str, Any]) -> dict[str, Any]:
    graph = copy.deepcopy(graph)
    for name, inputs in of_nodes.items():
        graph[name]["inputs"].update(inputs)
    return graph


@pytest.mark.parametrize("kind", ["", "-inpainting"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fills_the_hole_and_touches_nothing_else(server: Client, family: str, kind: str) -> None:
    graph = inpainting_graph(f"{family}{kind}")
    images = server.run(graph).images
    result, before = picture(images["save result"][0]), picture(images["save picture"][0])
    hole = np.asarray(Image.open(io.BytesIO(images["save mask"][0])).convert("L").resize(SIZE, Image.Resampling.BOX))
    assert result.shape == before.shape == (SIZE[1], SIZE[0], 3)
    assert np.array_equal(result[hole == 0], before[hole == 0])
    assert not np.array_equal(result[hole == 255], before[hole == 255])
    plain = server.run(changed(graph, sampler={"model": ["checkpoint", 0]})).images
    assert not np.array_equal(picture(plain["save result"][0]), result), "PAIntA and RASG changed nothing"


def test_a_semantic_boundary_changes_the_hole_and_strength_0_nothing(server: Client) -> None:
    graph = inpainting_graph("sd15")
    boundary = {"model": ["checkpoint", 0], "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    graph["boundary"] = node("TrueFillSemanticBoundary", **boundary)
    graph = changed(graph, sampler={"model": ["boundary", 0]})
    images = server.run(graph).images
    result, before = picture(images["save result"][0]), picture(images["save picture"][0])
    hole = np.asarray(Image.open(io.BytesIO(images["save mask"][0])).convert("L").resize(SIZE, Image.Resampling.BOX))
    assert np.array_equal(result[hole == 0], before[hole == 0])
    plain = server.run(changed(graph, sampler={"model": ["checkpoint", 0]})).images["save result"]
    assert not np.array_equal(picture(plain[0]), result)
    off = server.run(changed(graph, boundary={"strength": 0.0})).images["save result"]
    assert np.array_equal(picture(off[0]), picture(plain[0]))


def test_the_graph_twice_gives_the_same_bytes(server: Client) -> None:
    graph = inpainting_graph("sd15-inpainting", seed=1)
    first = server.run(graph).images["save result"]
    # Another seed in between, so that the host has to compute it again.
    other = server.run(inpainting_graph("sd15-inpainting", seed=2)).images["save result"]
    again = server.run(graph).images["save result"]
    assert first == again
    assert first != other


def test_interrupted_in_the_middle_and_run_again(server: Client) -> None:
    graph = inpainting_graph("sd15-inpainting", seed=3, steps=4)
    expected = server.run(graph).images["save result"]
    run_and_interrupt(server, inpainting_graph("sd15-inpainting", seed=4, steps=500), "KSampler")
    assert server.run(graph).images["save result"] == expected


def test_strength_0_gives_the_bytes_of_no_node(server: Client) -> None:
    graph = inpainting_graph("sd15-inpainting", seed=5)
    off = server.run(changed(graph, painta={"strength": 0.0}, rasg={"strength": 0.0})).images["save result"]
    without = server.run(changed(graph, sampler={"model": ["checkpoint", 0]})).images["save result"]
    # The files differ: each carries its graph.
    assert np.array_equal(picture(off[0]), picture(without[0]))


def test_the_samplers_of_the_editor(server: Client) -> None:
    graph = inpainting_graph("sd15-inpainting", seed=6, steps=2)
    for sampler in ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "lcm"):
        assert server.run(changed(graph, sampler={"sampler_name": sampler})).images["save result"]


MISTAKES = {
    "a window that ends before it begins": (
        {"painta": {"start_percent": 0.8}},
        r"start_percent \(0\.8\) lies behind end_percent \(0\.5\): set start_percent to 0\.5 or less\.",
    ),
    "a sampler that adds no noise": ({"sampler": {"sampler_name": "heun"}}, r"'heun' adds none: choose euler, ddim"),
    "a sigma that the sampler does not have": (
        {"rasg": {"sigma": "released"}, "sampler": {"sampler_name": "dpmpp_2m_sde"}},
        r"choose euler, ddim or euler_ancestral, or set sigma to 'ddim'\.",
    ),
    "no mask anywhere": (
        {
            "conditioning": {"noise_mask": False},
            "sampler": {"positive": ["positive", 0], "negative": ["negative", 0]},
        },
        r"PAIntA needs to know where the hole is.*or connect a MASK to the PAIntA node\.",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_answered_in_one_sentence(server: Client, mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(GraphFailed, match=message) as failed:
        server.run(changed(inpainting_graph("sd15-inpainting", seed=7), **changes))
    assert "\n" not in failed.value.message.strip()
    assert server.run(inpainting_graph("sd15-inpainting", seed=8, steps=1)).status == "success"


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("rasg", {"eta": -0.5}),
        ("rasg", {"sigma": "cosine"}),
        ("rasg", {"model": ["checkpoint", 1]}),
        ("painta", {"strength": 3.0}),
        ("painta", {"mask": ["photo", 0]}),
        ("photo", {"photo": "tea"}),
        ("positive", {"clip": ["checkpoint", 0]}),
    ],
    ids=str,
)
def test_inputs_out_of_range_or_of_another_type_are_rejected(server: Client, name: str, inputs: dict) -> None:
    (which,) = inputs
    with pytest.raises(GraphRejected, match=which):
        server.run(changed(inpainting_graph("sd15-inpainting", seed=9), **{name: inputs}))


@pytest.mark.parametrize("shape", [(33, 47), (1, 1), (500, 500)])
def test_a_mask_of_another_size_is_resized(server: Client, shape: tuple[int, int]) -> None:
    graph = inpainting_graph("sd15-inpainting", seed=10, steps=2)
    graph["other"] = node("SolidMask", value=1.0, width=shape[0], height=shape[1])
    images = server.run(changed(graph, painta={"mask": ["other", 0]}, rasg={"mask": ["other", 0]})).images
    assert images["save result"]


def test_a_batch_of_pictures(server: Client) -> None:
    graph = inpainting_graph("sd15-inpainting", seed=11, steps=2)
    graph["batch"] = node("RepeatLatentBatch", samples=["conditioning", 2], amount=3)
    # The host's composite makes as many pictures as its destination has.
    graph["pictures"] = node("RepeatImageBatch", image=["picture", 0], amount=3)
    graph = changed(graph, sampler={"latent_image": ["batch", 0]}, result={"destination": ["pictures", 0]})
    images = server.run(graph).images["save result"]
    assert len(images) == 3
    assert len(set(images)) == 3
