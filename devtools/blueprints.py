"""Makes the blueprints: shipped graphs, or parts of them, as a single node of the editor (`subgraphs/*.json`).

python devtools/launch.py -m devtools.blueprints      writes them anew from workflows/*.json
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .paths import ROOT

Graph = dict[str, Any]
Ending = tuple[str, str]
"""A node, by its title or its type, and one of its inputs or outputs."""

_CATEGORY = "Image generation and editing/TrueFill"
_INPUTS, _OUTPUTS = -10, -20


@dataclass(frozen=True)
class Blueprint:
    """A node to be, made of a shipped graph.

    name: without a comma, which the editor's search takes for something else. inside: titles or types of the nodes that go into
    it. inputs, outputs: what it shows, by the name that it has there. Several endings of an input get the same.
    """

    name: str
    description: str
    graph: str
    inside: tuple[str, ...]
    inputs: dict[str, tuple[Ending, ...]]
    outputs: dict[str, Ending]


_FILL = (
    "CheckpointLoaderSimple",
    "TrueFillCropRegion",
    "TrueFillEncodePrompt",
    "Negative Prompt",
    "InpaintModelConditioning",
    "KSampler",
    "VAEDecode",
    "TrueFillStitchRegion",
)
_STITCHED = {"image": ("TrueFillStitchRegion", "IMAGE"), "changed": ("TrueFillStitchRegion", "MASK")}
_REGION: dict[str, tuple[Ending, ...]] = {
    "image": (("TrueFillCropRegion", "image"),),
    "mask": (("TrueFillCropRegion", "mask"),),
}
_WORDS: dict[str, tuple[Ending, ...]] = {
    "prompt": (("TrueFillEncodePrompt", "prompt"),),
    "negative_prompt": (("Negative Prompt", "text"),),
}
_FILLING: dict[str, tuple[Ending, ...]] = {
    **_REGION,
    **_WORDS,
    "seed": (("KSampler", "seed"),),
    "context_percent": (("TrueFillCropRegion", "context_percent"),),
    "ckpt_name": (("CheckpointLoaderSimple", "ckpt_name"),),
}

BLUEPRINTS = (
    Blueprint(
        "Inpaint What I Say (SD1.5 inpainting)",
        "Puts what the prompt says into the hole, at the model's own size, with PAIntA and RASG; the rest stays as it is.",
        "crop_stitch_sd15",
        (*_FILL, "TrueFillPAIntA", "TrueFillRASG"),
        _FILLING,
        _STITCHED,
    ),
    Blueprint(
        "Inpaint With Any Model (PILOT SD1.5)",
        "Fills the hole with a model that was never trained to inpaint: PILOT optimizes the latent while it is sampled.",
        "pilot_sd15",
        (
            "CheckpointLoaderSimple",
            "TrueFillCropRegion",
            "TrueFillEncodePrompt",
            "Negative Prompt",
            "TrueFillPILOT",
            "TrueFillStitchRegion",
        ),
        {
            **_REGION,
            **_WORDS,
            "seed": (("TrueFillPILOT", "seed"),),
            "steps": (("TrueFillPILOT", "steps"),),
            "context_percent": (("TrueFillCropRegion", "context_percent"),),
            "ckpt_name": (("CheckpointLoaderSimple", "ckpt_name"),),
        },
        _STITCHED,
    ),
    Blueprint(
        "Remove (PowerPaint SD1.5)",
        "Takes what is in the hole out of the picture: the prompt says what is behind it, the negative prompt what shall go.",
        "powerpaint_remove_sd15",
        (*_FILL, "TrueFillLoadBranch", "TrueFillApplyBranch", "TrueFillPowerPaintPrompt"),
        {**_FILLING, "branch_name": (("TrueFillLoadBranch", "branch"),)},
        _STITCHED,
    ),
    Blueprint(
        "Insert This Subject (SD1.5 inpainting)",
        "Puts the subject of another picture into the hole, with the prompt still in control: LAR-Gen's Assign and Refine.",
        "subject_sd15",
        (
            *_FILL,
            "CLIPVisionLoader",
            "TrueFillLoadSubjectAdapter",
            "TrueFillEncodeSubject",
            "TrueFillAssign",
            "TrueFillRefine",
        ),
        {
            **_REGION,
            "subject": (("TrueFillEncodeSubject", "image"),),
            "subject_mask": (("TrueFillEncodeSubject", "mask"),),
            **_WORDS,
            "beta": (("TrueFillAssign", "beta"),),
            "seed": (("KSampler", "seed"),),
            "ckpt_name": (("CheckpointLoaderSimple", "ckpt_name"),),
            "clip_vision": (("CLIPVisionLoader", "clip_name"),),
            "adapter": (("TrueFillLoadSubjectAdapter", "adapter"),),
        },
        _STITCHED,
    ),
    Blueprint(
        "Upscale the Hole (x4 upscaler)",
        "Gives the hole of a large picture the detail of the rest: HD-Painter's super-resolution, in tiles that touch the hole.",
        "upscale_2k_sd15",
        (
            "Load x4 Upscaler",
            "Prompt for the upscaler",
            "Negative Prompt for the upscaler",
            "TrueFillUpscale",
        ),
        {
            "image": (("TrueFillUpscale", "image"),),
            "inpainted": (("TrueFillUpscale", "inpainted"),),
            "mask": (("TrueFillUpscale", "mask"),),
            "prompt": (("Prompt for the upscaler", "text"),),
            "seed": (("TrueFillUpscale", "seed"),),
            "ckpt_name": (("Load x4 Upscaler", "ckpt_name"),),
        },
        {"image": ("TrueFillUpscale", "IMAGE"), "changed": ("TrueFillUpscale", "MASK")},
    ),
    Blueprint(
        "Align Edit (Flux.2 Klein 4B)",
        "Edits a picture without drift: the edit is laid over the original, and only what changed is taken.",
        "align_edit_flux2_klein",
        (
            "UNETLoader",
            "CLIPLoader",
            "VAELoader",
            "ImageScaleToTotalPixels",
            "What shall be done",
            "VAEEncode",
            "ReferenceLatent",
            "ConditioningZeroOut",
            "CFGGuider",
            "GetImageSize",
            "EmptyFlux2LatentImage",
            "Flux2Scheduler",
            "RandomNoise",
            "KSamplerSelect",
            "SamplerCustomAdvanced",
            "VAEDecode",
            "TrueFillAlignEdit",
        ),
        {
            "image": (("ImageScaleToTotalPixels", "image"), ("TrueFillAlignEdit", "original")),
            "mask": (("TrueFillAlignEdit", "mask"),),
            "instruction": (("What shall be done", "text"),),
            "seed": (("RandomNoise", "noise_seed"),),
            "unet_name": (("UNETLoader", "unet_name"),),
            "clip_name": (("CLIPLoader", "clip_name"),),
            "vae_name": (("VAELoader", "vae_name"),),
        },
        {"image": ("TrueFillAlignEdit", "IMAGE"), "changed": ("TrueFillAlignEdit", "MASK")},
    ),
)


def build(blueprint: Blueprint) -> Graph:
    """The file of a blueprint: a graph of one node, and the definition of what is in it."""
    graph = json.loads((ROOT / "workflows" / f"{blueprint.graph}.json").read_text(encoding="utf-8"))
    nodes = [node for node in graph["nodes"] if not {node.get("title"), node["type"]}.isdisjoint(blueprint.inside)]
    ids = {node["id"] for node in nodes}
    links: list[Graph] = [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
        for link in graph["links"]
        if link[1] in ids and link[3] in ids
    ]
    _cut(nodes, {link["id"] for link in links})
    left = min(node["pos"][0] for node in nodes)
    top = min(node["pos"][1] for node in nodes)
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    sockets_in, sockets_out, promoted = [], [], []
    numbers = iter(range(graph["last_link_id"] + 1, 10_000))

    for row, (name, endings) in enumerate(blueprint.inputs.items()):
        fed = []
        for title, ending in endings:
            node = _node(nodes, title)
            slot, socket = _socket(node, "inputs", ending)
            socket["link"] = next(numbers)
            links.append(_link(socket["link"], (_INPUTS, row), (node["id"], slot), socket["type"]))
            fed.append((node, socket))
        node, socket = fed[0]
        carried = [of["link"] for _, of in fed]
        sockets_in.append(_of_definition(blueprint, "input", name, socket["type"], carried))
        if socket.get("widget"):
            promoted.append((name, str(node["id"]), socket["widget"]["name"]))
    for row, (name, (title, ending)) in enumerate(blueprint.outputs.items()):
        node = _node(nodes, title)
        slot, socket = _socket(node, "outputs", ending)
        number = next(numbers)
        socket["links"].append(number)
        links.append(_link(number, (node["id"], slot), (_OUTPUTS, row), socket["type"]))
        sockets_out.append(_of_definition(blueprint, "output", name, socket["type"], [number]))

    identity = _uuid(blueprint.name)
    definition = {
        "id": identity,
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": graph["last_node_id"],
            "lastLinkId": next(numbers) - 1,
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "inputNode": {"id": _INPUTS, "bounding": [left - 220, top, 160, 60 + 20 * len(sockets_in)]},
        "outputNode": {"id": _OUTPUTS, "bounding": [right + 60, top, 160, 60 + 20 * len(sockets_out)]},
        "inputs": sockets_in,
        "outputs": sockets_out,
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": links,
        "extra": {},
        "category": _CATEGORY,
        "description": blueprint.description,
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_instance(blueprint, identity, sockets_in, sockets_out, promoted)],
        "links": [],
        "groups": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {},
    }


def _instance(
    blueprint: Blueprint,
    identity: str,
    sockets_in: list[Graph],
    sockets_out: list[Graph],
    promoted: list[tuple[str, str, str]],
) -> Graph:
    widgets = {name for name, _, _ in promoted}
    return {
        "id": 1,
        "type": identity,
        "pos": [0, 0],
        "size": [400, 120 + 30 * len(sockets_in)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {
                "name": socket["name"],
                "type": socket["type"],
                **({"widget": {"name": socket["name"]}} if socket["name"] in widgets else {}),
                "link": None,
            }
            for socket in sockets_in
        ],
        "outputs": [{"name": socket["name"], "type": socket["type"], "links": []} for socket in sockets_out],
        "properties": {"proxyWidgets": [[node, widget] for _, node, widget in promoted]},
        "widgets_values": [],
        "title": blueprint.name,
    }


def _uuid(text: str) -> str:
    """The same at every run, so that a graph which holds the node finds its definition."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"truefill/{text}"))


