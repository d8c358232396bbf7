"""The pack on a real ComfyUI, and the client that the demo and these tests use."""

from __future__ import annotations

import json
import threading

import pytest

from devtools.client import Client, GraphFailed, GraphInterrupted, GraphRejected, Progress
from devtools.pack import ROOT
from devtools.server import Server


def sampling_graph(steps: int, seed: int = 0) -> dict:
    """A graph of the host's own nodes: sample 64x64 pixels and save them."""

    def node(class_type: str, **inputs) -> dict:
        return {"class_type": class_type, "inputs": inputs}

    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text="a red fox"),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text=""),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["checkpoint", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def test_pack_is_loaded_from_a_folder_of_any_name(comfyui: Server, server: Client) -> None:
    nodes = {name: node for name, node in server.object_info().items() if name.startswith("TrueFill")}
    assert {"TrueFillEncodePrompt", "TrueFillPAIntA", "TrueFillRASG", "TrueFillExamplePhoto"} <= nodes.keys()
    for name, node in nodes.items():
        assert node["python_module"] == f"custom_nodes.{comfyui.pack_folder}", name
        assert node["category"].startswith("TrueFill/"), name
        assert node["description"], name
    log = comfyui.log.read_text(encoding="utf-8")
    failed = [line for line in log.splitlines() if "IMPORT FAILED" in line or "Cannot import" in line]
    # ComfyUI's own before 0.30 needs a package that it does not ask for.
    assert all("nodes_glsl" in line for line in failed), failed


def test_the_editor_gets_our_texts_in_other_languages(server: Client) -> None:
    given = server.get_json("/i18n")
    files = sorted((ROOT / "locales").glob("*/nodeDefs.json"))
    assert files
    for file in files:
        assert json.loads(file.read_text(encoding="utf-8")).items() <= given[file.parent.name]["nodeDefs"].items()


def test_the_editor_gets_our_blueprints(comfyui: Server, server: Client) -> None:
    given = server.get_json("/global_subgraphs")
    ours = {
        entry["name"]: key
        for key, entry in given.items()
        if entry["info"]["node_pack"] == f"custom_nodes.{comfyui.pack_folder}"
    }
    files = sorted((ROOT / "subgraphs").glob("*.json"))
    assert ours.keys() == {file.stem for file in files} and files
    for file in files:
        shipped = file.read_text(encoding="utf-8")
        assert server.get_json(f"/global_subgraphs/{ours[file.stem]}")["data"] == shipped


def test_all_random_checkpoints_are_offered(server: Client) -> None:
    names = server.object_info()["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
    families = ("sd15", "sd2", "sdxl")
    pairs = {f"{f}{kind}.safetensors" for f in families for kind in ("", "-inpainting")}
    assert set(names) == pairs | {"x4.safetensors"}


def test_run_returns_pictures_and_reports_progress(server: Client) -> None:
    seen: list[Progress] = []
    result = server.run(sampling_graph(steps=3), seen.append)
    assert result.status == "success"
    assert [image[:4] for image in result.images["save"]] == [b"\x89PNG"]
    sampling = [(p.value, p.maximum) for p in seen if p.node_type == "KSampler" and p.maximum]
    # The host leaves steps out that follow each other within a fraction of a second.
    assert sampling[-1] == (3, 3)
    assert sampling == sorted(set(sampling)) and set(sampling) <= {(1, 3), (2, 3), (3, 3)}


def test_rejected_graph_names_the_node_and_the_input(server: Client) -> None:
    graph = sampling_graph(steps=3)
    graph["sampler"]["inputs"]["sampler_name"] = "nonsense"
    with pytest.raises(GraphRejected, match=r"node sampler \(KSampler\).*sampler_name") as caught:
        server.run(graph)
    assert caught.value.node_errors["sampler"]["errors"]


def test_one_bad_branch_rejects_the_whole_graph(server: Client) -> None:
    graph = sampling_graph(steps=3, seed=1)
    graph["lost"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "test"}}
    with pytest.raises(GraphRejected, match=r"node lost \(SaveImage\)"):
        server.run(graph)


def test_failing_node_is_reported(server: Client) -> None:
    name = server.upload_image(b"no picture", "broken.png")
    graph = {
        "load": {"class_type": "LoadImage", "inputs": {"image": name}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["load", 0]}},
    }
    with pytest.raises(GraphFailed) as caught:
        server.run(graph)
    assert (caught.value.node_id, caught.value.node_type) == ("load", "LoadImage")
    assert caught.value.exception_type and caught.value.message and caught.value.traceback


def test_uploaded_image_comes_back(server: Client) -> None:
    image = server.run(sampling_graph(steps=1)).images["save"][0]
    name = server.upload_image(image, "again.png")
    assert server.view(name, kind="input") == image


def test_interrupt_ends_the_run_and_the_next_one_works(server: Client) -> None:
    started = threading.Event()

    def interrupt_when_sampling() -> None:
        assert started.wait(120)
        server.interrupt()

    def on_progress(progress: Progress) -> None:
        if progress.node_type == "KSampler" and progress.maximum:
            started.set()

    thread = threading.Thread(target=interrupt_when_sampling)
    thread.start()
    with pytest.raises(GraphInterrupted):
        server.run(sampling_graph(steps=2000, seed=2), on_progress)
    thread.join()
    assert server.run(sampling_graph(steps=1, seed=3)).status == "success"


def test_timeout_interrupts(server: Client) -> None:
    with pytest.raises(TimeoutError, match="within 3 seconds"):
        server.run(sampling_graph(steps=2000, seed=4), timeout=3)
    assert server.run(sampling_graph(steps=1, seed=5)).status == "success"
