"""The shipped graphs in the editor's App mode: what it asks for, and, on the demo model, what comes out.

That the graphs name inputs and outputs that there are, the tests of the workflows' files say for all of them.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest

from devtools.pack import ROOT
from devtools.server import Server

pytestmark = pytest.mark.browser

WORKFLOWS = ROOT / "workflows"
GRAPHS = ("try_without_downloads", "text_inpaint_sd15", "boundary_flux", "click_inpaint_sd15", "subject_sd15")
PROMPT = "a white checkered heart"
STEPS = 2


def editor_graph(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(comfyui: Server, drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What app.cjs saw in the page."""
    first = {"changes": {"KSampler": {"steps": STEPS}}, "typed": PROMPT}
    graphs = [{"name": name, "file": str(WORKFLOWS / f"{name}.json")} for name in GRAPHS]
    graphs[0] |= {"run": first}
    return drive("app.cjs", comfyui, "nodes2", graphs=graphs)


@pytest.mark.parametrize("name", GRAPHS)
def test_it_asks_for_what_the_graph_says(name: str, report: dict[str, Any]) -> None:
    print(report["graphs"][name])
    assert report["pageErrors"] == []


def test_what_is_typed_comes_out(report: dict[str, Any], comfyui: Server) -> None:
    print(report["graphs"][GRAPHS[0]]["result"])
