"""Train Subject on a running ComfyUI: a LoRA that its loader loads, a run that goes on, and mistakes in a sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from devtools.client import Client, GraphFailed
from devtools.server import Server
from truefill_testing.graphs import node, pictures, run_and_interrupt

DICTIONARY = '```json\n{"class": "cup", "attributes": {"color": "red", "material": ["clay", "china"]}}\n```'


def graph_of(name: str, checkpoint: str = "sd15-inpainting", **changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["checkpoint", 0],
        "clip": ["checkpoint", 1],
        "vae": ["checkpoint", 2],
        "images": ["both", 0],
        "masks": ["both masks", 0],
        "dictionary": ["dictionary", 0],
        "token": "sks",
        "name": name,
        "steps": 2,
        "native_size": 128,
        "seed": 1,
        "learning_rate": 0.01,
        "rank": 2,
        "outputs": False,
        "accumulate": 1,
        "inside": 1.5,
        "outside": 0.7,
        "regular_weight": 0.4,
        "keep_every": 50,
        "save_memory": True,
    }
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{checkpoint}.safetensors"),
        "photo": node("TrueFillExamplePhoto", photo="coffee cup"),
        "flipped": node("ImageFlip", image=["photo", 0], flip_method="y-axis: horizontally"),
        "both": node("ImageBatch", image1=["photo", 0], image2=["flipped", 0]),
        "as picture": node("MaskToImage", mask=["photo", 1]),
        "flipped mask": node("ImageFlip", image=["as picture", 0], flip_method="y-axis: horizontally"),
        "both masks as pictures": node("ImageBatch", image1=["as picture", 0], image2=["flipped mask", 0]),
        "both masks": node("ImageToMask", image=["both masks as pictures", 0], channel="red"),
        "dictionary": node("TrueFillAttributeDictionary", dictionary=DICTIONARY, token="sks", regular=2, seed=1),
        "train": node("TrueFillTrainSubject", **inputs | changes),
        "save": node("PreviewImage", images=["train", 2]),
        "prompt": node(
            "TrueFillEncodePrompt", clip=["checkpoint", 1], prompt="a sks cup", quality_suffix=False, suffix=""
        ),
    }


def sampled(graph: dict[str, Any], model: list[Any]) -> dict[str, Any]:
    """The graph with a picture by a model."""
    return {
        **graph,
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampled": node(
            "KSampler",
            model=model,
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["empty", 0],
            seed=1,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["checkpoint", 2]),
        "save picture": node("PreviewImage", images=["decoded", 0]),
    }


@pytest.fixture
def loras(comfyui: Server) -> Path:
    """Where the host's LoRAs are, empty."""
    folder = comfyui.base / "models" / "loras"
    for path in folder.glob("*"):
        if path.name.startswith("test "):
            path.unlink()
    return folder


def test_a_lora_that_the_hosts_loader_loads(server: Client, comfyui: Server, loras: Path) -> None:
    trained = server.run(sampled(graph_of("test toy", "sd15"), ["train", 0]))
    assert (loras / "test toy.safetensors").is_file() and not (loras / "test toy.unfinished").exists()
    said = comfyui.log.read_text(encoding="utf-8")
    assert "Train Subject: step 2 of 2, loss " in said
    held, there = map(float, re.search(r"with the model this holds about ([\d.]+) of ([\d.]+) GB", said).groups())
    assert 0.0 < held < there
    made = pictures(trained.images["save picture"])
    without = {key: of for key, of in graph_of("-", "sd15").items() if key not in ("train", "save")}
    loaded = {
        **without,
        "lora": node(
            "LoraLoaderModelOnly", model=["checkpoint", 0], lora_name="test toy.safetensors", strength_model=1.0
        ),
    }
    assert np.array_equal(pictures(server.run(sampled(loaded, ["lora", 0])).images["save picture"]), made)
    plain = pictures(server.run(sampled(without, ["checkpoint", 0])).images["save picture"])
    assert not np.array_equal(plain, made)


@pytest.mark.parametrize("checkpoint", ["sd15", "sd15-inpainting"])
def test_pictures_on_the_way_change_nothing(server: Client, loras: Path, checkpoint: str) -> None:
    settings = {"steps": 3, "sample_prompt": "a blue sks cup"}
    made = server.run(
        graph_of("test with", checkpoint, sample_every=2, **settings)
        | {"show": node("PreviewImage", images=["train", 3])}
    )
    # At the second step and at the end, of the first picture's size.
    shown = pictures(made.images["show"])
    assert shown.shape == (2, 128, 128, 3) and not np.array_equal(shown[0], shown[1])
    without = server.run(
        graph_of("test without", checkpoint, sample_every=0, **settings)
        | {"show": node("PreviewImage", images=["train", 3])}
    )
    assert "show" not in without.images
    one, other = (safetensors.numpy.load_file(loras / f"test {name}.safetensors") for name in ("with", "without"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_an_interrupted_run_goes_on(server: Client, comfyui: Server, loras: Path) -> None:
    regular = {"regular_images": ["photo", 0], "regular_masks": ["photo", 1], "regular_prompts": "a blue glass cup"}
    run_and_interrupt(server, graph_of("test long", steps=1000, **regular), "TrueFillTrainSubject")
    assert (loras / "test long.unfinished").is_file() and not (loras / "test long.safetensors").exists()
    with pytest.raises(GraphFailed, match="of a run with other pictures, prompts or settings"):
        server.run(graph_of("test long", steps=1000, rank=3, **regular))
    # More steps than were done; fewer than were asked for.
    server.run(graph_of("test long", steps=1, **regular))
    assert "Train Subject: goes on from step " in comfyui.log.read_text(encoding="utf-8")
    assert (loras / "test long.safetensors").is_file() and not (loras / "test long.unfinished").exists()
    with pytest.raises(GraphFailed, match="none is overwritten: choose another name"):
        server.run(graph_of("test long", seed=9))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"masks": ["photo", 1]}, "There are 2 images and 1 masks"),
        ({"dictionary": "a red cup"}, "JSON"),
        ({"dictionary": '{"attributes": {"color": "red"}}'}, "no class word"),
        ({"regular_images": ["photo", 0]}, "has no regular_masks and no regular_prompts"),
        ({"name": "../toy"}, "must be the name of a file"),
    ],
    ids=["one mask", "no JSON", "no class", "half of the regular pictures", "another folder"],
)
def test_a_mistake_is_answered_in_one_sentence(server: Client, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GraphFailed, match=sentence) as failed:
        server.run(graph_of(**{"name": "test mistake", **changes}))
    assert "\n" not in failed.value.message.strip()
