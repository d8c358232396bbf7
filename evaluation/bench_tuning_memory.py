"""What *Train Subject* says that it takes, on full-depth UNets of SD1.5 and SDXL, and what a step of it takes here.

The first table is `step_memory`'s alone, in half precision: nothing is computed. The second trains one of them on this machine,
with random weights, two steps each, with PyTorch's own attention as on a GPU: growth of memory without the weights.

    python dev.py bench tuning_memory [--sizes 512 768 1024] [--family SDXL] [--measure 256 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..training.subject_lora.memory import step_memory
from ..training.subject_lora.tuning import Example, Tuner, Tuning
from . import full_size
from .memory import PeakMemory
from .tables import show_table

GIB = 2**30
TOKENS = 77
SAVED = {"on": True, "off": False}


def said(config: dict[str, Any], size: int, recompute: bool) -> dict[str, float]:
    """GiB of a step at `size` pixels, in half precision, and of all with the weights."""
    half = {**config, "in_channels": 4, "dtype": torch.float16}
    unet = UNetModel(**half, device="meta", operations=comfy.ops.disable_weight_init)
    model: Any = SimpleNamespace(
        diffusion_model=unet,
        model_config=SimpleNamespace(unet_config=half),
        manual_cast_dtype=None,
        get_dtype_inference=lambda: torch.float16,
    )
    weights = sum(weight.numel() * weight.element_size() for weight in unet.parameters())
    step = step_memory(model, size // 8, size // 8, (TOKENS, config["context_dim"]), Tuning.rank, False, recompute)
    return {"step": step / GIB, "with the weights": (step + weights) / GIB}


def measured(model: Any, size: int, recompute: bool, device: torch.device) -> dict[str, float]:
    """GiB that two steps take here beside the weights, and what is said of them."""
    side, width = size // 8, model.model.model_config.unet_config["context_dim"]
    prompt = [[torch.randn(1, TOKENS, width), {"pooled_output": torch.randn(1, full_size.POOLED)}]]
    latent, masks = torch.randn(1, 4, side, side), torch.ones(1, 1, side, side)
    example = Example(latent=latent, masks=masks, concat=[], prompts=[prompt])
    tuner = Tuner(model, Tuning(steps=2, accumulate=1, recompute=recompute))
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode(), PeakMemory(device) as memory:
        tuner.run([example], [], lambda step, loss: None)
    return {"said": tuner.memory([example]) / GIB, "here": memory.bytes / GIB}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python dev.py bench tuning_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[512, 768, 1024], help="pixels of the side, for the first table"
    )
    parser.add_argument("--family", choices=full_size.FAMILIES, default="SD1.5", help="for the second (default: SD1.5)")
    parser.add_argument("--measure", type=int, nargs="*", default=[256, 512], help="likewise, for the second")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    device = comfy.model_management.get_torch_device()
    rows: list[dict[str, Any]] = [
        {"model": name, "pixels": size, "save_memory": saved, **said(config, size, recompute)}
        for name, (_, config) in full_size.FAMILIES.items()
        for size in options.sizes
        for saved, recompute in SAVED.items()
    ]
    show_table("GiB in half precision, as said before a training", rows)
    attention: Any = comfy.ldm.modules.attention
    attention.optimized_attention = attention.attention_pytorch
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    family = options.family
    model = full_size.full_size_model(device, dtype, inpainting=False, family=family) if options.measure else None
    here = [
        {"pixels": size, "save_memory": saved, **measured(model, size, recompute, device)}
        for size in options.measure
        for saved, recompute in SAVED.items()
    ]
    show_table(f"{full_size.machine(device)}; GiB of a step of {family}, {str(dtype).removeprefix('torch.')}", here)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": full_size.machine(device), "said": rows, "here": here}, indent=1)
        )
