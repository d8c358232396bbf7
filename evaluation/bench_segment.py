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
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from truefill_testing.host import ensure_host, pack_module  # noqa: E402

ensure_host()

import comfy.model_management  # noqa: E402
import segment_anything  # noqa: E402
import torch  # noqa: E402

from truefill_testing.random_dino import random_dino  # noqa: E402
from truefill_testing.random_segmenters import sam2_state, smooth_picture  # noqa: E402

detect = pack_module("selection.detectors")
detectors = pack_module("weights.detectors")
grounding_dino = pack_module("weights.grounding_dino")
PeakMemory = pack_module("evaluation.memory").PeakMemory
segment = pack_module("selection.segmenters")
segmenters = pack_module("weights.segmenters")
show_table = pack_module("evaluation.tables").show_table

MIB = 2**20
NETWORKS = ("vit_b", "vit_l", "vit_h", "sam2_tiny", "dino_swin_t")
SAM2_TINY = ROOT / "tests" / "data" / "sam2_1_hiera_tiny.json"


def weights(network: str) -> dict[str, torch.Tensor]:
    """A file's tensors."""
    if network == "sam2_tiny":
        return sam2_state(json.loads(SAM2_TINY.read_text())["shapes"])
    return segment_anything.sam_model_registry[network]().state_dict()


def detector_row(height: int, width: int) -> dict[str, Any]:
    """The detector's figures: it looks at a picture anew for every text."""
    detector = detect.Detector.of(
        detectors.detector_from_state(random_dino(), "dino_swin_t"), grounding_dino.tokenizer()
    )
    detector.detect(smooth_picture(height, width, seed=1), ["cup"])
    with PeakMemory(comfy.model_management.get_torch_device()) as memory:
        started = time.perf_counter()
        detector.detect(smooth_picture(height, width, seed=2), ["red cup", "spoon"])
        seconds = time.perf_counter() - started
    return {
        "network": "dino_swin_t",
        "picture": f"{width}x{height}",
        "first, s": seconds,
        "next, s": seconds,
        "memory, MiB": memory.bytes / MIB,
        "asked for, MiB": detect.memory(*detect.scaled_size(height, width)) / MIB,
    }


def row(network: str, height: int, width: int, clicks: int) -> dict[str, Any]:
    """A segmenter's figures."""
    segmenter = segment.Segmenter.of(segmenters.segmenter_from_state(weights(network), network))
    device = comfy.model_management.get_torch_device()
    prompts = [segment.Prompt([(width * (1.0 + click) / (1.0 + clicks), height / 2.0)]) for click in range(clicks)]
    # The first call also places the network.
    segmenter.segment(smooth_picture(height, width, seed=1), prompts[:1])
    picture = smooth_picture(height, width, seed=2)
    with PeakMemory(device) as memory:
        started = time.perf_counter()
        segmenter.segment(picture, prompts[:1])
        first = time.perf_counter() - started
    seconds = []
    for prompt in prompts:
        started = time.perf_counter()
        segmenter.segment(picture, [prompt])
        seconds.append(time.perf_counter() - started)
    return {
        "network": network,
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
        detector_row(height, width) if network == "dino_swin_t" else row(network, height, width, options.clicks)
        for network in options.networks
    ]
    show_table(machine, rows)
    if options.json:
        options.json.write_text(json.dumps([{"machine": machine, **found} for found in rows], indent=1))


if __name__ == "__main__":
    main()
