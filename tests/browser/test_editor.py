"""The shipped graphs in the real editor, in both of its modes: dropped as files on the canvas, and the demo model's run.

What a graph computes, the tests of tests/host run without a browser, for all of them. Here those that need no downloads are run,
the first one in both modes and the others in one, and each help page is opened in one.
"""

from __future__ import annotations

import io
import urllib.parse
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from PIL import Image

from devtools.pack import ROOT, pack_module
from devtools.server import Server
from truefill_testing.shipped import GRAPHS, WORKFLOWS, api_graph, editor_graph
from truefill_testing.stand_ins import SHORT_PILOT, SHORT_TRAINING

pytestmark = pytest.mark.browser

STEPS, SEED = 2, 1
MEGAPIXELS, NATIVE = 0.1, 256
HELP = sorted(path.parent.name for path in (ROOT / "js" / "docs").glob("*/en.md"))
FIRST = "try_without_downloads"
DEMOS = [name for name in GRAPHS if name.endswith("_demo")]
# Whose turn it is in which mode.
RUN_IN = {"classic": [FIRST, *DEMOS[::2]], "nodes2": [FIRST, *DEMOS[1::2]]}
HELP_IN = {"classic": HELP[::2], "nodes2": HELP[1::2]}


def changes(name: str) -> dict[str, dict[str, Any]]:
    """Widgets set in the page before Run, so that two cores need seconds."""
    wanted = {
        "KSampler": {"steps": STEPS, "seed": SEED},
        "ImageScaleToTotalPixels": {"megapixels": MEGAPIXELS},
        "TrueFillCropRegion": {"native_size": NATIVE},
        "TrueFillUpscale": {"steps": STEPS - 1, "tile": 0},
        "TrueFillDreamMix": {"steps": STEPS, "seed": SEED},
        "TrueFillTrainSubject": SHORT_TRAINING,
        "TrueFillPILOT": {**SHORT_PILOT, "steps": STEPS, "seed": SEED},
    }
    present = {node["class_type"] for node in api_graph(name).values()}
    return {node_type: widgets for node_type, widgets in wanted.items() if node_type in present}


@pytest.fixture(scope="module")
def report(mode: str, comfyui: Server, drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What drive.cjs saw in the page, in this mode."""
    graphs = [
        {
            "name": name,
            "file": str(WORKFLOWS / f"{name}.json"),
            "id": editor_graph(name)["id"],
            "changes": changes(name) if name in RUN_IN[mode] else None,
        }
        # Help is asked for in the last one, which has to fit beside its panel.
        for name in sorted(GRAPHS, key=lambda name: name.startswith("text_inpaint"))
    ]
    return drive("drive.cjs", comfyui, mode, graphs=graphs, help=HELP_IN[mode])


def test_page_reports_no_error(report: dict[str, Any]) -> None:
    assert report["pageErrors"] == []


@pytest.mark.parametrize("name", GRAPHS)
def test_dropped_graph_is_complete(name: str, report: dict[str, Any], mode: str) -> None:
    seen = report["graphs"][name]
    assert seen["dialogs"] == []
    assert [node["type"] for node in seen["nodes"] if node["broken"]] == []
    shipped = {(str(node["id"]), node["type"]) for node in editor_graph(name)["nodes"]}
    assert {(node["id"], node["type"]) for node in seen["nodes"]} == shipped
    # Otherwise the editor has stayed in its other mode.
    assert {node["element"] for node in seen["nodes"]} == {mode == "nodes2"}


@pytest.mark.parametrize("name", GRAPHS)
def test_editor_makes_the_shipped_api_graph(name: str, report: dict[str, Any]) -> None:
    assert report["graphs"][name]["prompt"] == api_graph(name)


@pytest.mark.parametrize("name", GRAPHS)
def test_drawn_nodes_do_not_overlap_and_show_their_text(name: str, report: dict[str, Any]) -> None:
    seen = report["graphs"][name]
    assert seen["cut"] == []
    (note,) = seen["notes"]
    assert "Open in MaskEditor" in note
    for one, other in combinations(seen["nodes"], 2):
        a, b = one["box"], other["box"]
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one['type']} and {other['type']} overlap"


def test_run_button_brings_the_picture(report: dict[str, Any], mode: str, comfyui: Server) -> None:
    history = comfyui.client.get_json("/history")
    for name in RUN_IN[mode]:
        result = report["graphs"][name]["result"]
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(result["source"]).query)
        filename, subfolder = query["filename"][0], query["subfolder"][0]
        runs = {
            image["filename"]: run
            for run in history.values()
            for output in run["outputs"].values()
            for image in output.get("images", [])
            if image["subfolder"] == subfolder
        }
        run = runs[filename]
        assert run["status"]["status_str"] == "success", name
        expected = api_graph(name)
        for node in expected.values():
            node["inputs"].update(changes(name).get(node["class_type"], {}))
        assert run["prompt"][2] == expected, name
        with Image.open(io.BytesIO(comfyui.client.view(filename, subfolder))) as picture:
            assert picture.size == (result["width"], result["height"]), name
            if "ImageScaleToTotalPixels" in changes(name):
                assert picture.width * picture.height == pytest.approx(MEGAPIXELS * 2**20, rel=0.05), name
            else:
                photos = [node["inputs"]["photo"] for node in expected.values() if "photo" in node["inputs"]]
                shapes = {pack_module("imaging.examples").load_example(photo)[0].shape for photo in photos}
                assert shapes == {(1, picture.height, picture.width, 3)}, name


def test_info_button_shows_the_help_page(report: dict[str, Any], mode: str) -> None:
    for node_type in HELP_IN[mode]:
        shown = report["help"][node_type]
        page = (ROOT / "js" / "docs" / node_type / "en.md").read_text(encoding="utf-8")
        headings = [line.lstrip("# ") for line in page.splitlines() if line.startswith("#")]
        assert headings, node_type
        assert [heading for heading in headings if heading not in shown["text"]] == [], node_type
        # The panel is narrow and cuts wide tables off.
        assert shown["wide"] == [], node_type
