"""Time and memory of one step of Flux-, Qwen-Image- and Z-Image-shaped transformers: plain, SBC, PAIntA, both.

Real widths, a few blocks, random weights: the cost of a block does not depend on them, and neither do the ratios on how many
there are. One prompt, a square hole of a quarter of the picture. The rows run in turn, round by round; times are medians. Memory
is the greatest growth during a step over what is held before it. On a CPU torch's attention takes the place of the host's, which
saves memory there: it is what a GPU has.

    python dev.py bench joint [--families flux qwen_image z_image] [--sizes 512 1024] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy.cli_args import args as host_arguments

# Read when the host's attention is imported.
host_arguments.use_pytorch_cross_attention = True

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402

from ..model_patches.core.prompt_tokens import TOKENS_KEY, WORD  # noqa: E402
from ..model_patches.core.sampling_run import with_method  # noqa: E402
from ..model_patches.hd_painter.painta import PAIntA  # noqa: E402
from ..model_patches.pilot.semantic_boundary import SemanticBoundary  # noqa: E402
from . import full_size  # noqa: E402

# What the host's loader finds in the published files, but for the number of blocks.
STACKS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "flux": (
        comfy.supported_models.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 1,
            "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56],
            "theta": 10_000,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
    ),
    "qwen_image": (comfy.supported_models.QwenImage, {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2}),
    "z_image": (
        comfy.supported_models.ZImage,
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 3840,
            "cap_feat_dim": 2560,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "qk_norm": True,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
    ),
}
TEXTS = {"flux": (256, 4096), "qwen_image": (60, 3584), "z_image": (60, 2560)}
"""How many tokens a prompt of some words has, and how wide they are. T5's text is padded."""


def model_of(family: str, device: torch.device, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """A few blocks of a family, in its real width, with random weights."""
    config_class, network_config = STACKS[family]
    config = config_class(dict(network_config))
    config.set_inference_dtype(dtype, None)
    with torch.device(device):
        model = config.get_model({})
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        bound = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.uniform_(-bound, bound, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


class Scene:
    """One picture of `size` pixels with a square hole of a quarter of its area, and a prompt."""

    def __init__(self, family: str, size: int) -> None:
        cells = size // 8
        generator = torch.Generator().manual_seed(1)
        shape = (1, 16, 1, cells, cells) if family == "qwen_image" else (1, 16, cells, cells)
        self.latent, self.noise = (torch.randn(shape, generator=generator) for _ in range(2))
        self.hole = torch.zeros(1, 1, cells, cells)
        quarter = cells // 4
        self.hole[..., quarter : cells - quarter, quarter : cells - quarter] = 1.0
        tokens, width = TEXTS[family]
        words = torch.zeros(1, tokens, dtype=torch.long)
        words[0, :6] = WORD
        options = {"pooled_output": torch.randn(1, 768, generator=generator), TOKENS_KEY: words}
        self.prompt = [[torch.randn(1, tokens, width, generator=generator), options]]

    def sample(self, model: comfy.model_patcher.ModelPatcher) -> None:
        """One step of the host's sampling, without CFG."""
        comfy.sample.sample_custom(
            model,
            self.noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([0.9, 0.8]),
            self.prompt,
            self.prompt,
            self.latent,
            noise_mask=self.hole,
            disable_pbar=True,
            seed=0,
        )


def variants(model: comfy.model_patcher.ModelPatcher, scene: Scene) -> dict[str, Callable[[], None]]:
    """Steps by name, the plain one first."""
    boundary, painta = with_method(model, SemanticBoundary()), with_method(model, PAIntA())
    both = with_method(boundary, PAIntA())
    models = {"plain": model, "SBC": boundary, "PAIntA": painta, "SBC + PAIntA": both}
    return {name: (lambda chosen=chosen: scene.sample(chosen)) for name, chosen in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench joint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=list(STACKS), default=list(STACKS), metavar="FAMILY")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[512, 1024], help="pixels of the side (default: 512 1024)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    if options.rounds < 1 or min(options.sizes) < 64 or any(size % 32 for size in options.sizes):
        parser.error("--rounds is 1 or more, --sizes are multiples of 32 from 64.")

    device, dtype = comfy.model_management.get_torch_device(), torch.bfloat16
    results = []
    for family in options.families:
        print(f"{full_size.machine(device)}, bfloat16; one step of {family}'s width in a few blocks")
        model = model_of(family, device, dtype)
        full_size.show_head()
        for size in options.sizes:
            rows = variants(model, Scene(family, size))
            for row in full_size.compare(rows, options.rounds, True, device):
                results.append({"family": family, "size": size, **row})
                full_size.show_row(size, row)
        del model
    if options.json:
        options.json.write_text(json.dumps({"machine": full_size.machine(device), "rows": results}, indent=1))
