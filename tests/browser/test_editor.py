"""The shipped graphs in the real editor: dropped as files on the canvas and run, in both of its modes."""

from __future__ import annotations

import io
import json
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from devtools.pack import ROOT, host_path, pack_module
from devtools.server import Server
from truefill_testing.stand_ins import ANYTHING, SHORT_PILOT, SMALL_SAM3, place_stand_ins

pytestmark = pytest.mark.browser

WORKFLOWS = ROOT / "workflows"
GRAPHS = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
STEPS = 2
# Not the same, or the second picture would come from the host's cache.
SEEDS = {"classic": 1, "nodes2": 2}
MEGAPIXELS, NATIVE = 0.1, 256
HELP = sorted(path.parent.name for path in (ROOT / "js" / "docs").glob("*/en.md"))


def editor_graph(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def api_graph(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def changes(mode: str, name: str) -> dict[str, dict[str, Any]]:
    """Widgets set in the page before Run, so that two cores need seconds."""
    wanted = {
        "KSampler": {"steps": STEPS, "seed": SEEDS[mode]},
        "ImageScaleToTotalPixels": {"megapixels": MEGAPIXELS},
        "TrueFillCropRegion": {"native_size": NATIVE},
        "TrueFillMaskFromText": ANYTHING,
        "SAM3_Detect": {"threshold": 0.0},
        "TrueFillUpscale": {"steps": STEPS - 1, "tile": 0},
        "TrueFillPILOT": {**SHORT_PILOT, "steps": STEPS, "seed": SEEDS[mode]},
        "TrueFillPILOTSampler": SHORT_PILOT,
        "BasicScheduler": {"steps": STEPS},
        "SamplerCustom": {"noise_seed": SEEDS[mode]},
    }
    present = {node["class_type"] for node in api_graph(name).values()}
    return {node_type: widgets for node_type, widgets in wanted.items() if node_type in present}


@pytest.fixture(scope="module")
def comfyui(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with stand-ins under the names of the graphs' models."""
    models = tmp_path_factory.mktemp("models")
    place_stand_ins(models)
    options = {"beside": [SMALL_SAM3], "models": [models], "log_name": "test-browser"}
    with Server(host_path(), Path(sys.executable), **options) as server:
        yield server


@pytest.fixture(scope="module")
def report(mode: str, comfyui: Server, drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What drive.cjs saw in the page, in this mode."""
    graphs = [
        {
            "name": name,
            "file": str(WORKFLOWS / f"{name}.json"),
            "id": editor_graph(name)["id"],
            "changes": changes(mode, name),
        }
        # Help is asked for in the last one, which has to fit beside its panel.
        for name in sorted(GRAPHS, key=lambda name: name.startswith("text_inpaint"))
    ]
    return drive("drive.cjs", comfyui, mode, graphs=graphs, help=HELP)


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


@pytest.mark.parametrize("name", GRAPHS)
def test_run_button_brings_the_picture(name: str, report: dict[str, Any], mode: str, comfyui: Server) -> None:
    result = report["graphs"][name]["result"]
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(result["source"]).query)
    filename, subfolder = query["filename"][0], query["subfolder"][0]

    history = comfyui.client.get_json("/history")
    runs = {
        image["filename"]: run
        for run in history.values()
        for output in run["outputs"].values()
        for image in output.get("images", [])
        if image["subfolder"] == subfolder
    }
    run = runs[filename]
    assert run["status"]["status_str"] == "success"
    expected = api_graph(name)
    for node in expected.values():
        node["inputs"].update(changes(mode, name).get(node["class_type"], {}))
    assert run["prompt"][2] == expected
    with Image.open(io.BytesIO(comfyui.client.view(filename, subfolder))) as picture:
        assert picture.size == (result["width"], result["height"])
        if "ImageScaleToTotalPixels" in changes(mode, name):
            assert picture.width * picture.height == pytest.approx(MEGAPIXELS * 2**20, rel=0.05)
        else:
            (photo,) = (node["inputs"]["photo"] for node in expected.values() if "photo" in node["inputs"])
            shipped, _ = pack_module("imaging.examples").load_example(photo)
            assert picture.size == (shipped.shape[2], shipped.shape[1])


@pytest.mark.parametrize("node_type", HELP)
def test_info_button_shows_the_help_page(node_type: str, report: dict[str, Any]) -> None:
    shown = report["help"][node_type]
    page = (ROOT / "js" / "docs" / node_type / "en.md").read_text(encoding="utf-8")
    headings = [line.lstrip("# ") for line in page.splitlines() if line.startswith("#")]
    assert headings
    assert [heading for heading in headings if heading not in shown["text"]] == []
    # The panel is narrow and cuts wide tables off.
    assert shown["wide"] == []
