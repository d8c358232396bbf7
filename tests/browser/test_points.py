"""The editor of points and boxes in the real editor, in both of its modes: real mouse events give the right pixels."""

from __future__ import annotations

import io
import json
import math
import urllib.parse
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.server import Server
from truefill_testing.random_segmenters import small_sam

pytestmark = pytest.mark.browser

SHAPES = {"wide": (640, 352), "tall": (352, 640), "4K": (3840, 2160)}
PLACES = {
    "one": [0.25, 0.5],
    "two": [0.75, 0.4],
    "three": [0.5, 0.25],
    "four": [0.6, 0.7],
    "from": [0.1, 0.15],
    "to": [0.4, 0.35],
}
SEGMENTER = "small.pth"


@pytest.fixture(scope="module")
def photos(comfyui: Server) -> dict[str, str]:
    """A picture of each shape in ComfyUI's input folder, and a small segmenter among its models."""
    assert comfyui.base is not None
    segmenter, folder = comfyui.base / "models" / "sams" / SEGMENTER, comfyui.base / "input"
    segmenter.parent.mkdir(parents=True, exist_ok=True)
    torch.save(small_sam().state_dict(), segmenter)
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name, (width, height) in SHAPES.items():
        cells = rng.integers(40, 220, (9, 9, 3)).astype(np.uint8)
        Image.fromarray(cells).resize((width, height)).save(folder / f"{name}.png")
    return {name: f"{name}.png" for name in SHAPES}


@pytest.fixture(scope="module")
def report(mode: str, comfyui: Server, drive: Callable[..., dict[str, Any]], photos: dict[str, str]) -> dict[str, Any]:
    """What points.cjs saw in the page, in this mode."""
    return drive("points.cjs", comfyui, mode, photos=photos, segmenter=SEGMENTER, places=PLACES)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def seen(report: dict[str, Any], shape: str) -> dict[str, Any]:
    """What was seen after each step, on this picture."""
    return report["played"][shape]


def points(step: dict[str, Any], name: str = "include") -> list[tuple[int, int]]:
    return [(point["x"], point["y"]) for point in json.loads(step[name] or "[]")]


def is_at(point: tuple[int, int], place: list[float], shape: str, stage: list[float]) -> bool:
    """Whether a point is the pixel at a place; a click lands on a whole pixel of the screen."""
    width, height = SHAPES[shape]
    reach = 1 + width / stage[2] / 2, 1 + height / stage[3] / 2
    return abs(point[0] - place[0] * width) <= reach[0] and abs(point[1] - place[1] * height) <= reach[1]


def test_page_reports_no_error(report: dict[str, Any]) -> None:
    assert report["pageErrors"] == []


def test_the_connected_picture_is_shown_in_its_own_shape(seen: dict[str, Any], shape: str) -> None:
    start = seen["start"]
    assert start["hint"] is None and start["marks"] == []
    left, top, width, height = start["stage"]
    frame_left, frame_top, frame_width, frame_height = start["frame"]
    assert width / height == pytest.approx(SHAPES[shape][0] / SHAPES[shape][1], rel=0.01)
    assert width == pytest.approx(frame_width, abs=1) or height == pytest.approx(frame_height, abs=1)
    assert left - frame_left == pytest.approx(frame_left + frame_width - left - width, abs=1)
    assert top - frame_top == pytest.approx(frame_top + frame_height - top - height, abs=1)


def test_a_click_includes_the_pixel_under_it(seen: dict[str, Any], shape: str) -> None:
    (point,) = points(seen["one"])
    assert is_at(point, PLACES["one"], shape, seen["one"]["stage"])
    ((field, x, y),) = seen["one"]["marks"]
    assert field == "include"
    width, height = SHAPES[shape]
    assert (x * width, y * height) == pytest.approx((point[0] + 0.5, point[1] + 0.5), abs=0.5 + width / 400)


def test_shift_and_right_click_exclude_and_open_no_menu(seen: dict[str, Any], shape: str) -> None:
    step = seen["excluded"]
    two, three = points(step, "exclude")
    assert is_at(two, PLACES["two"], shape, step["stage"]) and is_at(three, PLACES["three"], shape, step["stage"])
    assert step["menus"] == 0
    assert points(step) == points(seen["one"])


def test_a_drag_is_a_box_and_moves_no_node(seen: dict[str, Any], shape: str) -> None:
    step = seen["box"]
    (box,) = json.loads(step["drawn"])
    assert is_at((box["x"], box["y"]), PLACES["from"], shape, step["stage"])
    assert is_at((box["x"] + box["width"], box["y"] + box["height"]), PLACES["to"], shape, step["stage"])
    assert step["boxes"] == 1 and step["position"] == seen["start"]["position"]
    assert all(isinstance(side, int) for side in box.values())


def test_keys_move_and_remove_the_last_mark_and_undo(seen: dict[str, Any]) -> None:
    (before,), (after,) = json.loads(seen["box"]["drawn"]), json.loads(seen["nudged"]["drawn"])
    assert (after["x"] - before["x"], after["y"] - before["y"]) == (1, 10)
    assert (after["width"], after["height"]) == (before["width"], before["height"])
    assert seen["deleted"]["drawn"] == "" and seen["deleted"]["boxes"] == 0
    assert seen["undone"]["drawn"] == seen["nudged"]["drawn"]
    assert points(seen["deleted"], "exclude") == points(seen["box"], "exclude")


