"""The demo model in a running ComfyUI: genuine objects of the host, on which its own nodes and ours work."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from devtools.client import Client, GraphRejected
from devtools.pack import ROOT, pack_module
from truefill_testing.graphs import node, picture

KINDS = ("inpainting", "text-to-image")
PROMPT = "a red striped star"
TOY_TRIPLET = 0


def sampler(model: list[Any], positive: list[Any], negative: list[Any], latent: list[Any], steps: int = 4) -> dict:
    return node(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=1,
        steps=steps,
        cfg=4.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )


def text_to_image(width: int = 256, height: int = 256, batch: int = 1) -> dict[str, Any]:
    return {
        "demo": node("TrueFillDemoModel", kind="text-to-image"),
        "positive": node("CLIPTextEncode", clip=["demo", 1], text=f"{PROMPT} on the sand"),
        "negative": node("CLIPTextEncode", clip=["demo", 1], text=""),
        "latent": node("EmptyLatentImage", width=width, height=height, batch_size=batch),
        "sampler": sampler(["demo", 0], ["positive", 0], ["negative", 0], ["latent", 0]),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["demo", 2]),
        "save": node("PreviewImage", images=["decoded", 0]),
    }


def inpainting(kind: str) -> dict[str, Any]:
    return {
        "demo": node("TrueFillDemoModel", kind=kind),
        "photo": node("TrueFillExamplePhoto", photo="toy scene"),
        "positive": node(
            "TrueFillEncodePrompt", clip=["demo", 1], prompt=PROMPT, quality_suffix=False, suffix="high quality"
        ),
        "negative": node("CLIPTextEncode", clip=["demo", 1], text=""),
        "conditioning": node(
            "InpaintModelConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["demo", 2],
            pixels=["photo", 0],
            mask=["photo", 1],
            noise_mask=True,
        ),
        "sampler": sampler(["demo", 0], ["conditioning", 0], ["conditioning", 1], ["conditioning", 2]),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["demo", 2]),
        "save": node("PreviewImage", images=["decoded", 0]),
    }


@pytest.mark.parametrize(("width", "height", "batch"), [(256, 256, 2), (320, 200, 1)])
def test_the_hosts_nodes_draw_with_it(server: Client, width: int, height: int, batch: int) -> None:
    images = server.run(text_to_image(width, height, batch)).images["save"]
    assert len(images) == batch
    assert all(picture(image).shape == (height, width, 3) for image in images)


@pytest.mark.parametrize("kind", KINDS)
def test_it_fills_a_hole_and_our_nodes_change_what_it_fills_it_with(server: Client, kind: str) -> None:
    graph = inpainting(kind)
    plain = picture(server.run(graph).images["save"][0])
    graph["painta"] = node(
        "TrueFillPAIntA", model=["demo", 0], strength=1.0, start_percent=0.0, end_percent=0.5, smooth=True
    )
    graph["rasg"] = node(
        "TrueFillRASG",
        model=["painta", 0],
        eta=0.1,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        sigma="ddim",
        grid="auto",
    )
    seen = {plain.tobytes()}
    for last in ("painta", "rasg"):
        graph["sampler"]["inputs"]["model"] = [last, 0]
        result = picture(server.run(graph).images["save"][0])
        assert result.shape == plain.shape
        assert result.tobytes() not in seen, f"{last} changed nothing"
        seen.add(result.tobytes())


def test_its_transformer_draws_and_takes_what_works_without_a_unet(server: Client) -> None:
    drawing = text_to_image()
    drawing["demo"]["inputs"]["kind"] = "transformer"
    assert picture(server.run(drawing).images["save"][0]).shape == (256, 256, 3)
    graph = inpainting("transformer")
    seen = {server.run(graph).images["save"][0]}
    graph["painta"] = node(
        "TrueFillPAIntA", model=["demo", 0], strength=1.0, start_percent=0.0, end_percent=0.5, smooth=True
    )
    graph["sbc"] = node(
        "TrueFillSemanticBoundary", model=["painta", 0], strength=1.0, start_percent=0.0, end_percent=1.0
    )
    for last in ("painta", "sbc"):
        graph["sampler"]["inputs"]["model"] = [last, 0]
        result = server.run(graph).images["save"][0]
        assert result not in seen, f"{last} changed nothing"
        seen.add(result)


def test_best_start_gives_the_picture_of_one_of_its_seeds(server: Client) -> None:
    graph = inpainting("inpainting")

    def filled(seed: int, last: str) -> bytes:
        graph["sampler"]["inputs"] |= {"model": [last, 0], "seed": seed}
        return picture(server.run(graph).images["save"][0]).tobytes()

    plain = [filled(seed, "demo") for seed in (5, 6, 7)]
    assert len(set(plain)) == 3
    graph["best"] = node("TrueFillBestStart", model=["demo", 0], candidates=3, choose_at=0.5, grid="auto")
    assert filled(5, "best") in plain
    graph["best"]["inputs"]["candidates"] = 1
    assert filled(6, "best") == plain[1]


def test_noise_search_changes_what_is_in_the_hole(server: Client) -> None:
    """Beside the other methods too, and with no step at all it is not there."""
    graph = inpainting("inpainting")

    def filled(**settings: Any) -> bytes:
        graph["search"]["inputs"] |= settings
        return picture(server.run(graph).images["save"][0]).tobytes()

    plain = picture(server.run(graph).images["save"][0]).tobytes()
    graph["search"] = node("TrueFillNoiseSearch", model=["demo", 0], steps=1, rate=0.1, grid="auto")
    graph["sampler"]["inputs"]["model"] = ["search", 0]
    assert filled() != plain
    assert filled(steps=0) == plain
    assert filled(steps=1, rate=0.0) == plain
    graph["best"] = node("TrueFillBestStart", model=["demo", 0], candidates=2, choose_at=0.5, grid="auto")
    assert filled(rate=0.1, model=["best", 0]) != plain


# Nodes of the host that open the model up, merge it, shorten its text encoder, or tile its autoencoder.
ON_MODEL = {
    "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
    "HyperTile": {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False},
    "TomePatchModel": {"ratio": 0.3},
    "RescaleCFG": {"multiplier": 0.7},
    "ModelSamplingDiscrete": {"sampling": "lcm", "zsnr": False},
}


@pytest.mark.parametrize("class_type", list(ON_MODEL))
def test_the_hosts_model_nodes_work_on_it(server: Client, class_type: str) -> None:
    graph = inpainting("inpainting")
    graph["patch"] = node(class_type, model=["demo", 0], **ON_MODEL[class_type])
    graph["sampler"]["inputs"]["model"] = ["patch", 0]
    assert server.run(graph).images["save"]


def test_the_hosts_other_nodes_work_on_it(server: Client) -> None:
    graph = text_to_image()
    graph["second"] = node("TrueFillDemoModel", kind="text-to-image")
    graph["merged"] = node("ModelMergeSimple", model1=["demo", 0], model2=["second", 0], ratio=0.5)
    graph["skipped"] = node("CLIPSetLastLayer", clip=["demo", 1], stop_at_clip_layer=-2)
    graph["positive"]["inputs"]["clip"] = ["skipped", 0]
    graph["sampler"]["inputs"]["model"] = ["merged", 0]
    tiles = {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    graph["encoded"] = node("VAEEncodeTiled", pixels=["decoded", 0], vae=["demo", 2], **tiles)
    graph["again"] = node("VAEDecodeTiled", samples=["encoded", 0], vae=["demo", 2], **tiles)
    graph["save again"] = node("PreviewImage", images=["again", 0])
    images = server.run(graph).images
    first, again = (picture(images[name][0]).astype(float) for name in ("save", "save again"))
    assert np.abs(first - again).mean() < 12


def test_the_benchmark_makes_the_pictures_of_the_shipped_graph(server: Client) -> None:
    accuracy = pack_module("evaluation.accuracy")
    graph = json.loads((ROOT / "workflows" / "api" / "try_without_downloads.json").read_text(encoding="utf-8"))
    titled = {entry["_meta"]["title"]: (node_id, entry["inputs"]) for node_id, entry in graph.items()}
    samplers = [entry["inputs"] for entry in graph.values() if entry["class_type"] == "KSampler"]
    for inputs in samplers:
        inputs["steps"] = 2
    settings = accuracy.KSampling(
        steps=2, cfg=samplers[0]["cfg"], sampler=samplers[0]["sampler_name"], scheduler=samplers[0]["scheduler"]
    )
    eta = titled["RASG: Attention Score Guidance (TrueFill)"][1]["eta"]
    # What the toy scene was drawn from.
    triplet = pack_module("training.world.triplets").make_triplet("dev", TOY_TRIPLET)
    assert titled["Encode Prompt (TrueFill)"][1]["prompt"] == triplet.prompt

    images = server.run(graph).images

    models = accuracy.Models()
    task = accuracy.prepare(models, "9-channel", triplet)
    for title, method in (
        ("Plain", accuracy.Method("9-channel")),
        ("PAIntA + RASG", accuracy.Method("9-channel", painta=True, eta=eta)),
    ):
        expected = accuracy.fill(models, method, task, samplers[0]["seed"], settings)[0].numpy()
        made = picture(images[titled[title][0]][0])
        # The server's process may use another number of threads.
        assert np.abs(made - (255.0 * expected)).max() < 1.5


def test_an_unknown_kind_is_refused(server: Client) -> None:
    graph = text_to_image()
    graph["demo"]["inputs"]["kind"] = "video"
    with pytest.raises(GraphRejected, match="kind"):
        server.run(graph)
