"""Time and memory of segmenters and the detector in the published sizes: a first click on a picture, a next one, a text.

Random weights: the cost does not depend on them. Memory is the greatest growth while a picture is looked at, beside what the node
asks the host to keep free.

    python dev.py bench segment [--networks vit_b sam2_tiny dino_swin_t] [--size 768 1024] [--clicks 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
import transformers

from ..selection import detectors
from ..selection.segmenters import Prompt, Segmenter
from ..weights.grounding_dino import tokenizer
from .memory import PeakMemory
from .tables import show_table

MIB = 2**20
VITS = {
    "vit_b": (768, 12, 12, [2, 5, 8, 11]),
    "vit_l": (1024, 24, 16, [5, 11, 17, 23]),
    "vit_h": (1280, 32, 16, [7, 15, 23, 31]),
}
"""Segment Anything's image encoders: width, blocks, heads, and the blocks that attend to the whole picture."""
NETWORKS = (*VITS, "sam2_tiny", "dino_swin_t")


def network(name: str) -> Any:
    """One of NETWORKS, with random weights."""
    library: Any = transformers
    if name == "dino_swin_t":
        made = library.GroundingDinoForObjectDetection(library.GroundingDinoConfig())
    elif name == "sam2_tiny":
        made = library.Sam2Model(library.Sam2Config())
    else:
        width, blocks, heads, everywhere = VITS[name]
        encoder = library.SamVisionConfig(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            global_attn_indexes=everywhere,
            # The default of 1e-10 makes denormal numbers, which take long.
            initializer_range=0.02,
        )
        made = library.SamModel(library.SamConfig(vision_config=encoder))
    return made.eval().requires_grad_(False)


def picture(height: int, width: int, seed: int) -> torch.Tensor:
    """Random pixels, [H, W, 3] in [0, 1]."""
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


def detector_row(height: int, width: int) -> dict[str, Any]:
    """The detector's figures: it looks at a picture anew for every text."""
    made = network("dino_swin_t")
    detector, size = (
        detectors.Detector.of(made, tokenizer()),
        detectors.scaled_size(height, width, made.config.num_queries),
    )
    detector.detect(picture(height, width, seed=1), ["cup"])
    with PeakMemory(comfy.model_management.get_torch_device()) as memory:
        started = time.perf_counter()
        detector.detect(picture(height, width, seed=2), ["red cup", "spoon"])
        seconds = time.perf_counter() - started
    return {
        "network": "dino_swin_t",
        "picture": f"{width}x{height}",
        "first, s": seconds,
        "next, s": seconds,
        "memory, MiB": memory.bytes / MIB,
        "asked for, MiB": detectors.memory(*size) / MIB,
    }


def row(name: str, height: int, width: int, clicks: int) -> dict[str, Any]:
    """A segmenter's figures."""
    segmenter = Segmenter.of(network(name))
    device = comfy.model_management.get_torch_device()
    prompts = [Prompt([(width * (1.0 + click) / (1.0 + clicks), height / 2.0)]) for click in range(clicks)]
    # The first call also places the network.
    segmenter.segment(picture(height, width, seed=1), prompts[:1])
    looked_at = picture(height, width, seed=2)
    with PeakMemory(device) as memory:
        started = time.perf_counter()
        segmenter.segment(looked_at, prompts[:1])
        first = time.perf_counter() - started
    seconds = []
    for prompt in prompts:
        started = time.perf_counter()
        segmenter.segment(looked_at, [prompt])
        seconds.append(time.perf_counter() - started)
    return {
        "network": name,
        "picture": f"{width}x{height}",
        "first, s": first,
        "next, s": statistics.median(seconds),
        "memory, MiB": memory.bytes / MIB,
        "asked for, MiB": segmenter.memory / MIB,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python dev.py bench segment", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["vit_b", "sam2_tiny", "dino_swin_t"])
    parser.add_argument("--size", type=int, nargs=2, default=(768, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--clicks", type=int, default=5, help="counted clicks (default: 5)")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    machine = f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    height, width = options.size
    rows = [
        detector_row(height, width) if name == "dino_swin_t" else row(name, height, width, options.clicks)
        for name in options.networks
    ]
    show_table(machine, rows)
    if options.json:
        options.json.write_text(json.dumps([{"machine": machine, **found} for found in rows], indent=1))
