"""The blueprints in the real editor, in both of its modes: found by search, and queued as the graphs that they are made from."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.blueprints import BLUEPRINTS, Blueprint
from devtools.pack import ROOT, pack_module
from devtools.server import Server
from truefill_testing.shipped import api_graph

pytestmark = pytest.mark.browser

Prompt = dict[str, dict[str, Any]]
# All in both; the first is searched for.
IN_MODE = {"classic": BLUEPRINTS, "nodes2": BLUEPRINTS[::-1]}
# Its checkpoint is there, of random weights.
RUN = BLUEPRINTS[0]
CHANGES = {"KSampler": {"steps": 2}, "TrueFillCropRegion": {"native_size": 256}}
REACH = 64
"""How far from the hole anything may change, in pixels."""


@pytest.fixture(scope="module")
def report(mode: str, comfyui: Server, drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What blueprints.cjs saw in the page, in this mode."""
    jobs = [
        {
            "name": blueprint.name,
            "file": str(ROOT / "subgraphs" / f"{blueprint.name}.json"),
            "changes": CHANGES if blueprint is RUN else None,
        }
        for blueprint in IN_MODE[mode]
    ]
    return drive("blueprints.cjs", comfyui, mode, blueprints=jobs)


def written_out(prompt: Prompt, link: list[Any], outside: Callable[[str], bool]) -> Any:
    """What a link brings, without the numbers of nodes: its node's type and inputs, and so on up to what lies outside."""
    key, slot = link
    if outside(key):
        return "from outside"
    node = prompt[key]
    inputs = {
        name: written_out(prompt, value, outside) if isinstance(value, list) else value
        for name, value in node["inputs"].items()
    }
    return slot, node["class_type"], inputs


def shipped(blueprint: Blueprint) -> Any:
    """The same part of the graph that it is made from."""
    prompt: Prompt = api_graph(blueprint.graph)

    def inside(key: str) -> bool:
        node = prompt[key]
        return not {node["class_type"], node["_meta"]["title"]}.isdisjoint(blueprint.inside)

    title, _ = blueprint.outputs["image"]
    (end,) = [
        key for key in prompt if inside(key) and title in (prompt[key]["class_type"], prompt[key]["_meta"]["title"])
    ]
    return written_out(prompt, [end, 0], lambda key: not inside(key))


def ends(prompt: Prompt, blueprint: Blueprint, name: str) -> list[Any]:
    """What the inputs of nodes get that an input of the blueprint goes to."""
    found = []
    for title, ending in blueprint.inputs[name]:
        nodes = [node for node in prompt.values() if title in (node["class_type"], node["_meta"]["title"])]
        titled = [node for node in nodes if title == node["_meta"]["title"]]
        (node,) = titled or nodes
        found.append(node["inputs"].get(ending))
    return found


def test_page_reports_no_error(report: dict[str, Any]) -> None:
    assert report["pageErrors"] == []


def test_what_is_queued_is_the_graph(report: dict[str, Any], mode: str) -> None:
    for blueprint in IN_MODE[mode]:
        compare(blueprint, report["blueprints"][blueprint.name])


def compare(blueprint: Blueprint, seen: dict[str, Any]) -> None:
    assert seen["broken"] == [] and seen["title"] == blueprint.name
    assert seen["outputs"] == list(blueprint.outputs)
    prompt = seen["prompt"]
    (save,) = [node for node in prompt.values() if node["class_type"] == "SaveImage"]
    sources = {key: name for name, key in seen["sources"].items()}
    ours = written_out(prompt, save["inputs"]["images"], lambda key: key in sources)
    # A mask that may be left open is open in the graph.
    optional = {name for name in seen["sources"] if None in ends_in_graph(blueprint, name)}
    assert without(ours, blueprint, optional) == shipped(blueprint)


def test_each_input_goes_where_it_belongs(report: dict[str, Any], mode: str) -> None:
    for blueprint in IN_MODE[mode]:
        seen = report["blueprints"][blueprint.name]
        shown = [name for name in blueprint.inputs if name not in seen["sources"]]
        assert [name for name in seen["widgets"] if name in shown] == shown
        for name, key in seen["sources"].items():
            assert {link[0] for link in ends(seen["prompt"], blueprint, name)} == {key}


def test_its_run_fills_the_hole_and_leaves_the_rest(report: dict[str, Any], comfyui: Server) -> None:
    seen = report["blueprints"][RUN.name]
    assert seen["ended"]["status"]["status_str"] == "success"
    ((saved,),) = [output["images"] for output in seen["ended"]["outputs"].values() if "images" in output]
    (source,) = {node["inputs"]["photo"] for node in seen["prompt"].values() if "photo" in node["inputs"]}
    photo, hole = pack_module("imaging.examples").load_example(source)
    with Image.open(io.BytesIO(comfyui.client.view(saved["filename"], saved["subfolder"]))) as picture:
        made = torch.from_numpy(np.array(picture.convert("RGB")))
    given = (photo[0] * 255).round().byte()
    near = torch.nn.functional.max_pool2d(hole[:, None], 2 * REACH + 1, stride=1, padding=REACH)[0, 0] > 0
    assert near.any() and not near.all()
    assert torch.equal(made[~near], given[~near])
    changed = (made.int() - given.int()).abs().amax(dim=-1)[hole[0] > 0.5]
    assert (changed > 8).float().mean() > 0.5


def ends_in_graph(blueprint: Blueprint, name: str) -> list[Any]:
    return ends(
        api_graph(blueprint.graph),
        blueprint,
        name,
    )


def without(tree: Any, blueprint: Blueprint, optional: set[str]) -> Any:
    """The tree without what optional inputs bring."""
    left_out = {ending for name in optional for ending in blueprint.inputs[name]}
    if not isinstance(tree, tuple):
        return tree
    slot, kind, inputs = tree
    kept = {name: without(value, blueprint, optional) for name, value in inputs.items() if (kind, name) not in left_out}
    return slot, kind, kept