def test_a_click_on_a_mark_removes_it(seen: dict[str, Any]) -> None:
    assert seen["removed"]["include"] == ""
    assert len(seen["removed"]["marks"]) == len(seen["undone"]["marks"]) - 1
    assert seen["back"]["include"] == seen["undone"]["include"]


@pytest.mark.parametrize("scale", [0.6, 1.4])
def test_the_pixel_is_right_however_far_the_canvas_is_zoomed(seen: dict[str, Any], shape: str, scale: float) -> None:
    step = seen[f"canvas {scale}"]
    assert step["stage"][2] == pytest.approx(scale * seen["back"]["stage"][2], rel=0.02)
    assert is_at(points(step)[-1], PLACES["four"], shape, step["stage"])


def test_zoomed_into_the_picture_single_pixels_can_be_hit(seen: dict[str, Any], shape: str) -> None:
    before, zoomed, clicked = seen["before zoom"], seen["zoomed"], seen["zoomed click"]
    assert zoomed["stage"][2] == pytest.approx(1.25**5 * before["stage"][2], rel=0.01)
    assert zoomed["frame"] == pytest.approx(before["frame"], abs=1)
    # What was under the pointer has stayed there.
    assert is_at(points(clicked)[-1], PLACES["four"], shape, before["stage"])
    spot = [before["stage"][i] + PLACES["four"][i] * before["stage"][2 + i] for i in (0, 1)]
    width, height = SHAPES[shape]
    hit = [
        math.floor((spot[i] - zoomed["stage"][i]) / zoomed["stage"][2 + i] * side)
        for i, side in enumerate((width, height))
    ]
    assert points(clicked)[-1] == pytest.approx(hit, abs=1)
    assert seen["whole"]["stage"] == pytest.approx(before["stage"], abs=1)


def test_plus_and_minus_zoom_and_escape_leaves_a_drag(seen: dict[str, Any]) -> None:
    whole, plus = seen["whole"], seen["plus"]
    assert plus["stage"][2] == pytest.approx(1.25 * whole["stage"][2], rel=0.01)
    assert seen["minus"]["stage"] == pytest.approx(whole["stage"], abs=1)
    for name in ("include", "exclude", "drawn", "marks", "boxes"):
        assert seen["escaped"][name] == whole[name]


def test_clear_takes_all_away_and_undo_brings_it_back(seen: dict[str, Any]) -> None:
    cleared = seen["cleared"]
    assert (cleared["include"], cleared["exclude"], cleared["drawn"]) == ("", "", "")
    assert cleared["marks"] == [] and cleared["boxes"] == 0
    for name in ("include", "exclude", "drawn", "marks", "boxes"):
        assert seen["uncleared"][name] == seen["whole"][name]


def test_what_is_written_is_shown_and_reaches_the_prompt(report: dict[str, Any]) -> None:
    given, prompt = report["live"]["given"], report["live"]["prompt"]
    assert [mark[0] for mark in given["marks"]] == ["include", "exclude"] and given["boxes"] == 1
    assert {name: prompt[name] for name in ("include", "exclude", "drawn")} == {
        name: given[name] for name in ("include", "exclude", "drawn")
    }
    assert set(prompt) == {"image", "include", "exclude", "drawn"}
    assert given["widgetsValues"] == [given["include"], given["exclude"], given["drawn"]]


def test_a_copy_has_the_same_marks_and_its_own(report: dict[str, Any]) -> None:
    live = report["live"]
    for name in ("include", "exclude", "drawn"):
        assert live["copy"][name] == live["given"][name]
    assert len(points(live["clicked"])) == 2 and len(points(live["copy"])) == 1


@pytest.mark.parametrize("what", ["loaded", "ran", "inSubgraph"])
def test_marks_outlive(report: dict[str, Any], what: str) -> None:
    for name in ("include", "exclude", "drawn"):
        assert report["live"][what][name] == report["live"]["clicked"][name]


def test_the_menu_opens_the_pictures_mask_editor(report: dict[str, Any]) -> None:
    assert report["segment"]["menu"] == ["TrueFillSegment"]


def test_after_a_run_the_mask_lies_over_the_picture(report: dict[str, Any], comfyui: Server) -> None:
    found = report["segment"]
    with_mask, without = (
        np.asarray(Image.open(found[name]["picture"]).convert("RGB")).astype(int) for name in ("after", "hidden")
    )
    url = urllib.parse.urlencode(found["file"])
    mask = Image.open(io.BytesIO(comfyui.client.get(f"/view?{url}"))).convert("L")
    inside = np.asarray(mask.resize(with_mask.shape[1::-1])) > 250
    outside = np.asarray(mask.resize(with_mask.shape[1::-1])) < 5
    # Away from the mark, which lies above the mask.
    expected = without + 0.45 * (np.array([0, 229, 255]) - without)
    assert inside.mean() > 0.02
    assert (np.abs(with_mask - expected).max(axis=2)[inside] < 8).mean() > 0.9
    assert not outside.any() or (np.abs(with_mask - without).max(axis=2)[outside] < 8).mean() > 0.9
    assert not found["before"]["mask"] and found["after"]["mask"]
    assert not found["hidden"]["mask"]
    assert found["after"]["stage"] == pytest.approx(found["before"]["stage"], abs=1)
    assert len(points(found["again"])) == 2
