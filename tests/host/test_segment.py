"""Pointing at things in a running ComfyUI, with a small Segment Anything file in its models folder."""

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
from devtools.pack import ROOT, pack_module
from devtools.server import Server
from truefill_testing.graphs import node
from truefill_testing.random_segmenters import sam2_state, small_sam

FILE = "truefill_small_sam.pth"


@pytest.fixture(scope="module")
def file(comfyui: Server) -> Iterator[Path]:
    """The file, as long as these tests run."""
    assert comfyui.base is not None
    path = comfyui.base / "models" / "sams" / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(small_sam().state_dict(), path)
    (path.parent / "unet.pth").unlink(missing_ok=True)
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(4)}, path.parent / "unet.pth")
    yield path
    path.unlink()
    (path.parent / "unet.pth").unlink()


def graph(include: str, **inputs: Any) -> dict[str, Any]:
    return {
        "photo": node("TrueFillExamplePhoto", photo="coffee"),
        "load": node("TrueFillLoadSegmenter", segmenter=FILE),
        "segment": node(
            "TrueFillSegment",
            segmenter=["load", 0],
            image=["photo", 0],
            **{"include": include, "exclude": "", "drawn": "", "pick": "best", "separate": False, **inputs},
        ),
        "shown": node("MaskToImage", mask=["segment", 0]),
        "save": node("PreviewImage", images=["shown", 0]),
        "scores": node("PreviewAny", source=["segment", 1]),
    }


def mask(images: list[bytes]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in images]) > 127


def test_a_point_becomes_the_mask_that_the_model_gives(server: Client, file: Path) -> None:
    result = server.run(graph('[{"x": 130, "y": 120}]'))
    segment, reader = pack_module("selection.segmenters"), pack_module("weights.segmenters")
    photo, _ = pack_module("imaging.examples").load_example("coffee")
    segmenter = segment.Segmenter.of(reader.read_segmenter(file))
    expected, _ = segmenter.segment(photo[0], [segment.Prompt([(130.0, 120.0)])])[0].pick("best")
    found = mask(result.images["save"])
    assert found.shape == (1, *photo.shape[1:3])
    # The server's process may use another number of threads.
    assert (found[0] != expected.numpy()).mean() < 0.001
    assert 0.001 < found.mean() < 0.999


@pytest.mark.parametrize(
    ("class_type", "name"), [("TrueFillLoadSegmenter", "segmenter"), ("TrueFillLoadDetector", "detector")]
)
def test_a_file_that_is_not_there_is_named_before_anything_runs(server: Client, class_type: str, name: str) -> None:
    nodes = {"load": node(class_type, **{name: "not_there.pth"}), "show": node("PreviewAny", source=["load", 0])}
    with pytest.raises(GraphRejected, match=r"There is no not_there\.pth in .*: get a .* file \(https://"):
        server.run(nodes)
    # What the editor tells a new user by.
    assert "not_there.pth" not in server.object_info()[class_type]["input"]["required"][name][1]["options"]


def test_the_authors_package_finds_the_same(server: Client, file: Path) -> None:
    made = graph('[{"x": 130, "y": 120}]')
    by_default = mask(server.run(made).images["save"])
    made["load"]["inputs"]["engine"] = "segment-anything"
    assert (mask(server.run(made).images["save"]) != by_default).mean() < 0.001
    made["load"]["inputs"]["segmenter"] = "demo"
    with pytest.raises(
        GraphFailed, match=r"is not as Segment Anything was published, which the engine segment-anything"
    ):
        server.run(made)


def test_a_sam2_file_in_its_own_folder_is_listed_and_works(server: Client, file: Path) -> None:
    path = file.parent.parent / "sam2" / "truefill_sam2.1_hiera_tiny.pt"
    path.parent.mkdir(exist_ok=True)
    state = sam2_state(json.loads((ROOT / "tests" / "data" / "sam2_1_hiera_tiny.json").read_text())["shapes"])
    torch.save({"model": state}, path)
    made = graph('[{"x": 130, "y": 120}]')
    made["load"]["inputs"]["segmenter"] = path.name
    try:
        found = mask(server.run(made).images["save"])
    finally:
        path.unlink()
    segment, reader = pack_module("selection.segmenters"), pack_module("weights.segmenters")
    photo, _ = pack_module("imaging.examples").load_example("coffee")
    segmenter = segment.Segmenter.of(reader.segmenter_from_state(state, "sam2.pt"))
    expected, _ = segmenter.segment(photo[0], [segment.Prompt([(130.0, 120.0)])])[0].pick("best")
    # The server's process may use another number of threads.
    assert (found[0] != expected.numpy()).mean() < 0.001
    assert 0.001 < found.mean() < 0.999