def _of_definition(blueprint: Blueprint, kind: str, name: str, type_: str, links: list[int]) -> Graph:
    return {"id": _uuid(f"{blueprint.name}/{kind}/{name}"), "name": name, "type": type_, "linkIds": links}


def _link(number: int, origin: tuple[int, int], target: tuple[int, int], type_: str) -> Graph:
    return {
        "id": number,
        "origin_id": origin[0],
        "origin_slot": origin[1],
        "target_id": target[0],
        "target_slot": target[1],
        "type": type_,
    }


def _cut(nodes: list[Graph], links: set[int]) -> None:
    """What leads out of the part comes off."""
    for node in nodes:
        for socket in node.get("inputs", []):
            if socket.get("link") not in links:
                socket["link"] = None
        for socket in node.get("outputs", []):
            socket["links"] = [link for link in socket.get("links") or [] if link in links]


def _node(nodes: list[Graph], title: str) -> Graph:
    found = [node for node in nodes if title in (node.get("title"), node["type"])]
    titled = [node for node in found if node.get("title") == title]
    (node,) = titled or found
    return node


def _socket(node: Graph, side: str, name: str) -> tuple[int, Graph]:
    for number, socket in enumerate(node[side]):
        if socket["name"] == name:
            return number, socket
    raise KeyError(f"{node['type']} has no {name} among its {side}.")


def files() -> Iterator[tuple[str, str]]:
    """Name and text of each file."""
    for blueprint in BLUEPRINTS:
        yield f"{blueprint.name}.json", json.dumps(build(blueprint), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write them all."""
    folder = ROOT / "subgraphs"
    folder.mkdir(exist_ok=True)
    for name, text in files():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"subgraphs/{name}")


if __name__ == "__main__":
    main()
