"""A subject in a running ComfyUI, with small files of an IP-Adapter-Plus and of CLIP ViT-H in its models folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from devtools.client import Client, GraphFailed, GraphRejected
from devtools.server import Server
from truefill_testing.checkpoints import checkpoint
from truefill_testing.graphs import node, pictures
from truefill_testing.subject_weights import write_adapter, write_vision

ADAPTER, PICKLED, OTHER = "truefill_plus_sd15.safetensors", "truefill_plus_sd15.bin", "truefill_plus_sdxl.safetensors"
VISION = "truefill_vit_h.safetensors"
STRENGTHS = {"start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module", autouse=True)
def files(comfyui: Server) -> Iterator[None]:
    assert comfyui.base is not None
    models = comfyui.base / "models"
    placed = [models / "ipadapter" / name for name in (ADAPTER, PICKLED, OTHER)] + [models / "clip_vision" / VISION]
    for path in placed:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(placed[0], checkpoint("sd15", inpainting=True))
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(placed[0]).items():
        part, _, rest = name.partition(".")
        nested.setdefault(part, {})[rest] = tensor
    torch.save(nested, placed[1])
    write_adapter(placed[2], checkpoint("sdxl", inpainting=False))
    write_vision(placed[3])
    yield
    for path in placed:
        path.unlink()


def graph(beta: float, strength: float, batch: int = 1) -> dict[str, Any]:
    made = {
        "model": node("CheckpointLoaderSimple", ckpt_name="sd15-inpainting.safetensors"),
        "whole": node("TrueFillExamplePhoto", photo="coffee"),
        "photo": node(
            "ImageScale", image=["whole", 0], upscale_method="bilinear", width=128, height=104, crop="disabled"
        ),
        "hole": node("SolidMask", value=1.0, width=48, height=40),
        "empty": node("SolidMask", value=0.0, width=128, height=104),
        "mask": node("MaskComposite", destination=["empty", 0], source=["hole", 0], x=40, y=24, operation="add"),
        "photos": node("RepeatImageBatch", image=["photo", 0], amount=batch),
        "positive": node("TrueFillEncodePrompt", clip=["model", 1], prompt="a cup", quality_suffix=False, suffix=""),
        "negative": node("CLIPTextEncode", clip=["model", 1], text=""),
        "conditioning": node(
            "InpaintModelConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["model", 2],
            pixels=["photos", 0],
            mask=["mask", 0],
            noise_mask=True,
        ),
        "vision": node("CLIPVisionLoader", clip_name=VISION),
        "adapter": node("TrueFillLoadSubjectAdapter", adapter=ADAPTER),
        "subject": node(
            "TrueFillEncodeSubject",
            image=["whole", 0],
            mask=["whole", 1],
            clip_vision=["vision", 0],
            vae=["model", 2],
            pictures="views of one subject",
            size=64,
        ),
        "assign": node(
            "TrueFillAssign", model=["model", 0], subject=["subject", 0], adapter=["adapter", 0], beta=beta, **STRENGTHS
        ),
        "refine": node(
            "TrueFillRefine", model=["assign", 0], subject=["subject", 0], strength=strength, reuse=1, **STRENGTHS
        ),
        "sampler": node(
            "KSampler",
            model=["refine", 0],
            positive=["conditioning", 0],
            negative=["conditioning", 1],
            latent_image=["conditioning", 2],
            seed=1,
            steps=2,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "save": node("PreviewImage", images=["decoded", 0]),
    }
    return made


def drawn(server: Client, graph: dict[str, Any], save: str = "save") -> np.ndarray:
    return pictures(server.run(graph).images[save])


def changed(graph: dict[str, Any], key: str, **inputs: Any) -> dict[str, Any]:
    graph = copy.deepcopy(graph)
    graph[key]["inputs"] |= inputs
    return graph


def test_text_subject_and_both_are_one_graph(server: Client) -> None:
    without = changed(graph(0.0, 0.0), "sampler", model=["model", 0])
    plain = drawn(server, without)
    assert np.array_equal(drawn(server, graph(0.0, 0.0)), plain)
    seen = [plain]
    for settings in ((0.45, 0.0), (0.0, 1.0), (0.45, 1.0)):
        seen.append(drawn(server, graph(*settings)))
        assert not any(np.array_equal(seen[-1], other) for other in seen[:-1]), settings
    assert np.array_equal(drawn(server, graph(0.45, 1.0)), seen[-1])
    pickled = changed(graph(0.45, 1.0), "adapter", adapter=PICKLED)
    assert np.array_equal(drawn(server, pickled), seen[-1])
    subject_alone = changed(graph(1.0, 1.0), "positive", prompt="")
    assert not np.array_equal(drawn(server, subject_alone), seen[-1])


def test_what_is_cut_out_is_shown(server: Client) -> None:
    shown = graph(0.0, 0.0)
    shown["cut"] = node("PreviewImage", images=["subject", 1])
    shown["save"] = node("PreviewImage", images=["photo", 0])
    (cut,) = drawn(server, shown, "cut")
    assert cut.shape == (64, 64, 3)
    # An ellipse that touches two sides of the square, and white in its corners.
    assert (cut[0, 0] == 255).all() and (cut[-1, -1] == 255).all() and not (cut[32, 32] == 255).all()


def test_a_batch_of_scenes_with_one_subject_and_with_one_each(server: Client) -> None:
    one = graph(0.45, 1.0, batch=2)
    together = drawn(server, one)
    assert len(together) == 2 and not np.array_equal(together[0], together[1])
    two = copy.deepcopy(one)
    two["other"] = node("TrueFillExamplePhoto", photo="toy scene")
    two["scaled"] = node(
        "ImageScale", image=["other", 0], upscale_method="bilinear", width=512, height=384, crop="disabled"
    )
    two["batch"] = node("ImageBatch", image1=["whole", 0], image2=["scaled", 0])
    two["subject"]["inputs"] |= {"image": ["batch", 0], "pictures": "a subject for each picture"}
    each = drawn(server, two)
    # The same subject as before in the first picture, another one in the second.
    assert np.abs(each[0].astype(int) - together[0]).max() <= 1
    assert not np.array_equal(each[1], together[1])
    views = changed(two, "subject", pictures="views of one subject")
    assert not np.array_equal(drawn(server, views)[0], together[0])


@pytest.mark.parametrize(
    ("key", "inputs", "said"),
    [
        (
            "adapter",
            {"adapter": OTHER},
            r"Assign was given weights for a text of width \d+, and this MODEL's has \d+: ",
        ),
        ("subject", {"mask": ["empty", 0]}, r"Picture 1 has no subject, since its mask is black: "),
    ],
)
def test_mistakes_get_one_sentence(server: Client, key: str, inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(GraphFailed, match=said):
        server.run(changed(graph(0.45, 1.0), key, **inputs))


def test_what_is_not_connected_is_named(server: Client) -> None:
    for missing, said in (("clip_vision", "connect Load CLIP Vision"), ("vae", "connect the checkpoint's VAE")):
        wrong = graph(0.45, 1.0)
        del wrong["subject"]["inputs"][missing]
        with pytest.raises(GraphFailed, match=said):
            server.run(wrong)
    nothing = graph(0.45, 1.0)
    del nothing["subject"]["inputs"]["vae"], nothing["subject"]["inputs"]["clip_vision"]
    with pytest.raises(GraphFailed, match="Encode Subject was given nothing to encode with: "):
        server.run(nothing)


def test_a_missing_adapter_says_where_to_get_one(server: Client) -> None:
    with pytest.raises(GraphRejected, match=r"There is no nowhere\.bin in .*ipadapter: get .*https://"):
        server.run(changed(graph(0.45, 1.0), "adapter", adapter="nowhere.bin"))
