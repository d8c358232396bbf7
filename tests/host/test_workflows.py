"""The shipped graphs and help pages on a real ComfyUI."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.client import Client, GraphFailed
from devtools.pack import host_path, pack_module
from devtools.server import Server
from truefill_testing.shipped import GRAPHS, WORKFLOWS, api_graph, editor_graph
from truefill_testing.stand_ins import ANYTHING, SHORT_DREAMMIX, SHORT_PILOT, SHORT_TRAINING, THE_MOON, place_stand_ins

FIRST = "try_without_downloads"
# It makes data, and no picture.
DATA = "subject_data"
EDIT = "align_edit_flux2_klein"
# Nodes of the editor alone, which the API format leaves out.
NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def every(graph: dict[str, Any], class_type: str) -> list[dict[str, Any]]:
    """The inputs of the graph's nodes of this type."""
    return [node["inputs"] for node in graph.values() if node["class_type"] == class_type]


def input_specs(info: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Type and options of each input, in the order of the node's description."""
    specs = {}
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, []):
            kind, *options = info["input"][section][name]
            settings = options[0] if options else {}
            specs[name] = (kind, settings)
            if kind == "COMFY_AUTOGROW_V3":
                # As many inputs as are linked: images.image0, images.image1 ...
                template = settings["template"]
                ((grown, *_),) = template["input"]["required"].values()
                for number in range(template["max"]):
                    specs[f"{name}.{template['prefix']}{number}"] = (grown, {})
    return specs


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def widget_inputs(node: dict[str, Any], specs: dict[str, tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    """The positional `widgets_values` of an editor node by name of input."""
    values = iter(node["widgets_values"])
    inputs = {}
    for name, (kind, options) in specs.items():
        if is_widget(kind, options):
            inputs[name] = next(values)
            if options.get("control_after_generate"):
                assert next(values) in ("fixed", "increment", "decrement", "randomize")
            if kind == "BOOLEAN":
                assert isinstance(inputs[name], bool)
    assert not list(values), f"node {node['id']} has more widget values than widgets"
    return inputs


def to_api(graph: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """An editor graph in API format, with every link checked at both of its ends."""
    links = {link[0]: link[1:] for link in graph["links"]}
    nodes = {node["id"]: node for node in graph["nodes"]}
    used, api = [], {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        info = object_info[node["type"]]
        specs = input_specs(info)
        inputs = widget_inputs(node, specs)
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is None:
                continue
            origin, origin_slot, target, target_slot, kind = links[socket["link"]]
            used.append(socket["link"])
            output = nodes[origin]["outputs"][origin_slot]
            assert (target, target_slot) == (node["id"], slot)
            assert socket["link"] in output["links"]
            declared = object_info[nodes[origin]["type"]]["output"][origin_slot]
            assert kind == output["type"] == declared == specs[socket["name"]][0]
            inputs[socket["name"]] = [str(origin), origin_slot]
        title = node.get("title") or info["display_name"] or node["type"]
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    assert sorted(used) == sorted(links), "a link leads nowhere"
    return api


@pytest.fixture(scope="module")
def named_models(comfyui: Server) -> Iterator[None]:
    """Stand-ins under the names of the graphs' models, as long as these tests run."""
    assert comfyui.base is not None
    files = place_stand_ins(comfyui.base / "models")
    yield
    for file in files:
        file.unlink()


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    """A ComfyUI with the pack in a folder without a space: where there is one, the host serves no file of any pack."""
    with Server(host_path(), Path(sys.executable), pack_folder="ComfyUI-TrueFill", log_name="test-files") as server:
        yield server


@pytest.mark.quick
@pytest.mark.parametrize("name", GRAPHS)
def test_both_formats_are_the_same_graph(name: str, served: Server) -> None:
    assert to_api(editor_graph(name), served.client.object_info()) == api_graph(name)


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in (FIRST, DATA, EDIT)])
def test_graph_runs_and_changes_nothing_outside_the_hole(name: str, server: Client, named_models: None) -> None:
    run_and_look_outside_the_hole(name, server)


@pytest.mark.quick
def test_the_first_graph_runs_where_there_are_no_models(served: Server) -> None:
    run_and_look_outside_the_hole(FIRST, served.client)


def test_the_graph_of_an_edit_keeps_the_photo_but_for_the_change(server: Client, named_models: None) -> None:
    graph = copy.deepcopy(api_graph(EDIT))
    for scale in every(graph, "ImageScaleToTotalPixels"):
        scale["megapixels"] = 0.06
    (align,) = every(graph, "TrueFillAlignEdit")
    (align_id,) = (key for key, node in graph.items() if node["class_type"] == "TrueFillAlignEdit")
    (save,) = (key for key, node in graph.items() if node["class_type"] == "SaveImage")
    graph["photo"] = {"class_type": "PreviewImage", "inputs": {"images": align["original"]}}
    graph["edit"] = {"class_type": "PreviewImage", "inputs": {"images": align["edited"]}}
    graph["aligned"] = {"class_type": "PreviewImage", "inputs": {"images": [align_id, 1]}}

    def shown() -> dict[str, np.ndarray]:
        made = server.run(graph).images
        return {name: np.asarray(Image.open(io.BytesIO(made[name][0]))) for name in ("photo", "edit", "aligned", save)}

    pictures = shown()
    # A network that has learned nothing draws something else: that is left as it is.
    assert np.array_equal(pictures["aligned"], pictures["edit"])
    assert pictures[save].shape == pictures["photo"].shape and not np.array_equal(pictures[save], pictures["photo"])
    # One that gives the picture back changes nothing, though it answers in another size.
    (scaled,) = (key for key, node in graph.items() if node["class_type"] == "ImageScaleToTotalPixels")
    align["edited"] = [scaled, 0]
    graph["edit"]["inputs"]["images"] = [scaled, 0]
    pictures = shown()
    assert pictures["edit"].shape != pictures["photo"].shape
    assert np.array_equal(pictures[save], pictures["photo"])


def test_the_graph_for_training_data_writes_a_folder_that_the_training_reads(
    comfyui: Server, server: Client, named_models: None
) -> None:
    assert comfyui.base is not None
    files = pack_module("imaging.subject_files")
    graph = copy.deepcopy(api_graph(DATA))
    for photo in every(graph, "TrueFillExamplePhoto"):
        photo["photo"] = "toy scene"
    for search in every(graph, "TrueFillDetect"):
        search |= ANYTHING | {"pick": "all", "count": 3}
    for save in every(graph, "TrueFillSaveSubjects"):
        save |= {"smallest": 0.0, "largest": 100.0, "folder": "data of a test"}
    folder = comfyui.base / "output" / "data of a test"
    server.run(graph)
    found = files.find_subjects(folder)
    assert 1 <= len(found) <= 3 and {of.prompt for of in found} <= {"cup", "spoon", "plate"}
    picture, mask = found[0].read()
    photo, _ = pack_module("imaging.examples").load_example("toy scene")
    assert np.array_equal(picture, (255 * photo[0]).round().byte().numpy())
    assert mask.shape == picture.shape[:2]
    # A folder elsewhere is refused.
    for save in every(graph, "TrueFillSaveSubjects"):
        save["folder"] = "../elsewhere"
    with pytest.raises(
        GraphFailed, match=r"'folder' is '\.\./elsewhere', and must be the name of a folder in ComfyUI's output"
    ):
        server.run(graph)
    assert not (comfyui.base / "elsewhere").exists()


def halve_photos(graph: dict[str, Any]) -> None:
    """Put photos and their masks through the host's scaling, so that two cores need seconds."""
    for key in [key for key, node in graph.items() if node["class_type"] == "TrueFillExamplePhoto"]:
        scaled = {"class_type": "ImageScaleBy", "inputs": {"upscale_method": "nearest-exact", "scale_by": 0.5}}
        small, masks, small_masks, mask = (f"{key} {part}" for part in ("small", "masks", "small masks", "mask"))
        smaller = {(key, 0): [small, 0], (key, 1): [mask, 0]}
        for node in graph.values():
            node["inputs"] |= {
                name: smaller[tuple(link)]
                for name, link in node["inputs"].items()
                if isinstance(link, list) and tuple(link) in smaller
            }
        graph[small], graph[small_masks] = copy.deepcopy(scaled), copy.deepcopy(scaled)
        graph[masks] = {"class_type": "MaskToImage", "inputs": {"mask": [key, 1]}}
        graph[mask] = {"class_type": "ImageToMask", "inputs": {"image": [small_masks, 0], "channel": "red"}}
        graph[small]["inputs"]["image"], graph[small_masks]["inputs"]["image"] = [key, 0], [masks, 0]


def run_and_look_outside_the_hole(name: str, server: Client) -> None:
    graph = copy.deepcopy(api_graph(name))
    if not every(graph, "TrueFillSegment"):
        halve_photos(graph)
    samplers = every(graph, "KSampler")
    for sampler in samplers:
        sampler["steps"] = 2 // len(samplers)
    for scale in every(graph, "ImageScaleToTotalPixels"):
        scale["megapixels"] = 0.06
    for pad in every(graph, "ImagePadForOutpaint"):
        pad |= {side: pad[side] // 2 for side in ("left", "top", "right", "bottom")}
    for subject in every(graph, "TrueFillEncodeSubject"):
        subject["size"] = 128
    if every(graph, "TrueFillSegment"):
        for picture in every(graph, "TrueFillExamplePhoto"):
            picture["photo"] = "toy scene"
        for click in every(graph, "TrueFillSegment"):
            click |= THE_MOON
    for search in every(graph, "TrueFillMaskFromText"):
        search |= ANYTHING
    for search in every(graph, "SAM3_Detect"):
        search["threshold"] = 0.0
    for schedule in every(graph, "BasicScheduler"):
        schedule["steps"] = 2
    for sampler in every(graph, "TrueFillPILOTSampler"):
        sampler |= SHORT_PILOT
    pilots = every(graph, "TrueFillPILOT")
    for pilot in pilots:
        pilot |= SHORT_PILOT | {"steps": 2}
    mixes = every(graph, "TrueFillDreamMix")
    for mix in mixes:
        mix |= SHORT_DREAMMIX
    for training in every(graph, "TrueFillTrainSubject"):
        training |= SHORT_TRAINING
    for dictionary in every(graph, "TrueFillAttributeDictionary"):
        dictionary["regular"] = 1
    crops, upscalers = every(graph, "TrueFillCropRegion"), every(graph, "TrueFillUpscale")
    for crop in crops:
        crop["native_size"] = 128
    for upscaler in upscalers:
        upscaler |= {"steps": 1, "tile": 0}
    # What each edit may change: its hole and so many pixels around it.
    edits = [(crop["mask"], crop["feather"] + 1) for crop in crops]
    edits += [(upscaler["mask"], upscaler["expand"]) for upscaler in upscalers]
    if crops:
        original = crops[0]["image"]
    elif pilots:
        original, edits = pilots[0]["image"], [(pilots[0]["mask"], pilots[0]["feather"] + 1)]
    elif mixes:
        # Its soft edge is square: farther in the corners.
        original, edits = mixes[0]["image"], [(mixes[0]["mask"], 1.5 * mixes[0]["feather"])]
    else:
        composites = every(graph, "ImageCompositeMasked")
        original, edits = composites[0]["destination"], [(composites[0]["mask"], 0)]
        assert all((other["destination"], other["mask"]) == (original, edits[0][0]) for other in composites)
    graph["before"] = {"class_type": "PreviewImage", "inputs": {"images": original}}
    for index, (mask, _) in enumerate(edits):
        graph[f"mask {index}"] = {"class_type": "MaskToImage", "inputs": {"mask": mask}}
        graph[f"hole {index}"] = {"class_type": "PreviewImage", "inputs": {"images": [f"mask {index}", 0]}}
    saves = [node_id for node_id, node in graph.items() if node["class_type"] == "SaveImage"]
    assert saves

    images = server.run(graph).images

    before, *results = (np.asarray(Image.open(io.BytesIO(images[key][0]))) for key in ("before", *saves))
    assert {after.shape for after in results} == {before.shape}
    morphology, masks = pack_module("imaging.morphology"), pack_module("imaging.masks")
    known = np.ones(before.shape[:2], dtype=bool)
    for index, (_, reach) in enumerate(edits):
        shown = np.asarray(Image.open(io.BytesIO(images[f"hole {index}"][0])).convert("L"))
        hole = masks.resize_mask(torch.from_numpy(shown.copy())[None] / 255, before.shape[:2])
        if index < len(crops) and crops[index]["fill_box"]:
            hole = pack_module("imaging.mask_shapes").mask_shape(hole, "box", growth=0.0)
        known &= morphology.grow((hole > 0).float(), reach)[0, 0].numpy() == 0
        hole = hole[0, 0].numpy() == 1
        assert 0.005 < hole.mean() < 0.5
        assert all((after[hole] != before[hole]).any(axis=1).mean() > 0.9 for after in results)
    assert known.mean() > 0.3
    assert all(np.array_equal(after[known], before[known]) for after in results)


def test_the_click_of_the_demo_graph_takes_the_moon_and_something_else_appears(server: Client) -> None:
    graph = copy.deepcopy(api_graph("click_inpaint_demo"))
    (key,) = (key for key, node in graph.items() if node["class_type"] == "TrueFillSegment")
    (save,) = (key for key, node in graph.items() if node["class_type"] == "SaveImage")
    (crop,) = every(graph, "TrueFillCropRegion")
    graph["click"] = {"class_type": "MaskToImage", "inputs": {"mask": [key, 0]}}
    graph["clicked"] = {"class_type": "PreviewImage", "inputs": {"images": ["click", 0]}}
    graph["before"] = {"class_type": "PreviewImage", "inputs": {"images": crop["image"]}}
    images = server.run(graph).images
    before, after, mask = (
        np.asarray(Image.open(io.BytesIO(images[node][0])).convert("RGB")).astype(int)
        for node in ("before", save, "clicked")
    )
    moon, found = before[..., 2] > before[..., 1] + 60, mask[..., 0] > 127
    assert 2500 < moon.sum() < 4500
    assert (moon & found).sum() / (moon | found).sum() > 0.9
    assert ((after[..., 2] > after[..., 1] + 60) & moon).sum() < 0.1 * moon.sum()


@pytest.mark.quick
def test_graphs_and_thumbnails_are_offered_as_templates(served: Server) -> None:
    assert sorted(served.client.get_json("/workflow_templates")[served.pack_folder]) == GRAPHS
    for name in GRAPHS:
        for suffix in ("json", "jpg"):
            shipped = (WORKFLOWS / f"{name}.{suffix}").read_bytes()
            assert served.client.get(f"/api/workflow_templates/{served.pack_folder}/{name}.{suffix}") == shipped


@pytest.mark.quick
def test_help_pages_are_served_where_the_editor_looks_for_them(served: Server) -> None:
    ours = {key: info for key, info in served.client.object_info().items() if key.startswith("TrueFill")}
    assert ours
    for node_id, info in ours.items():
        # As the editor builds it (NodeHelpService.fetchCustomNodeHelp).
        folder = info["python_module"].split(".")[1].split("@")[0]
        page = served.client.get(f"/extensions/{folder}/docs/{node_id}/en.md")
        assert page.decode().startswith(f"# {info['display_name']}\n")
