"""The view on the node Compare in the real editor, in both of its modes: what it shows, and that it lives as nodes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.pack import pack_module
from devtools.server import Server

pytestmark = pytest.mark.browser

SHAPES = {"wide": [640, 352], "tall": [352, 640]}
# Left, top, right, bottom in parts of the picture.
CHANGE, PATCH = [0.125, 0.25, 0.875, 0.75], [0.0, 0.0, 0.0625, 0.0625]
COLOURS = {"before": (200, 0, 0), "change": (0, 0, 200), "patch": (201, 0, 0)}
BEFORE, AFTER, BLACK = COLOURS["before"], COLOURS["change"], (0, 0, 0)
IN_CHANGE, IN_PATCH, KNOWN = 0.4, 0.03, 0.9
CYAN = (0, 229, 255)
VIEWS = ["before | after", "difference"]


@pytest.fixture(scope="module")
def report(mode: str, comfyui: Server, drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What compare.cjs saw in the page, in this mode."""
    numbers = {name: (red << 16) + (green << 8) + blue for name, (red, green, blue) in COLOURS.items()}
    return drive("compare.cjs", comfyui, mode, shapes=SHAPES, change=CHANGE, patch=PATCH, colours=numbers)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def seen(report: dict[str, Any], shape: str) -> dict[str, Any]:
    """What was seen after each step, for this shape of picture."""
    return report["played"][shape]


def pixels(step: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(step["picture"]).convert("RGB")).astype(int)


def colour(step: dict[str, Any], x: float, y: float) -> tuple[int, ...]:
    """What the stage shows at a place given in parts of its width and height."""
    shown = pixels(step)
    return tuple(shown[int(y * shown.shape[0]), int(x * shown.shape[1])].tolist())


