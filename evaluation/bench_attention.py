"""Time and memory of one CFG step of a full-depth inpainting UNet, SD1.5's or SDXL's.

Plain, PAIntA, RASG, both, SBC, the literal forms, and Noise Search's one search with the step that follows.

Random weights: the cost does not depend on them. The literal forms do what the formulas of HD-Painter and its released code
say: PAIntA with the N x N score matrix multiplied by c, RASG with the gradient through the whole UNet, both halves of CFG in
one graph and weights that require gradients. Within one size the rows run in turn, round by round; times are medians.
Memory is the greatest growth during a step over what is held before it.

    python dev.py bench attention [--family SDXL] [--sizes 256 512] [--literal-up-to 256] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch

from ..imaging.masks import hole_cells
from ..model_patches.core.sampling_run import with_method
from ..model_patches.core.unet_attention import GRIDS, transformer_places
from ..model_patches.hd_painter.painta import PAIntA, prompt_relevance
from ..model_patches.hd_painter.rasg import RASG, attention_score
from ..model_patches.pilot.semantic_boundary import SemanticBoundary
from ..model_patches.starts.noise_search import NoiseSearch
from . import full_size

EULER = comfy.samplers.sampler_object("euler")


def literal_painta_step(model: Any, scene: Any) -> None:
    """One step of PAIntA with the whole score matrix of each head, multiplied and softmaxed in the open."""
    places = transformer_places(model.model.diffusion_model)
    tokens = scene.sides[0][0][1]["truefill_prompt_tokens"]
    context = scene.sides[0][0][0]
    model = model.clone()
    inputs: dict[Any, torch.Tensor] = {}

    def attend(t: Any) -> Callable[..., torch.Tensor]:
        def replaced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
            heads = options["n_heads"]
            q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
            scores = q @ k.mT * options["dim_head"] ** -0.5
            y = t.module.attn1.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = inputs.pop(t.place)
            row = options["cond_or_uncond"].index(0)
            query = t.module.attn2.to_q(t.module.norm2(x[row : row + 1] + y[row : row + 1]))
            key = t.module.attn2.to_k(context.to(query))
            grid = tuple(options["activations_shape"][-2:])
            c = prompt_relevance(query, key, heads, tokens.to(query.device), grid, True)[0]
            hole = hole_cells(scene.hole, grid).flatten().to(c.device)
            scores = scores * torch.where(hole[:, None] & ~hole[None, :], c.to(scores.dtype)[None, :], 1.0)
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

        return replaced

    with ExitStack() as hooks:
        for t in places:
            if t.factor in (2, 4) and t.place[0] != "middle":
                keep = partial(lambda place, _, args: inputs.update({place: args[0]}), t.place)
                hooks.callback(t.module.norm1.register_forward_pre_hook(keep).remove)
                model.set_model_attn1_replace(attend(t), t.place[0], t.place[1], t.place[2])
        scene.sample(model, EULER)


def literal_rasg_step(model: Any, scene: Any) -> None:
    """One RASG step as released: whole graph, both halves, weights that require gradients; then Euler's step."""
    unet = model.model.diffusion_model
    places = [t for t in transformer_places(unet) if t.factor == 4]
    device, dtype = next(unet.parameters()).device, unet.dtype
    maps: list[torch.Tensor] = []
    tokens = scene.sides[0][0][1]["truefill_prompt_tokens"][0]

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        q = module.to_q(args[0]).unflatten(2, (module.heads, -1)).transpose(1, 2)
        k = module.to_k(kwargs["context"]).unflatten(2, (module.heads, -1)).transpose(1, 2)
        maps.append((q @ k.mT * module.dim_head**-0.5).mean(dim=1)[1:])

    handles = [t.cross.register_forward_pre_hook(record, with_kwargs=True) for t in places]
    unet.requires_grad_(True)
    try:
        latent = scene.noise.to(device).requires_grad_()
        masked = torch.cat((scene.hole, scene.latent), dim=1).to(device)
        inputs = torch.cat((latent, masked), dim=1).to(dtype)
        context = torch.cat((scene.sides[1][0][0], scene.sides[0][0][0])).to(device, dtype)
        uncond, cond = unet(inputs.repeat(2, 1, 1, 1), torch.full((2,), 800, device=device), context=context).chunk(2)
        grid = (-(-scene.noise.shape[2] // 4), -(-scene.noise.shape[3] // 4))
        scores = torch.stack(maps).mean(dim=0)[..., tokens.to(device)].float()
        score = attention_score(scores, hole_cells(scene.hole, grid).flatten(1).to(device))
        (gradient,) = torch.autograd.grad(score, latent)
        # The result is of no use; that it is computed is what counts.
        _ = latent + 0.1 * (uncond + 7.5 * (cond - uncond)).detach() + 0.01 * gradient / gradient.std()
    finally:
        unet.requires_grad_(False)
        for handle in handles:
            handle.remove()


def variants(model: Any, scene: Any, literal: bool) -> dict[str, Callable[[], None]]:
    painta = with_method(model, PAIntA())
    boundary = with_method(model, SemanticBoundary())
    searched = with_method(model, NoiseSearch(announce=lambda text: None))
    rasg, finer, both_grids = (with_method(model, RASG(grid=grid)) for grid in GRIDS)
    both = with_method(painta, RASG())
    rows: dict[str, Callable[[], None]] = {
        "plain": lambda: scene.sample(model, EULER),
        "PAIntA": lambda: scene.sample(painta, EULER),
        "RASG": lambda: scene.sample(rasg, EULER),
        "RASG at 1/16": lambda: scene.sample(finer, EULER),
        "RASG at both": lambda: scene.sample(both_grids, EULER),
        "PAIntA + RASG": lambda: scene.sample(both, EULER),
        "SBC": lambda: scene.sample(boundary, EULER),
        "Noise Search": lambda: scene.sample(searched, EULER),
    }
    if literal:
        rows["literal RASG"] = lambda: literal_rasg_step(model, scene)
        rows["literal PAIntA"] = lambda: literal_painta_step(model, scene)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench attention", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="pixels of the side (default: 256 512; on CUDA also 1024 2048)"
    )
    parser.add_argument(
        "--literal-up-to", type=int, help="greatest size for the literal forms (default: 256; on CUDA 512)"
    )
    parser.add_argument(
        "--family", choices=full_size.FAMILIES, default="SD1.5", help="default: SD1.5; SDXL has no literal forms"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="rows to measure beside plain (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()

    device = comfy.model_management.get_torch_device()
    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    sizes = options.sizes or ([256, 512, 1024, 2048] if cuda else [256, 512])
    literal_up_to = options.literal_up_to if options.literal_up_to is not None else (512 if cuda else 256)
    literal_up_to = literal_up_to if options.family == "SD1.5" else 0
    print(
        f"{full_size.machine(device)}, {str(dtype).removeprefix('torch.')}; "
        f"one CFG step of a full-depth {options.family}-inpainting UNet"
    )
    model = full_size.full_size_model(device, dtype, inpainting=True, family=options.family)
    results = []
    full_size.show_head()
    for size in sizes:
        # On CUDA each size picks its own kernels; on a CPU only the very first steps are slower.
        warm_up = cuda or size == sizes[0]
        rows = variants(model, full_size.Scene(size, options.family), size <= literal_up_to)
        rows = {name: step for name, step in rows.items() if name == "plain" or name in (options.variants or rows)}
        for row in full_size.compare(rows, options.rounds, warm_up, device, with_gradients=["literal RASG"]):
            results.append({"size": size, **row})
            full_size.show_row(size, row)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": full_size.machine(device), "dtype": str(dtype), "rows": results}, indent=1)
        )
