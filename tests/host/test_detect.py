"""Finding things by words in a running ComfyUI, with the real network and random weights."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.client import Client, GraphFailed, GraphRejected
from devtools.pack import pack_module
from devtools.server import Server
from truefill_testing.graphs import node
from truefill_testing.random_dino import shallow_dino
from truefill_testing.random_segmenters import small_sam

# A strip of the photo: the network looks at few pixels.
WIDTH, HEIGHT = 512, 64
COUNT = 3


@pytest.fixture(scope="module")
def files(comfyui: Server) -> Iterator[dict[str, Path]]:
    """A detector's and a segmenter's file, as long as these tests run."""
    assert comfyui.base is not None
    models = comfyui.base / "models"
    found = {
        "detector": models / "groundingdino" / "truefill_random_dino.pth",
        "segmenter": models / "sams" / "truefill_sam_for_detect.pth",
    }
    for path in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": shallow_dino()}, found["detector"])
    torch.save(small_sam().state_dict(), found["segmenter"])
    yield found
    for path in found.values():
        path.unlink()


SEARCH = {
    "text": "red cup. spoon.",
    "threshold": 0.0,
    "pick": "all",
    "index": 0,
    "count": COUNT,
    "overlap": 0.5,
    "smallest": 0.0,
    "largest": 100.0,
}


def graph(class_type: str, files: dict[str, Path], **inputs: Any) -> dict[str, Any]:
    """Two equal pictures, the node, and what it gives."""
    made = {
        "photo": node("TrueFillExamplePhoto", photo="coffee"),
        "strip": node("ImageCrop", image=["photo", 0], width=WIDTH, height=HEIGHT, x=0, y=100),
        "twice": node("RepeatImageBatch", image=["strip", 0], amount=2),
        "detector": node("TrueFillLoadDetector", detector=files["detector"].name),
        "node": node(class_type, detector=["detector", 0], image=["twice", 0], **{**SEARCH, **inputs}),
    }
    if class_type == "TrueFillDetect":
        for name, output in (("boxes", 0), ("labels", 1), ("scores", 2)):
            made[name] = node("PreviewAny", source=["node", output])
        return made
    made["segmenter"] = node("TrueFillLoadSegmenter", segmenter=files["segmenter"].name)
    made["node"]["inputs"]["segmenter"] = ["segmenter", 0]
    made["labels"] = node("PreviewAny", source=["node", 2])
    made["shown"] = node("MaskToImage", mask=["node", 0])
    made["save"] = node("PreviewImage", images=["shown", 0])
    return made


def text(result: Any, name: str) -> Any:
    return json.loads(result.outputs[name]["text"][0])


@pytest.fixture(scope="module")
def expected(files: dict[str, Path]) -> tuple[torch.Tensor, list[Any]]:
    """The strip, and what counts of what the detector finds in it, in this process."""
    photo, _ = pack_module("imaging.examples").load_example("coffee")
    strip = photo[0, 100 : 100 + HEIGHT, :WIDTH]
    reader, detect = pack_module("weights.detectors"), pack_module("selection.detectors")
    tokenizer = pack_module("weights.grounding_dino").tokenizer()
    detector = detect.Detector.of(reader.read_detector(files["detector"]), tokenizer)
    choice = pack_module("imaging.detections").Choice(threshold=0.0, overlap=0.5, count=COUNT)
    return strip, choice.of(detector.detect(strip, ["red cup", "spoon"]), WIDTH, HEIGHT)


def test_an_engine_that_is_not_there_is_named_before_anything_runs(server: Client, files: dict[str, Path]) -> None:
    made = graph("TrueFillDetect", files)
    made["detector"]["inputs"]["engine"] = "groundingdino-py"
    # ComfyUI's transformers is of version 5 here.
    with pytest.raises(
        GraphRejected, match=r"The engine groundingdino-py .*choose transformers, which answers the same"
    ):
        server.run(made)


def test_boxes_labels_and_scores_of_every_picture(
    server: Client, files: dict[str, Path], expected: tuple[torch.Tensor, list[Any]]
) -> None:
    result = server.run(graph("TrueFillDetect", files))
    _, found = expected
    assert len(found) == COUNT
    assert text(result, "labels") == [[one.label for one in found]] * 2
    scores = text(result, "scores")
    assert scores[0] == scores[1] == pytest.approx([one.score for one in found], abs=1e-3)
    boxes = text(result, "boxes")
    assert len(boxes) == 2 and set(boxes[0][0]) == {"x", "y", "width", "height", "score", "label"}
    for box, one in zip(boxes[0], found, strict=True):
        corners = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
        assert corners == pytest.approx(one.box, abs=0.1)
    (shown,) = result.images["node"]
    assert Image.open(io.BytesIO(shown)).size == (WIDTH, HEIGHT)


def masks(result: Any) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in result.images["save"]]) > 127


def test_a_mask_of_what_was_found(
    server: Client, files: dict[str, Path], expected: tuple[torch.Tensor, list[Any]]
) -> None:
    made = masks(server.run(graph("TrueFillMaskFromText", files)))
    strip, found = expected
    segment, reader = pack_module("selection.segmenters"), pack_module("weights.segmenters")
    segmenter = segment.Segmenter.of(reader.read_segmenter(files["segmenter"]))
    prompts = [segment.Prompt(box=one.box) for one in found]
    wanted, _ = segment.segment_batch(segmenter, strip[None], [prompts], "best")
    assert made.shape == (2, HEIGHT, WIDTH) and np.array_equal(made[0], made[1])
    assert (made[0] != (wanted[0].numpy() > 0)).mean() < 0.01 and 0.001 < made.mean() < 0.999


def test_nothing_found_is_an_empty_mask_and_the_node_shows_it(server: Client, files: dict[str, Path]) -> None:
    result = server.run(graph("TrueFillMaskFromText", files, threshold=1.0))
    made = masks(result)
    assert made.shape == (2, HEIGHT, WIDTH) and not made.any()
    assert text(result, "labels") == [[], []]
    (shown,) = result.images["node"]
    picture = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB")).astype(int)
    plain = np.asarray(Image.open(io.BytesIO(server.run(strip_alone()).images["save"][0])).convert("RGB")).astype(int)
    changed = np.abs(picture - plain).max(axis=-1) > 8
    assert 0.01 < changed.mean() < 0.5 and not changed[HEIGHT // 2 :].any()


def test_a_thin_picture_is_searched_like_any_other(server: Client, files: dict[str, Path]) -> None:
    """Scaled as published it has fewer places than the 900 at which the network looks closer."""
    made = graph("TrueFillMaskFromText", files)
    made["strip"] = node("EmptyImage", width=1024, height=24, batch_size=1, color=8421504)
    result = server.run(made)
    assert masks(result).shape == (2, 24, 1024)
    assert [len(found) for found in text(result, "labels")] == [COUNT, COUNT]


def strip_alone() -> dict[str, Any]:
    return {
        "photo": node("TrueFillExamplePhoto", photo="coffee"),
        "strip": node("ImageCrop", image=["photo", 0], width=WIDTH, height=HEIGHT, x=0, y=100),
        "save": node("PreviewImage", images=["strip", 0]),
    }


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"text": " . "}, "'text' says nothing to look for"),
        ({"smallest": 60.0, "largest": 50.0}, "'smallest' (60 %) is greater than 'largest' (50 %)"),
    ],
)
def test_mistakes_get_one_sentence(server: Client, files: dict[str, Path], inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(GraphFailed) as caught:
        server.run(graph("TrueFillDetect", files, **inputs))
    assert says in str(caught.value)


def test_boxes_fit_segment_and_the_hosts_sam3(server: Client) -> None:
    info = server.object_info()
    kind = info["TrueFillDetect"]["output"][0]
    assert kind == info["SAM3_Detect"]["input"]["optional"]["bboxes"][0]
    assert kind == info["TrueFillSegment"]["input"]["optional"]["boxes"][0]
