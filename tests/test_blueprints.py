"""The blueprints as files: what the shipped graphs make of them, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from devtools import blueprints
from devtools.pack import ROOT

NAMES = [blueprint.name for blueprint in blueprints.BLUEPRINTS]


def shipped(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.quick
def test_the_files_are_made_from_the_graphs_as_they_are() -> None:
    made = {name: text for name, text in blueprints.files()}
    assert {path.name for path in (ROOT / "subgraphs").iterdir()} == made.keys()
    for name, text in made.items():
        assert (ROOT / "subgraphs" / name).read_text(encoding="utf-8") == text, (
            "python devtools/launch.py -m devtools.blueprints"
        )


def test_no_two_share_an_id() -> None:
    assert len({shipped(name)["definitions"]["subgraphs"][0]["id"] for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_has_both_of_its_ends(name: str) -> None:
    file = shipped(name)
    (definition,), (instance,) = file["definitions"]["subgraphs"], file["nodes"]
    nodes = {node["id"]: node for node in definition["nodes"]}
    for link in definition["links"]:
        if link["origin_id"] == -10:
            assert link["id"] in definition["inputs"][link["origin_slot"]]["linkIds"]
        else:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        if link["target_id"] == -20:
            assert link["id"] in definition["outputs"][link["target_slot"]]["linkIds"]
        else:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
    ends = {link["id"] for link in definition["links"]}
    assert len(ends) == len(definition["links"])
    for node in nodes.values():
        assert {socket["link"] for socket in node["inputs"]} - {None} <= ends
        assert {link for socket in node["outputs"] for link in socket["links"]} <= ends
    assert [socket["name"] for socket in instance["inputs"]] == [socket["name"] for socket in definition["inputs"]]
    assert instance["type"] == definition["id"]


@pytest.mark.parametrize("name", NAMES)
def test_what_it_needs_is_an_input_and_what_is_open_is_optional(name: str) -> None:
    (definition,) = shipped(name)["definitions"]["subgraphs"]
    for node in definition["nodes"]:
        for socket in node["inputs"]:
            optional = socket.get("shape") == 7 or socket.get("widget")
            assert socket["link"] is not None or optional, (node["type"], socket["name"])
