"""Time and memory of one CFG step of a full-depth SD1.5-inpainting UNet: plain, PAIntA, RASG, both, SBC, and the literal forms.

Random weights: the cost does not depend on them. The literal forms do what the formulas of HD-Painter and its released code
say: PAIntA with the N x N score matrix multiplied by c, RASG with the gradient through the whole UNet, both halves of CFG in
one graph and weights that require gradients. Within one size the rows run in turn, round by round; times are medians.
Memory is the greatest growth during a step over what is held before it.

    python dev.py bench attention [--sizes 256 512] [--literal-up-to 256] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from truefill_testing.host import ensure_host, pack_module  # noqa: E402

ensure_host()

import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402

guidance = pack_module("model_patches.guidance")
PeakMemory = pack_module("evaluation.memory").PeakMemory
PAIntA = pack_module("model_patches.painta").PAIntA
RASG = pack_module("model_patches.rasg").RASG
SemanticBoundary = pack_module("model_patches.boundary").SemanticBoundary

MIB = 2**20
SD15 = {
    "image_size": 32,
    "in_channels": 9,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4),
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "context_dim": 768,
    "adm_in_channels": None,
}


def full_size_model(device: torch.device, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    config = comfy.supported_models.SD15(dict(SD15))
    config.set_inference_dtype(dtype, None)
    with torch.device(device):
        model = comfy.model_base.BaseModel(config)
    model.set_inpaint()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        bound = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.uniform_(-bound, bound, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


class Scene:
    """One picture of `size` pixels with a square hole of a quarter of its area, and two prompts."""

    def __init__(self, size: int, device: torch.device):
        cells = size // 8
        generator = torch.Generator().manual_seed(1)
        self.latent = torch.randn(1, 4, cells, cells, generator=generator)
        self.noise = torch.randn(1, 4, cells, cells, generator=generator)
        self.hole = torch.zeros(1, 1, cells, cells)
        quarter = cells // 4
        self.hole[..., quarter : cells - quarter, quarter : cells - quarter] = 1.0
        tokens = torch.zeros(1, 77, dtype=torch.bool)
        tokens[0, 1:6] = True
        self.sides = []
        for _ in range(2):
            options = {
                "pooled_output": torch.randn(1, 768, generator=generator),
                "concat_latent_image": self.latent,
                "concat_mask": self.hole,
                "truefill_prompt_tokens": tokens,
            }
            self.sides.append([[torch.randn(1, 77, 768, generator=generator), options]])

    def step(self, model: comfy.model_patcher.ModelPatcher, sampler: str = "euler") -> None:
        """One step of the host's sampler at CFG 7.5, where PAIntA is on."""
        sigmas = torch.tensor([10.0, 8.0])
        comfy.sample.sample_custom(
            model,
            self.noise,
            7.5,
            comfy.samplers.sampler_object(sampler),
            sigmas,
            self.sides[0],
            self.sides[1],
            self.latent,
            noise_mask=self.hole,
            disable_pbar=True,
            seed=0,
        )


def literal_painta_step(model: comfy.model_patcher.ModelPatcher, scene: Scene) -> None:
    """One step of PAIntA with the whole score matrix of each head, multiplied and softmaxed in the open."""
    relevance = pack_module("model_patches.painta").prompt_relevance
    hole_cells = pack_module("imaging.masks").hole_cells
    places = pack_module("model_patches.unet").transformer_places(model.model.diffusion_model)
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
            c = relevance(query, key, heads, tokens.to(query.device), grid, True)[0]
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
        scene.step(model)


