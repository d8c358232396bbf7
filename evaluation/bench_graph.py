"""How many numbers the graph of one of PILOT's passes keeps for each latent pixel, on full-depth UNets of SD1.5 and SDXL.

With these PILOT decides whether a graph fits into memory (`GRAPH_ELEMENTS`); the command fails where a UNet keeps more than it
says. Random weights, one picture, the weights themselves not counted. SDXL takes 6 GB of memory.

    python dev.py bench graph [--families SD SDXL] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch.autograd.graph import saved_tensors_hooks

from ..model_patches.core import call_rows
from ..model_patches.core import unet_attention as unets
from ..model_patches.core.prompt_tokens import PromptTokens
from ..model_patches.core.protocol import UNetCall
from ..model_patches.pilot import sampler as pilot
from ..model_patches.pilot import semantic_centralisation as centralisation
from . import full_size
from .tables import show_table

FAMILIES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "SD": (full_size.SD15, torch.float32),
    "SDXL": (full_size.SDXL, torch.bfloat16),
}
CELLS = (16, 32)


def kept(unet: UNetModel, config: dict[str, Any], cells: int) -> float:
    """Numbers that autograd keeps for each of `cells` x `cells` latent pixels, the weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in unet.parameters()}
    found: dict[int, int] = {}
    # Memory that is given back could be taken for the same again.
    alive: list[torch.Tensor] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    hole = torch.zeros(1, 1, cells, cells)
    hole[..., cells // 4 : cells // 2, cells // 4 : cells // 2] = 1.0
    tokens = torch.zeros(1, 77, dtype=torch.bool)
    tokens[0, 1:6] = True
    dtype, adm = unet.dtype, config["adm_in_channels"]
    call = UNetCall(
        unet=unet,
        places=unets.transformer_places(unet),
        rows=(call_rows.PromptRows(True, PromptTokens(tokens, torch.zeros_like(tokens), are_known=True)),),
        sigma=1.0,
        x=torch.randn(1, 4, cells, cells, dtype=dtype).requires_grad_(),
        timesteps=torch.tensor([500.0]),
        context=torch.randn(1, 77, config["context_dim"], dtype=dtype),
        y=None if adm is None else torch.randn(1, adm, dtype=dtype),
        control=None,
        options={},
        keywords={},
        others_write=False,
    )
    reader = centralisation.Centralisation(hole)
    with reader.edit(call), saved_tensors_hooks(count, lambda tensor: tensor):
        unet(call.x, call.timesteps, call.context, y=call.y, transformer_options=call.options)
    return sum(found.values()) / dtype.itemsize / cells**2


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python dev.py bench graph", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="default: both")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for family in options.families:
        config, dtype = FAMILIES[family]
        unet = UNetModel(**config, in_channels=4, dtype=dtype, operations=comfy.ops.disable_weight_init)
        unet.requires_grad_(False)
        for weight in unet.parameters():
            weight.data.fill_(0.01)
        limit = pilot.GRAPH_ELEMENTS[family]
        rows += [
            {"family": family, "cells": cells, "kept": round(kept(unet, config, cells)), "limit": limit}
            for cells in CELLS
        ]
    show_table("Numbers kept for each latent pixel.", rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["kept"] > row["limit"] for row in rows))
