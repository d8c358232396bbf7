"""Time and memory of a run with a subject, on a full-depth SD1.5-inpainting UNet: plain, Assign, Refine, both.

Random weights: the cost does not depend on them. A run has 4 steps with CFG; the subject's picture is as large as the scene, or
half as large, and its features are found in each step, or once for the 4. Within one size the rows run in turn, round by round;
times are medians. Memory is the greatest growth during a run over what is held before it.

    python dev.py bench subject [--sizes 256 512] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import torch

from ..model_patches.core.sampling_run import with_method
from ..model_patches.core.unet_attention import transformer_places
from ..model_patches.lar_gen.decoupled_attention import Assign
from ..model_patches.lar_gen.reference import Refine
from . import full_size

EULER = comfy.samplers.sampler_object("euler")
SIGMAS = (10.0, 9.0, 8.0, 7.0, 6.0)
TOKENS = 16


def assigned(model: Any) -> Any:
    """A MODEL that reads a random subject."""
    generator = torch.Generator().manual_seed(2)
    crosses = {t.place: t.cross for t in transformer_places(model.model.diffusion_model)}
    width = next(iter(crosses.values())).to_k.weight.shape[1]
    projections = {
        place: (cross.to_k.weight.detach().clone(), cross.to_v.weight.detach().clone())
        for place, cross in crosses.items()
    }
    subject, nothing = (torch.randn(1, TOKENS, width, generator=generator) for _ in range(2))
    return with_method(model, Assign(strength=0.45, subject=subject, nothing=nothing, projections=projections))


def refined(model: Any, size: int, **options: Any) -> Any:
    """A MODEL that looks at a random subject of so many pixels."""
    latents = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(3))
    return with_method(model, Refine(latents=latents, is_one=True, **options))


def runs(model: Any, size: int) -> dict[str, Callable[[], None]]:
    """What is measured at one size, by the row's name."""
    scene, with_assign = full_size.Scene(size), assigned(model)
    models = {
        "plain": model,
        "Assign": with_assign,
        "Refine": refined(model, size),
        "Refine, strength 0.5": refined(model, size, strength=0.5),
        "Refine, half the size": refined(model, size // 2),
        "Refine, reuse 4": refined(model, size, reuse=4),
        "Assign + Refine": refined(with_assign, size),
    }

    def run(patched: Any) -> Callable[[], None]:
        return lambda: scene.sample(patched, EULER, SIGMAS)

    return {name: run(patched) for name, patched in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench subject", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 512], help="pixels of the side (default: 256 512)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    device = comfy.model_management.get_torch_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    print(
        f"{full_size.machine(device)}, {str(dtype).removeprefix('torch.')}; 4 CFG steps of a full-depth SD1.5-inpainting UNet"
    )
    model = full_size.full_size_model(device, dtype, inpainting=True)
    results = []
    full_size.show_head()
    for size in options.sizes:
        warm_up = device.type == "cuda" or size == options.sizes[0]
        for row in full_size.compare(runs(model, size), options.rounds, warm_up, device):
            results.append({"size": size, **row})
            full_size.show_row(size, row)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": full_size.machine(device), "dtype": str(dtype), "rows": results}, indent=1)
        )