def literal_rasg_step(model: comfy.model_patcher.ModelPatcher, scene: Scene) -> None:
    """One RASG step as released: whole graph, both halves, weights that require gradients; then Euler's step."""
    attention_score = pack_module("model_patches.rasg").attention_score
    hole_cells = pack_module("imaging.masks").hole_cells
    unet = model.model.diffusion_model
    places = [t for t in pack_module("model_patches.unet").transformer_places(unet) if t.factor == 4]
    device, dtype = next(unet.parameters()).device, unet.dtype
    maps: list[torch.Tensor] = []
    tokens = scene.sides[0][0][1]["truefill_prompt_tokens"][0]

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        q = module.to_q(args[0]).unflatten(2, (module.heads, -1)).transpose(1, 2)
        k = module.to_k(kwargs["context"]).unflatten(2, (module.heads, -1)).transpose(1, 2)
        maps.append((q @ k.mT * module.dim_head**-0.5).mean(dim=1)[1:])

    handles = [t.module.attn2.register_forward_pre_hook(record, with_kwargs=True) for t in places]
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


def measure(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds and MiB of one step."""
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, memory.bytes / MIB


def variants(model: Any, scene: Scene, literal: bool) -> dict[str, Callable[[], None]]:
    painta = guidance.with_painta(model, PAIntA())
    boundary = guidance.with_boundary(model, SemanticBoundary())
    rasg = guidance.with_rasg(model, RASG())
    both = guidance.with_rasg(painta, RASG())
    rows: dict[str, Callable[[], None]] = {
        "plain": lambda: scene.step(model),
        "PAIntA": lambda: scene.step(painta),
        "RASG": lambda: scene.step(rasg),
        "PAIntA + RASG": lambda: scene.step(both),
        "SBC": lambda: scene.step(boundary),
    }
    if literal:
        rows["literal RASG"] = lambda: literal_rasg_step(model, scene)
        rows["literal PAIntA"] = lambda: literal_painta_step(model, scene)
    return rows


def measure_size(
    model: Any, size: int, literal: bool, rounds: int, warm_up: bool, device: torch.device, only: list[str] | None
) -> list[dict[str, Any]]:
    """Median time and memory of the variants at one size, and their ratios to the plain step."""
    rows = variants(model, Scene(size, device), literal)
    rows = {name: step for name, step in rows.items() if only is None or name == "plain" or name in only}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    memory: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(0 if warm_up else 1, rounds + 1):
        for name, step in rows.items():
            with torch.inference_mode(name != "literal RASG"):
                taken, grown = measure(step, device)
            if round_ > 0:
                seconds[name].append(taken)
                memory[name].append(grown)
    plain_seconds, plain_memory = statistics.median(seconds["plain"]), statistics.median(memory["plain"])
    return [
        {
            "size": size,
            "variant": name,
            "seconds": round(statistics.median(seconds[name]), 4),
            "time_ratio": round(statistics.median(seconds[name]) / plain_seconds, 3),
            "memory_mib": round(statistics.median(memory[name]), 1),
            "memory_ratio": round(statistics.median(memory[name]) / plain_memory, 3),
        }
        for name in rows
    ]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench attention", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="pixels of the side (default: 256 512; on CUDA also 1024 2048)"
    )
    parser.add_argument(
        "--literal-up-to", type=int, help="greatest size for the literal forms (default: 256; on CUDA 512)"
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
    print(f"{machine(device)}, {str(dtype).removeprefix('torch.')}; one CFG step of a full-depth SD1.5-inpainting UNet")
    model = full_size_model(device, dtype)
    results = []
    print(f"{'pixels':>6}  {'variant':<15} {'seconds':>9} {'x plain':>8} {'MiB':>9} {'x plain':>8}", flush=True)
    for size in sizes:
        # On CUDA each size picks its own kernels; on a CPU only the very first steps are slower.
        warm_up = cuda or size == sizes[0]
        for row in measure_size(model, size, size <= literal_up_to, options.rounds, warm_up, device, options.variants):
            results.append(row)
            print(
                f"{row['size']:>6}  {row['variant']:<15} {row['seconds']:>9.3f} {row['time_ratio']:>8.2f} "
                f"{row['memory_mib']:>9.0f} {row['memory_ratio']:>8.2f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine(device), "dtype": str(dtype), "rows": results}, indent=1)
        )


if __name__ == "__main__":
    main()