def near(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 2


def heat(level: float) -> tuple[int, ...]:
    ramp = pack_module("imaging.compare").heat_map(torch.tensor([level]))[0]
    return tuple(int(value) for value in 255 * ramp)


def sides(step: dict[str, Any]) -> list[str]:
    """Which of the two pictures is shown at so many places from left to right, all of them in the change."""
    names = {BEFORE: "before", AFTER: "after"}
    shown = [colour(step, x, IN_CHANGE) for x in (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)]
    return [next((name for known, name in names.items() if near(known, place)), str(place)) for place in shown]


def test_page_reports_no_error(report: dict[str, Any]) -> None:
    assert report["pageErrors"] == []


def test_before_the_first_run_there_is_a_hint(seen: dict[str, Any]) -> None:
    assert "Run the workflow" in seen["empty"]["hint"]
    assert seen["empty"]["stage"] is None
    assert seen["empty"]["enabled"] == []


def test_the_picture_fits_into_the_frame_in_its_own_shape(seen: dict[str, Any], shape: str) -> None:
    assert seen["run"]["hint"] is None
    left, top, width, height = seen["run"]["stage"]
    frame_left, frame_top, frame_width, frame_height = seen["run"]["frame"]
    assert width / height == pytest.approx(SHAPES[shape][0] / SHAPES[shape][1], rel=0.01)
    assert width == pytest.approx(frame_width, abs=1) or height == pytest.approx(frame_height, abs=1)
    assert left - frame_left == pytest.approx(frame_left + frame_width - left - width, abs=1)
    assert top - frame_top == pytest.approx(frame_top + frame_height - top - height, abs=1)
    assert min(left - frame_left, top - frame_top) > -1
    assert seen["run"]["cut"] == 0


@pytest.mark.parametrize(
    ("step", "divider", "shown"),
    [
        ("run", 50, ["before"] * 4 + ["after"] * 4),
        ("dragged", 20, ["before"] + ["after"] * 7),
        ("keys", 32, ["before"] * 2 + ["after"] * 6),
        ("end", 100, ["before"] * 8),
        ("home", 0, ["after"] * 8),
    ],
)
def test_the_divider_parts_before_from_after(seen: dict[str, Any], step: str, divider: int, shown: list[str]) -> None:
    assert seen[step]["divider"] == pytest.approx(divider, abs=1)
    assert sides(seen[step]) == shown
    assert near(colour(seen[step], KNOWN, KNOWN), BEFORE)
    assert seen[step]["pressed"] == VIEWS[:1]


def test_the_heat_map_shows_every_difference_and_nothing_else(seen: dict[str, Any]) -> None:
    step = seen["difference"]
    assert step["pressed"] == VIEWS[1:]
    assert step["divider"] is None
    assert near(colour(step, 0.5, IN_CHANGE), heat(200))
    assert near(colour(step, IN_PATCH, IN_PATCH), heat(1))
    assert near(colour(step, KNOWN, KNOWN), BLACK)
    shown = pixels(step)
    assert (shown.max(axis=2) > 40).mean() == pytest.approx(0.75 * 0.5 + 0.0625**2, abs=0.01)


@pytest.mark.parametrize("step", ["mask", "mask-difference"])
def test_the_outline_follows_the_edge_of_the_mask(seen: dict[str, Any], step: str) -> None:
    def outline(step: dict[str, Any]) -> np.ndarray:
        return np.abs(pixels(step) - CYAN).max(axis=2) < 60

    assert not outline(seen["run"]).any()
    assert not outline(seen["difference"]).any()
    assert "mask" in seen[step]["pressed"]
    drawn = outline(seen[step])
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    height, width = drawn.shape
    box = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    assert box == pytest.approx(CHANGE, abs=0.02)
    assert drawn[:, int(0.5 * width)].sum() < 0.1 * height


def test_a_batch_is_shown_picture_by_picture(seen: dict[str, Any], shape: str) -> None:
    width, height = SHAPES[shape]
    inside = width * height * 3 // 8
    first, second = seen["run"]["figures"].splitlines(), seen["next"]["figures"].splitlines()
    assert first[0].startswith(
        f"Outside the mask: {width * height // 256:,} of {width * height - inside:,} pixels changed"
    )
    assert first[1].startswith(f"Inside the mask: {inside:,} of {inside:,} pixels changed (100 %), max 200")
    assert [line.partition(": ")[2].startswith("none of ") for line in second] == [True, True]
    assert "Next picture" in seen["run"]["enabled"] and "Previous picture" not in seen["run"]["enabled"]
    assert "Previous picture" in seen["next"]["enabled"] and "Next picture" not in seen["next"]["enabled"]
    assert sides(seen["next"]) == ["before"] * 8
    assert pixels(seen["difference-next"]).max() <= 2
    assert sides(seen["back"]) == ["after"] * 8
    assert seen["back"]["figures"] == seen["run"]["figures"]


def test_nothing_of_the_host_is_added_or_replaced(report: dict[str, Any], mode: str) -> None:
    found = report["live"]["surroundings"]
    assert found["element"] == (mode == "nodes2")
    assert found["widgets"] == ["comparison"]
    assert found["hostImages"] == 0
    assert found["images"] == (3 if mode == "nodes2" else 0)
    assert found["styles"] == 1
    assert found["widgetsValues"] == []
    assert report["live"]["executed"] == 1
    assert set(report["live"]["prompt"]) == {"before", "after", "mask"}


def test_the_canvas_is_moved_and_zoomed_over_the_picture(report: dict[str, Any]) -> None:
    start, moved, zoomed = report["live"]["views"]
    assert moved["scale"] == start["scale"] < zoomed["scale"]
    assert [after - before for before, after in zip(start["offset"], moved["offset"], strict=True)] == [20, 40]


def test_a_copy_is_empty_and_goes_without_a_trace(report: dict[str, Any]) -> None:
    assert report["live"]["copied"] == {"nodes": 2, "inPage": 2, "shown": 1}
    assert report["live"]["removed"] == {"nodes": 1, "inPage": 1, "shown": 1}


@pytest.mark.parametrize("what", ["undone", "otherTab", "inSubgraph", "undoneInSubgraph", "otherTabInSubgraph"])
def test_the_pictures_are_still_there(report: dict[str, Any], what: str) -> None:
    assert report["live"][what] == {"nodes": 1, "inPage": 1, "shown": 1}


def test_where_the_pictures_are_gone_it_says_what_to_do(report: dict[str, Any]) -> None:
    assert "gone from the server" in report["live"]["gone"]["hint"]
    assert report["live"]["gone"]["stage"] is None
    assert "Run the workflow" in report["live"]["reloaded"]["hint"]
    assert report["live"]["reloaded"]["stage"] is None
