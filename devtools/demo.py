"""The demo: the shipped graph on a checkpoint of random weights, from nothing to a picture."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .client import Graph, GraphFailed, GraphRejected, Progress, Result, ServerGone
from .paths import CACHE, ROOT, UserError
from .server import Server

GRAPH = ROOT / "workflows" / "api" / "text_inpaint_sd15.json"
OUTPUT = ROOT / "demo-output"
STEPS = 8

_WORDS = {"KSampler": "sampling", "CheckpointLoaderSimple": "loading the checkpoint", "VAEDecode": "decoding"}


def _only(graph: Graph, class_type: str) -> dict[str, Any]:
    """The graph's node of this type; UserError where there is not exactly one."""
    found = [node for node in graph.values() if node["class_type"] == class_type]
    if len(found) != 1:
        raise UserError(f"The demo's graph needs exactly one {class_type} node; {GRAPH.name} has {len(found)}.")
    return found[0]


def prepare(graph: Graph, checkpoint: str, steps: int = STEPS) -> dict[str, str]:
    """Point the graph at the checkpoint, shorten it, and save what goes into the composite.

    Changes the graph in place; returns the node ids of the pictures "input", "mask" and "result".
    """
    _only(graph, "CheckpointLoaderSimple")["inputs"]["ckpt_name"] = checkpoint
    sampler = _only(graph, "KSampler")["inputs"]
    sampler["steps"] = min(sampler["steps"], steps)
    composite = _only(graph, "ImageCompositeMasked")
    composite_id = next(node_id for node_id, node in graph.items() if node is composite)
    added = {
        "demo_input": ("PreviewImage", {"images": composite["inputs"]["destination"]}),
        "demo_mask_image": ("MaskToImage", {"mask": composite["inputs"]["mask"]}),
        # The composite scales the mask to the picture in the same way.
        "demo_size": ("GetImageSize", {"image": composite["inputs"]["destination"]}),
        "demo_mask_scaled": (
            "ImageScale",
            {
                "image": ["demo_mask_image", 0],
                "upscale_method": "bilinear",
                "width": ["demo_size", 0],
                "height": ["demo_size", 1],
                "crop": "disabled",
            },
        ),
        "demo_mask": ("PreviewImage", {"images": ["demo_mask_scaled", 0]}),
        "demo_result": ("PreviewImage", {"images": [composite_id, 0]}),
    }
    for node_id, (class_type, inputs) in added.items():
        graph[node_id] = {"class_type": class_type, "inputs": inputs}
    return {"input": "demo_input", "mask": "demo_mask", "result": "demo_result"}


def random_checkpoint(host: Path, python: Path, models: Path, name: str) -> None:
    """Write the random SD1.5-inpainting checkpoint under this name unless it is there."""
    path = models / "checkpoints" / name
    if path.is_file():
        return
    print("Writing a checkpoint of random weights in the format of SD1.5-inpainting ...", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    script = ROOT / "devtools" / "random_checkpoints.py"
    command = [str(python), str(script), str(host), "sd15", str(path), "--inpainting"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=models)
    if done.returncode:
        raise UserError(f"The random checkpoint could not be written:\n{done.stderr.strip()[-2000:]}")


def models_folder() -> Path:
    """The cache folder for checkpoints of the present writer."""
    source = (ROOT / "devtools" / "random_checkpoints.py").read_bytes()
    return CACHE / "demo-models" / hashlib.sha256(source).hexdigest()[:12]


def _show(progress: Progress) -> None:
    what = _WORDS.get(progress.node_type, progress.node_type)
    if progress.maximum:
        print(f"  {what} {progress.value}/{progress.maximum}", flush=True)
    else:
        print(f"  {what} ...", flush=True)


def _run(server: Server, graph: Graph) -> Result:
    try:
        return server.client.run(graph, _show, timeout=3600)
    except (GraphRejected, GraphFailed, ServerGone, TimeoutError) as error:
        raise UserError(f"{error}\n--- the last lines of {server.log} ---\n{server.tail()}") from error


def _join(python: Path, result: Result, nodes: dict[str, str]) -> Path:
    OUTPUT.mkdir(exist_ok=True)
    target = OUTPUT / "input-mask-result.png"
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, node_id in nodes.items():
            if not result.images.get(node_id):
                raise UserError(f"The graph finished without a picture for the {name}.")
            path = Path(folder) / f"{name}.png"
            path.write_bytes(result.images[node_id][0])
            paths.append(str(path))
        command = [str(python), str(ROOT / "devtools" / "picture.py"), *paths, str(target)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    said = done.stdout.strip() or done.stderr.strip()
    if done.returncode:
        raise UserError(f"The demo's check failed: {said}")
    print(said)
    return target


def demo(host: Path, python: Path) -> None:
    """Run the shipped graph and write the picture; raises UserError where that fails."""
    try:
        graph: Graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"The demo's graph {GRAPH} is missing; restore it from git.") from None
    name = _only(graph, "CheckpointLoaderSimple")["inputs"]["ckpt_name"]
    checkpoint = Path(name).stem + ".safetensors"
    if checkpoint != name:
        print(f"The graph names {name}; the demo writes and loads {checkpoint} in its place.")
    print("There is no trained demo model yet: the checkpoint's weights are random, so the hole shows noise.")
    random_checkpoint(host, python, models_folder(), checkpoint)
    asked = _only(graph, "KSampler")["inputs"]["steps"]
    nodes = prepare(graph, checkpoint)
    if asked > STEPS:
        print(f"Sampling {STEPS} steps instead of the graph's {asked}, about a minute on two CPU cores.")
    print("Starting ComfyUI ...", flush=True)
    with Server(host, python, models=[models_folder()], log_name="demo") as server:
        print(f"ComfyUI with TrueFill answers at {server.address}; its log is {server.log}", flush=True)
        result = _run(server, graph)
    target = _join(python, result, nodes)
    print(f"Done in {result.seconds:.0f} s. The picture (input, mask, result side by side): {target}")
