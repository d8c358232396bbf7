"""Which column goes to which input of a graph, and a row's graph with its values in it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from ..client import Graph
from ..paths import UserError
from .table import NAME, Row

SEED = "seed"
"""The column that goes to every seed of the graph."""
MASK = "mask"
"""The column that may go into its picture's alpha, from which the host's loaders take the mask."""
_EXAMPLE, _LOADER = "TrueFillExamplePhoto", "LoadImage"
"""The shipped graphs begin with an example, which a picture of the table takes the place of."""
_SEEDS = ("seed", "noise_seed")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True)
class Target:
    """An input of a node. kind: "picture" for one that is uploaded, else the host's type: INT, STRING, COMBO ..."""

    node: str
    input: str
    kind: str


@dataclass(frozen=True)
class Plan:
    """Targets of each column. hole: the column whose picture gets the mask as its alpha, if there is one."""

    targets: dict[str, list[Target]]
    hole: str | None = None

    @property
    def pictures(self) -> list[str]:
        """Columns with pictures."""
        return [column for column, targets in self.targets.items() if targets[0].kind == "picture"]


def read_graph(path: Path) -> Graph:
    """A graph in API format. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"There is no graph {path}.")
    try:
        graph = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path.name} is not JSON: {error}.") from error
    if isinstance(graph, dict) and "nodes" in graph:
        raise UserError(f"{path.name} is a graph of the editor: save it there with Export (API).")
    if not isinstance(graph, dict) or not graph or not all(_is_node(node) for node in graph.values()):
        raise UserError(f"{path.name} is no graph in API format: save one in the editor with Export (API).")
    return graph


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def make_plan(graph: Graph, columns: Iterable[str], maps: Mapping[str, str], nodes: Mapping[str, Any]) -> Plan:
    """Finds the inputs of every column but the name's.

    A column is called as its target, `12.text` or `Load Image.image`, or `maps` has that for it. Without either, "image" is the
    graph's one picture, "mask" goes into its alpha, "prompt" is the one prompt that is not called negative, "negative" that which
    is, and "seed" goes to every seed. `nodes` is the server's object_info. Raises UserError where a target is missing or not the
    only one.
    """
    columns = [column for column in columns if column != NAME]
    if strange := [column for column in maps if column not in columns]:
        raise UserError(f"--map names the column {strange[0]!r}, which the table does not have: {', '.join(columns)}.")
    targets: dict[str, list[Target]] = {}
    for column in columns:
        place = maps.get(column, column)
        if "." in place:
            targets[column] = [_named(graph, place, nodes)]
        elif place == SEED:
            targets[column] = _seeds(graph)
        elif place != MASK:
            targets[column] = [_meant(graph, place, nodes)]
    hole = None
    if MASK in columns and MASK not in targets:
        pictures = [column for column, found in targets.items() if found[0].kind == "picture"]
        if len(pictures) != 1:
            raise UserError(
                f"The column 'mask' goes with one picture, and {len(pictures)} columns are pictures: say with --map "
                "mask=NODE.INPUT where it belongs."
            )
        hole = pictures[0]
    taken: dict[tuple[str, str], str] = {}
    for column, found in targets.items():
        for target in found:
            other = taken.setdefault((target.node, target.input), column)
            if other != column:
                raise UserError(
                    f"The columns {other!r} and {column!r} go to the same input {target.node}.{target.input}."
                )
    return Plan(targets, hole)


def title(graph: Graph, node_id: str) -> str:
    """What a person calls a node."""
    node = graph[node_id]
    return node.get("_meta", {}).get("title") or node["class_type"]


def _named(graph: Graph, place: str, nodes: Mapping[str, Any]) -> Target:
    node_name, _, input_name = place.rpartition(".")
    found = [node_name] if node_name in graph else [key for key in graph if title(graph, key) == node_name]
    if len(found) != 1:
        many = "no node" if not found else f"{len(found)} nodes ({', '.join(found)})"
        names = ", ".join(f"{key} {title(graph, key)}" for key in graph)
        raise UserError(f"{place}: the graph has {many} of the name {node_name!r}; take an id of {names}.")
    return _target(graph, found[0], input_name, nodes)


def _target(graph: Graph, node_id: str, name: str, nodes: Mapping[str, Any]) -> Target:
    node = graph[node_id]
    known = _inputs_of(nodes, node["class_type"])
    if name not in known and name not in node["inputs"]:
        raise UserError(
            f"{node_id}.{name}: {title(graph, node_id)} has no input {name!r}; it has {', '.join(known or node['inputs'])}."
        )
    if isinstance(node["inputs"].get(name), list):
        raise UserError(f"{node_id}.{name} is linked to another node in the graph: name an input that has a value.")
    return Target(node_id, name, _kind(known.get(name)))


def _inputs_of(nodes: Mapping[str, Any], class_type: str) -> dict[str, Any]:
    if class_type not in nodes:
        raise UserError(f"The server does not have the node {class_type}: install its pack there.")
    groups = nodes[class_type].get("input", {})
    own = {"image": ["COMBO", {"image_upload": True}]} if class_type == _EXAMPLE else {}
    return {**groups.get("required", {}), **groups.get("optional", {}), **own}


def _kind(spec: Any) -> str:
    if not spec:
        return "STRING"
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    if options.get("image_upload"):
        return "picture"
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def _all(graph: Graph, nodes: Mapping[str, Any]) -> list[Target]:
    """Every input that has a value."""
    found = []
    for key, node in graph.items():
        known = _inputs_of(nodes, node["class_type"])
        names = ["image", *node["inputs"]] if node["class_type"] == _EXAMPLE else list(node["inputs"])
        found += [
            Target(key, name, _kind(known.get(name)))
            for name in names
            if not isinstance(node["inputs"].get(name), list)
        ]
    return found


def _seeds(graph: Graph) -> list[Target]:
    found = [
        Target(key, name, "INT")
        for key, node in graph.items()
        for name in _SEEDS
        if name in node["inputs"] and not isinstance(node["inputs"][name], list)
    ]
    if not found:
        raise UserError(
            "The table has a column 'seed', and the graph no input of that name: say --map seed=NODE.INPUT."
        )
    return found


def _meant(graph: Graph, word: str, nodes: Mapping[str, Any]) -> Target:
    """What a column of a plain name stands for."""
    found = _all(graph, nodes)
    if word == "image":
        fitting = [target for target in found if target.kind == "picture"]
    elif word in ("prompt", "negative"):
        texts = [target for target in found if target.kind == "STRING" and target.input in ("prompt", "text")]
        fitting = [
            target for target in texts if ("negative" in title(graph, target.node).lower()) == (word == "negative")
        ]
        if len(fitting) > 1:
            # Others' texts may be what is looked for, or the upscaler's.
            own = [target for target in fitting if target.input == "prompt"]
            fitting = own if len(own) == 1 else fitting
    else:
        fitting = [target for target in found if target.input == word]
    if len(fitting) != 1:
        many = "no input" if not fitting else "the inputs " + ", ".join(f"{t.node}.{t.input}" for t in fitting)
        raise UserError(
            f"The column {word!r} could mean {many} of the graph: call it NODE.INPUT, such as 12.text or Load Image.image, "
            f"or say --map {word}=NODE.INPUT."
        )
    return fitting[0]


@dataclass(frozen=True)
class Upload:
    """A picture's file for a target."""

    target: Target
    name: str
    data: bytes