def test_points_and_boxes_of_another_node_are_those_written_in_the_node(server: Client, file: Path) -> None:
    include, exclude = '[{"x": 130, "y": 120}]', '[{"x": 20, "y": 30}]'
    drawn = json.dumps(
        [{"x": 80, "y": 60, "width": 120, "height": 140}, {"x": 10, "y": 200, "width": 300, "height": 90}]
    )
    own = graph(include, exclude=exclude, drawn=drawn, separate=True)
    other = graph("", separate=True)
    other["points"] = node("TrueFillPoints", image=["photo", 0], include=include, exclude=exclude, drawn=drawn)
    other["segment"]["inputs"] |= {"include": ["points", 0], "exclude": ["points", 1], "boxes": ["points", 2]}
    masks = mask(server.run(own).images["save"])
    assert masks.shape[0] == 2 and (masks[0] != masks[1]).any()
    assert np.array_equal(mask(server.run(other).images["save"]), masks)
    for graph_of_it, name in ((own, "separate"), (other, "separate")):
        graph_of_it["segment"]["inputs"][name] = False
        assert np.array_equal(mask(server.run(graph_of_it).images["save"])[0], masks.any(axis=0))
    del other["segment"]["inputs"]["boxes"]
    assert not np.array_equal(mask(server.run(other).images["save"])[0], masks.any(axis=0))


def test_a_box_of_the_host_is_one_of_ours(server: Client, file: Path) -> None:
    drawn = graph("", drawn='[{"x": 80, "y": 60, "width": 120, "height": 140}]')
    made = graph("")
    made["box"] = node("PrimitiveBoundingBox", x=80, y=60, width=120, height=140)
    made["segment"]["inputs"]["boxes"] = ["box", 0]
    assert np.array_equal(mask(server.run(made).images["save"]), mask(server.run(drawn).images["save"]))


def test_points_fit_the_hosts_sam3(server: Client) -> None:
    info = server.object_info()
    optional = info["SAM3_Detect"]["input"]["optional"]
    wanted = [optional[name][0] for name in ("positive_coords", "negative_coords", "bboxes")]
    assert info["TrueFillPoints"]["output"] == wanted


def test_an_empty_rough_mask_gives_an_empty_mask(server: Client, file: Path) -> None:
    made = graph("")
    made["nothing"] = node("SolidMask", value=0.0, width=64, height=64)
    made["segment"]["inputs"]["rough"] = ["nothing", 0]
    assert not mask(server.run(made).images["save"]).any()


@pytest.mark.parametrize("size", [(4096, 7), (4096, 1), (2, 1500), (1, 1)], ids=str)
def test_a_thin_picture_has_a_mask_of_its_size(server: Client, file: Path, size: tuple[int, int]) -> None:
    width, height = size
    made = graph(json.dumps([{"x": width - 1, "y": height - 1}]), rough=["rough", 0])
    made["photo"] = node("EmptyImage", width=width, height=height, batch_size=2, color=8421504)
    made["rough"] = node("SolidMask", value=1.0, width=64, height=64)
    assert mask(server.run(made).images["save"]).shape == (2, height, width)


OUTSIDE = {"x": 700, "y": 3, "width": 5, "height": 5}


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (
            {},
            "Nothing says where the thing is: click on it ('include'), drag a box around it ('drawn'), or connect 'boxes'",
        ),
        ({"include": "12, 30"}, "'include' is '12, 30', but a list of points such as"),
        ({"include": json.dumps([{"x": 5000, "y": 3}])}, "outside of the picture of 512x384 pixels"),
        ({"drawn": json.dumps([OUTSIDE])}, "'drawn' has the box from (700, 3) to (705, 8), which lies outside"),
        ({"boxes": ["box", 0]}, "'boxes' has the box from (700, 3) to (705, 8), which lies outside"),
    ],
)
def test_mistakes_get_one_sentence(server: Client, file: Path, inputs: dict[str, Any], says: str) -> None:
    made = graph("")
    made["box"] = node("PrimitiveBoundingBox", **OUTSIDE)
    made["segment"]["inputs"] |= inputs
    with pytest.raises(GraphFailed) as caught:
        server.run(made)
    assert says in str(caught.value)


def test_a_file_of_another_model_is_named(server: Client, file: Path) -> None:
    made = graph('[{"x": 130, "y": 120}]')
    made["load"]["inputs"]["segmenter"] = "unet.pth"
    with pytest.raises(
        GraphFailed, match=r"unet\.pth is a diffusion checkpoint, but a Segment Anything .* or SAM 2 file"
    ):
        server.run(made)


def test_a_file_that_is_not_there_is_refused(server: Client, file: Path) -> None:
    made = graph('[{"x": 130, "y": 120}]')
    made["load"]["inputs"]["segmenter"] = "sam_vit_h_4b8939.pth"
    with pytest.raises(GraphRejected, match="sam_vit_h_4b8939"):
        server.run(made)
