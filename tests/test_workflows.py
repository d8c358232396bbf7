"""The shipped graphs as files: both formats there, models linked, thumbnails, layout, help pages."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from devtools.pack import ROOT
from truefill_testing.shipped import GRAPHS, WORKFLOWS, editor_graph

pytestmark = pytest.mark.quick

HELP = ROOT / "js" / "docs"
WITHOUT_DOWNLOADS = [name for name in GRAPHS if name.endswith("_demo") or name == "try_without_downloads"]
# A node's `pos` is the corner of its body; the title bar lies above it.
TITLE_HEIGHT = 30
LOADERS = {
    "CheckpointLoaderSimple": "checkpoints",
    "TrueFillLoadSegmenter": "sams",
    "TrueFillLoadDetector": "grounding-dino",
    "ControlNetLoader": "controlnet",
    "LoraLoader": "loras",
    "CLIPVisionLoader": "clip_vision",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "TrueFillLoadSubjectAdapter": "ipadapter",
}
SHIPPED = "demo"


def linked_models(graph: dict[str, Any]) -> list[dict[str, str]]:
    return [model for node in graph["nodes"] for model in node["properties"].get("models", [])]


@pytest.fixture(scope="module")
def pack_nodes(pack: ModuleType) -> dict[str, Any]:
    """The pack's node classes by id."""

    async def node_list() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(node_list())}


def test_a_graph_for_each_family() -> None:
    assert set(GRAPHS) >= {f"text_inpaint_{family}" for family in ("sd15", "sd2", "sdxl")}


def test_every_graph_has_both_formats_and_a_thumbnail() -> None:
    assert sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")) == GRAPHS
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == GRAPHS


