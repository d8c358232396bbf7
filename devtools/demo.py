"""The demo: the shipped graph that needs no download, on a real ComfyUI, as one picture."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from . import program
from .client import Graph, GraphFailed, GraphRejected, Progress, Result, ServerGone
from .pack import host_path
from .paths import ROOT, UserError
from .picture import join
from .server import Server

GRAPH = ROOT / "workflows" / "api" / "try_without_downloads.json"
OUTPUT = ROOT / "demo-output"
RESULTS = ("Plain", "PAIntA + RASG")
"""Titles of the graph's nodes that save a picture."""


def _only(graph: Graph, what: str, **wanted: str) -> tuple[str, dict[str, Any]]:
    """The graph's one node with this class or title; UserError where there is not exactly one."""
    found = [
        (node_id, node)
        for node_id, node in graph.items()
        if all({**node, "title": node.get("_meta", {}).get("title")}[key] == value for key, value in wanted.items())
    ]
    if len(found) != 1:
        raise UserError(f"The demo's graph needs exactly one {what}; {GRAPH.name} has {len(found)}.")
    return found[0]


def prepare(graph: Graph) -> dict[str, str]:
    """Show the graph's pictures instead of saving them, and its scene and mask besides.

    Changes the graph in place; returns the node ids of the pictures, in the order in which to show them.
    """
    photo, _ = _only(graph, "Example Photo node", class_type="TrueFillExamplePhoto")
    nodes = {"scene": "demo_scene", "mask": "demo_mask"}
    for title in RESULTS:
        nodes[title], node = _only(graph, f"node with the title {title}", title=title)
        node.update(class_type="PreviewImage", inputs={"images": node["inputs"]["images"]})
    graph["demo_scene"] = {"class_type": "PreviewImage", "inputs": {"images": [photo, 0]}}
    graph["demo_mask_image"] = {"class_type": "MaskToImage", "inputs": {"mask": [photo, 1]}}
    graph["demo_mask"] = {"class_type": "PreviewImage", "inputs": {"images": ["demo_mask_image", 0]}}
    return nodes


def _show(progress: Progress) -> None:
    if progress.node_type == "KSampler" and progress.maximum:
        print(f"  sampling {progress.value}/{progress.maximum}", flush=True)


def _run(server: Server, graph: Graph) -> Result:
    try:
        return server.client.run(graph, _show, timeout=3600)
    except (GraphRejected, GraphFailed, ServerGone, TimeoutError) as error:
        raise UserError(f"{error}\n--- the last lines of {server.log} ---\n{server.tail()}") from error


def _join(result: Result, nodes: dict[str, str]) -> Path:
    OUTPUT.mkdir(exist_ok=True)
    target = OUTPUT / "scene-mask-plain-ours.png"
    target.unlink(missing_ok=True)
    for name, node_id in nodes.items():
        if not result.images.get(node_id):
            raise UserError(f"The graph finished without a picture for the {name}.")
    scene, mask, *results = (result.images[node_id][0] for node_id in nodes.values())
    known = join(target, scene, mask, results)
    print(f"All {known} known pixels (mask 0) came back bit-identical.")
    return target


def main() -> int:
    """Run the shipped graph and write the picture; raises UserError where that fails."""
    started = time.monotonic()
    try:
        graph: Graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"The demo's graph {GRAPH} is missing; restore it from git.") from None
    nodes = prepare(graph)
    print("Starting ComfyUI ...", flush=True)
    with Server(host_path(), Path(sys.executable), log_name="demo") as server:
        print(f"ComfyUI with TrueFill answers at {server.address}; its log is {server.log}", flush=True)
        result = _run(server, graph)
    target = _join(result, nodes)
    _, prompt = _only(graph, "Encode Prompt node", class_type="TrueFillEncodePrompt")
    print(f"The prompt: {prompt['inputs']['prompt']}")
    print(f"Done in {time.monotonic() - started:.0f} s. Scene, hole, {', '.join(RESULTS)}, side by side: {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(program.run(main))
