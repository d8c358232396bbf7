"""The node Compare in graphs that a running ComfyUI executes: what it leaves in the history, and what it hands on."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.client import Client, GraphFailed, GraphRejected, Result
from devtools.pack import pack_module
from truefill_testing.graphs import node

comparing = pack_module("imaging.compare")
WIDTH, HEIGHT = 96, 64
BOX = {"x": 40, "y": 16}
BOX_WIDTH, BOX_HEIGHT = 32, 24
PATCH = 8


def plain(color: int, width: int = WIDTH, height: int = HEIGHT) -> dict[str, Any]:
    return node("EmptyImage", width=width, height=height, batch_size=1, color=color)


def pasted(destination: str, source: str, **place: int) -> dict[str, Any]:
    return node("ImageCompositeMasked", destination=[destination, 0], source=[source, 0], resize_source=False, **place)


def graph(**compare: Any) -> dict[str, Any]:
    """A plain picture; the same with a box and a patch painted over, and once more as it was; the box as the mask."""
    inputs = {"before": ["before", 0], "after": ["after", 0], "mask": ["mask", 0]} | compare
    return {
        "before": plain(0x644020),
        "box": plain(0x20C040, BOX_WIDTH, BOX_HEIGHT),
        "patch": plain(0x644120, PATCH, PATCH),
        "changed in the box": pasted("before", "box", **BOX),
        "changed": pasted("changed in the box", "patch", x=0, y=0),
        "after": node("ImageBatch", image1=["changed", 0], image2=["before", 0]),
        "known": node("SolidMask", value=0.0, width=WIDTH, height=HEIGHT),
        "hole": node("SolidMask", value=1.0, width=BOX_WIDTH, height=BOX_HEIGHT),
        "mask": node("MaskComposite", destination=["known", 0], source=["hole", 0], operation="add", **BOX),
        "compare": node("TrueFillCompare", **{name: value for name, value in inputs.items() if value is not None}),
    }


def pictures(server: Client, result: Result, key: str) -> list[np.ndarray]:
    found = []
    for item in result.outputs["compare"][key]:
        assert item["type"] == "temp"
        file = server.view(item["filename"], item["subfolder"], item["type"])
        found.append(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
    return found


def heat(level: float) -> np.ndarray:
    return (255 * comparing.heat_map(torch.tensor(level))).int().numpy()


BOX_PIXELS = BOX_WIDTH * BOX_HEIGHT
FIGURES = [
    f"Outside the mask: 64 of {WIDTH * HEIGHT - BOX_PIXELS:,} pixels changed (1.19 %), max 1, mean 0.0119 levels.\n"
    f"Inside the mask: {BOX_PIXELS} of {BOX_PIXELS} pixels changed (100 %), max 128, mean 128 levels.",
    f"Outside the mask: none of {WIDTH * HEIGHT - BOX_PIXELS:,} pixels changed.\n"
    f"Inside the mask: none of {BOX_PIXELS} pixels changed.",
]


def test_the_history_has_the_pictures_and_the_figures(server: Client) -> None:
    result = server.run(graph())
    output = result.outputs["compare"]
    # Under the key `images` the editor would show them a second time.
    assert set(output) == {"before", "after", "heat", "mask", "text"}
    assert output["text"] == FIGURES
    before, after, map_, mask = (pictures(server, result, key) for key in ("before", "after", "heat", "mask"))
    assert len(before) == len(after) == len(map_) == len(mask) == 2
    assert np.array_equal(before[0], np.broadcast_to([100, 64, 32], (HEIGHT, WIDTH, 3)))
    assert np.array_equal(before[1], before[0]) and np.array_equal(after[1], before[0])
    hole = np.zeros((HEIGHT, WIDTH), bool)
    hole[BOX["y"] : BOX["y"] + BOX_HEIGHT, BOX["x"] : BOX["x"] + BOX_WIDTH] = True
    patch = np.zeros_like(hole)
    patch[:PATCH, :PATCH] = True
    assert (after[0][hole] == [32, 192, 64]).all() and (after[0][patch] == [100, 65, 32]).all()
    assert np.array_equal(mask[0][..., 0] == 255, hole) and np.array_equal(mask[0][..., 0] == 0, ~hole)
    assert (map_[0][~hole & ~patch] == 0).all() and not map_[1].any()
    assert np.abs(map_[0][hole] - heat(128)).max() <= 1
    assert np.abs(map_[0][patch] - heat(1)).max() <= 1


def test_the_outputs_are_the_heat_map_and_the_figures(server: Client) -> None:
    wired = graph()
    wired["map"] = node("PreviewImage", images=["compare", 0])
    wired["text"] = node("PreviewAny", source=["compare", 1])
    result = server.run(wired)
    expected = pictures(server, result, "heat")
    found = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in result.images["map"]]
    assert len(found) == 2 and all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert result.outputs["text"]["text"] == [f"Picture 1\n{FIGURES[0]}\nPicture 2\n{FIGURES[1]}"]
    wired["compare"]["inputs"]["after"] = ["changed", 0]
    assert server.run(wired).outputs["text"]["text"] == FIGURES[:1]


def test_without_a_mask_the_figures_are_of_the_whole_picture(server: Client) -> None:
    output = server.run(graph(mask=None, after=["changed", 0])).outputs["compare"]
    assert set(output) == {"before", "after", "heat", "text"}
    (figures,) = output["text"]
    assert figures.startswith(f"Whole picture: {BOX_PIXELS + PATCH**2} of {WIDTH * HEIGHT:,} pixels changed")


def test_one_picture_after_serves_several_before(server: Client) -> None:
    result = server.run(graph(before=["after", 0], after=["before", 0]))
    assert result.outputs["compare"]["text"] == FIGURES
    assert [item["filename"] for item in result.outputs["compare"]["after"]] == [
        result.outputs["compare"]["after"][0]["filename"]
    ] * 2


def test_alpha_is_compared_and_kept(server: Client) -> None:
    clear = graph(after=["clear", 0])
    clear["clear"] = node("JoinImageWithAlpha", image=["before", 0], alpha=["mask", 0])
    result = server.run(clear)
    assert "Inside the mask: 768 of 768 pixels changed (100 %), max 255" in result.outputs["compare"]["text"][0]
    (item,) = result.outputs["compare"]["after"]
    with Image.open(io.BytesIO(server.view(item["filename"], item["subfolder"], item["type"]))) as after:
        assert after.mode == "RGBA"


def test_a_second_run_brings_the_pictures_again(server: Client) -> None:
    wired = graph()
    assert server.run(wired).outputs["compare"] == server.run(wired).outputs["compare"]


MISTAKES = {
    "two sizes": (
        {"other": plain(0, 64, 48)},
        {"after": ["other", 0]},
        r"'before' is 96x64 pixels and 'after' 64x48: they have to be of one size",
    ),
    "two pictures and three": (
        {"three": node("RepeatImageBatch", image=["before", 0], amount=3)},
        {"before": ["three", 0]},
        r"3 in 'before', 2 in 'after', 1 in 'mask'; each has to have 1 or 3\.",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_answered_in_one_sentence(server: Client, mistake: str) -> None:
    nodes, inputs, message = MISTAKES[mistake]
    with pytest.raises(GraphFailed, match=message) as failed:
        server.run(graph(**inputs) | nodes)
    assert "\n" not in failed.value.message.strip()


@pytest.mark.parametrize("name", ["before", "after"])
def test_both_pictures_are_needed(server: Client, name: str) -> None:
    with pytest.raises(GraphRejected, match=name):
        server.run(graph(**{name: None}))