@pytest.mark.parametrize("name", GRAPHS)
def test_thumbnail_is_square(name: str) -> None:
    with Image.open(WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height >= 256


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_flat_and_in_the_format_that_every_editor_reads(name: str) -> None:
    graph = editor_graph(name)
    assert graph["version"] == 0.4
    assert "definitions" not in graph
    assert graph["last_node_id"] == max(node["id"] for node in graph["nodes"])
    assert graph["last_link_id"] == max(link[0] for link in graph["links"])
    assert len({node["id"] for node in graph["nodes"]}) == len(graph["nodes"])


@pytest.mark.parametrize("name", GRAPHS)
def test_app_mode_shows_the_picture_the_words_the_seeds_and_the_results(name: str) -> None:
    graph = editor_graph(name)
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    results = [key for key, node in nodes.items() if node["type"] in ("SaveImage", "PreviewImage")]
    if not results:
        assert "linearData" not in graph["extra"]
        return
    assert graph["extra"]["linearMode"] is False
    shown = graph["extra"]["linearData"]
    assert shown["outputs"] == results
    free = {
        key: [socket["name"] for socket in node.get("inputs", []) if socket.get("widget") and socket["link"] is None]
        for key, node in nodes.items()
    }
    assert all(widget in free[key] for key, widget in shown["inputs"])
    photos = [key for key, node in nodes.items() if node["type"] == "TrueFillExamplePhoto"]
    prompts = [key for key, node in nodes.items() if node["type"] == "TrueFillEncodePrompt"]
    seeds = [(key, widget) for key in nodes for widget in free[key] if widget in ("seed", "noise_seed")]
    wanted = {(key, "photo") for key in photos} | {(key, "prompt") for key in prompts} | set(seeds)
    assert wanted <= {tuple(each) for each in shown["inputs"]}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_loader_links_the_files_that_it_names(name: str) -> None:
    nodes = editor_graph(name)["nodes"]
    loaders = [node for node in nodes if "Loader" in node["type"] or node["type"] in LOADERS]
    loaders = [node for node in loaders if node["widgets_values"][0] != SHIPPED]
    assert bool(loaders) == (name not in WITHOUT_DOWNLOADS)
    for node in loaders:
        models = node["properties"]["models"]
        assert [model["name"] for model in models] == node["widgets_values"][: 2 if "Dual" in node["type"] else 1]
        for model in models:
            assert model["url"].startswith("https://") and model["url"].endswith(f"/{model['name']}")
            assert model["name"].endswith((".safetensors", ".pth"))
            assert model["directory"] == LOADERS[node["type"]]


@pytest.mark.parametrize("name", GRAPHS)
def test_note_gives_link_and_folder(name: str) -> None:
    graph = editor_graph(name)
    text = "\n".join(node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")
    for model in linked_models(graph):
        assert f"[{model['name']}]({model['url']})" in text
        assert f"models/{model['directory']}" in text


def test_links_agree_with_the_templates_of_the_host() -> None:
    spec = importlib.util.find_spec("comfyui_workflow_templates_json")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("this host comes without its template package")
    templates = Path(next(iter(spec.submodule_search_locations))) / "templates"
    known: dict[str, set[str]] = {}

    def collect(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            if {"name", "url", "directory"} <= value.keys():
                known.setdefault(str(value["name"]), set()).add(str(value["url"]).removesuffix("?download=true"))
            for item in value.values():
                collect(item)

    for path in templates.glob("*.json"):
        collect(json.loads(path.read_text(encoding="utf-8")))
    ours = {model["name"]: model["url"] for name in GRAPHS for model in linked_models(editor_graph(name))}
    shared = ours.keys() & known.keys()
    of_today = {"flux1-dev", "flux1-fill-dev", "flux-2-klein-4b-fp8", "qwen_image_fp8_e4m3fn", "z_image_turbo_bf16"}
    assert {f"{name}.safetensors" for name in ("sd_xl_base_1.0", *of_today)} <= shared
    for model in shared:
        assert ours[model] in known[model]


@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_do_not_overlap_and_lie_in_their_groups(name: str) -> None:
    graph = editor_graph(name)
    boxes = {}
    for node in graph["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = (x, y - TITLE_HEIGHT, x + width, y + height)
    for (a, one), (b, other) in combinations(boxes.items(), 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"nodes {a} and {b} overlap"
    groups = []
    for group in graph["groups"]:
        x, y, width, height = group["bounding"]
        groups.append((x, y, x + width, y + height))
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        left, top, right, bottom = boxes[node["id"]]
        around = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
        assert len(around) == 1, f"node {node['id']} lies in {len(around)} groups"


@pytest.mark.parametrize("name", GRAPHS)
def test_group_titles_follow_the_steps_of_the_nodes_in_them(name: str, pack_nodes: dict[str, Any]) -> None:
    graph = editor_graph(name)
    ours = [node for node in graph["nodes"] if node["type"].startswith("TrueFill")]
    assert ours
    for node in ours:
        assert node["type"] in pack_nodes, f"{node['type']} is no node of the pack"
        step = pack_nodes[node["type"]].GET_SCHEMA().category.removeprefix("TrueFill/")
        x, y = node["pos"]
        titles = [
            group["title"]
            for group in graph["groups"]
            if group["bounding"][0] <= x <= group["bounding"][0] + group["bounding"][2]
            and group["bounding"][1] <= y <= group["bounding"][1] + group["bounding"][3]
        ]
        assert titles == [step]


def test_every_node_has_a_help_page_and_no_page_is_left_over(pack_nodes: dict[str, Any]) -> None:
    assert {path.parent.name for path in HELP.glob("*/en.md")} == pack_nodes.keys()


def test_help_page_has_a_row_for_each_input_with_its_default_and_range(pack_nodes: dict[str, Any]) -> None:
    for node_id, node in pack_nodes.items():
        schema = node.GET_SCHEMA()
        text = (HELP / node_id / "en.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {schema.display_name}\n"), node_id
        rows = dict(re.findall(r"^\| `(\w+)` \| \*(.+?)\.\* \S.* \|$", text, re.MULTILINE))
        assert list(rows) == [item.id for item in schema.inputs], node_id
        for item in schema.inputs:
            where = f"{node_id}.{item.id}"
            shown, _, span = rows[item.id].partition("; ")
            default = getattr(item, "default", None)
            if isinstance(default, bool):
                assert (shown, span) == ("on" if default else "off", "on or off"), where
            elif isinstance(default, int | float):
                assert float(shown) == default, where
                assert [float(end) for end in span.split(" to ")] == [float(item.min), float(item.max)], where
            elif default and isinstance(default, str):
                assert shown.strip("`") == default, where
            options = getattr(item, "options", None) or ()
            # The host's own lists of samplers and schedulers grow with it.
            for option in () if item.id in ("sampler_name", "scheduler") else options:
                assert f"`{option}`" in rows[item.id], where


def test_help_page_of_rasg_names_every_stochastic_form(pack_module: Callable[[str], ModuleType]) -> None:
    forms = pack_module("model_patches.hd_painter.stochastic_samplers").STOCHASTIC_FORMS
    text = (HELP / "TrueFillRASG" / "en.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^- `(\w+)`(?: and `ddim`)? as `(\w+)`", text, re.MULTILINE)) == forms
