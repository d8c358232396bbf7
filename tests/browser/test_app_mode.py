"""The shipped graphs in the editor's App mode: what it asks for, and, on the demo model, what comes out.

That the graphs name inputs and outputs that there are, the tests of the workflows' files say for all of them.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest

from devtools.server import Server
from truefill_testing.shipped import WORKFLOWS, api_graph, editor_graph

pytestmark = pytest.mark.browser

FIRST = "try_without_downloads"
GRAPHS = {
    "classic": (FIRST, "text_inpaint_sd15"),
    "nodes2": (FIRST, "boundary_flux", "click_inpaint_sd15", "subject_sd15"),
}
# Each its own: of a run that finds everything made App mode may miss the end.
PROMPT = {"classic": "a white checkered heart", "nodes2": "a blue striped ring"}
STEPS = 2


def asked_for(name: str) -> list[str]:
    return [widget for _, widget in editor_graph(name)["extra"]["linearData"]["inputs"]]


@pytest.fixture(scope="module")
def report(mode: str, comfyui: Server, drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What app.cjs saw in the page, entered from this mode."""
    graphs: list[dict[str, Any]] = [{"name": name, "file": str(WORKFLOWS / f"{name}.json")} for name in GRAPHS[mode]]
    outputs = len(editor_graph(FIRST)["extra"]["linearData"]["outputs"])
    graphs[0]["run"] = {"changes": {"KSampler": {"steps": STEPS}}, "typed": PROMPT[mode], "outputs": outputs}
    return drive("app.cjs", comfyui, mode, graphs=graphs)


def test_it_asks_for_what_the_graph_says(mode: str, report: dict[str, Any]) -> None:
    assert report["pageErrors"] == []
    for name in GRAPHS[mode]:
        wanted = asked_for(name)
        assert [line for line in report["graphs"][name]["asked"].splitlines() if line in wanted] == wanted


def test_what_is_typed_is_what_is_run(mode: str, report: dict[str, Any], comfyui: Server) -> None:
    shown = [
        urllib.parse.parse_qs(urllib.parse.urlsplit(source).query)["filename"][0]
        for source in report["graphs"][FIRST]["results"]
    ]
    runs = []
    for run in comfyui.client.get_json("/history").values():
        images = [image["filename"] for output in run["outputs"].values() for image in output.get("images", [])]
        runs.append((run["prompt"][2], sorted(images)))
    (graph,) = [graph for graph, files in runs if files == sorted(shown)]
    expected = api_graph(FIRST)
    for node in expected.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = STEPS
        if node["class_type"] == "TrueFillEncodePrompt":
            node["inputs"]["prompt"] = PROMPT[mode]
    assert graph == expected