def fill_in(graph: Graph, plan: Plan, row: Row, folder: Path) -> tuple[Graph, list[Upload]]:
    """The graph of a row, and the pictures to be uploaded for it; files are named from `folder`.

    Raises UserError where a value does not fit its input, or a picture can't be read.
    """
    filled, uploads = copy.deepcopy(graph), []
    for column, targets in plan.targets.items():
        if column not in row.values:
            continue
        value = row.values[column]
        for target in targets:
            if target.kind == "picture":
                if filled[target.node]["class_type"] == _EXAMPLE:
                    filled[target.node].update(class_type=_LOADER, inputs={})
                path = folder / str(value)
                hole = row.values.get(MASK) if column == plan.hole else None
                data = _read(path) if hole is None else with_alpha(_read(path), _read(folder / str(hole)), row)
                suffix = path.suffix if hole is None else ".png"
                uploads.append(Upload(target, f"{path.stem}{suffix}", data))
            else:
                filled[target.node]["inputs"][target.input] = _as(target.kind, value, f"row {row.number}, {column}")
    return filled, uploads


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from error


def with_alpha(picture: bytes, mask: bytes, row: Row) -> bytes:
    """A PNG of the picture that is transparent where the mask is white, as the host's mask editor saves it.

    Known pixels stay as they are; so do all others, for the host takes the colors without looking at the alpha.
    """
    try:
        with Image.open(io.BytesIO(picture)) as of, Image.open(io.BytesIO(mask)) as hole:
            # The host turns a camera's picture upright.
            upright, upright_hole = ImageOps.exif_transpose(of), ImageOps.exif_transpose(hole)
            colors, alpha = upright.convert("RGB"), ImageChops.invert(upright_hole.convert("L"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(
            f"row {row.number}: the picture or its mask is no picture that can be read ({error})."
        ) from error
    if colors.size != alpha.size:
        raise UserError(
            f"row {row.number}: the mask has {alpha.width} x {alpha.height} pixels and the picture {colors.width} x "
            f"{colors.height}: a mask has the size of its picture."
        )
    colors.putalpha(alpha)
    written = io.BytesIO()
    colors.save(written, "PNG", compress_level=1)
    return written.getvalue()


def _as(kind: str, value: Any, where: str) -> Any:
    text = str(value).strip()
    try:
        if kind == "INT":
            return int(text) if not isinstance(value, float) else _whole(value)
        if kind == "FLOAT":
            return float(text)
    except ValueError:
        needed = "a whole number" if kind == "INT" else "a number"
        raise UserError(f"{where}: {text!r} is not {needed}.") from None
    if kind == "BOOLEAN":
        if text.lower() not in (*_TRUE, *_FALSE):
            raise UserError(f"{where}: {text!r} is neither true nor false.")
        return text.lower() in _TRUE
    return str(value) if kind in ("STRING", "COMBO") else value


def _whole(value: float) -> int:
    if not value.is_integer():
        raise ValueError(value)
    return int(value)


def seed_of(graph: Graph, plan: Plan) -> int | None:
    """The first seed of a graph."""
    targets: Sequence[Target] = plan.targets.get(SEED) or [
        Target(key, name, "INT") for key, node in graph.items() for name in _SEEDS if name in node["inputs"]
    ]
    values = [graph[target.node]["inputs"].get(target.input) for target in targets]
    return next((value for value in values if isinstance(value, int)), None)
