"""Full-depth Stable Diffusion UNets with random weights, and a picture for them: for benchmarks of time and memory."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

from .memory import PeakMemory

MIB = 2**20
SD15 = {
    "image_size": 32,
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
SDXL = {
    "image_size": 32,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": (1, 2, 4),
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
}
X4 = {
    "image_size": 32,
    "in_channels": 7,
    "out_channels": 4,
    "model_channels": 256,
    "use_spatial_transformer": True,
    "legacy": False,
    "context_dim": 1024,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 2, 4),
    "transformer_depth": [0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": True,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
"""What the host's loader finds in x4-upscaler-ema.safetensors."""
X4_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
"""The x4 upscaler's autoencoder, the one VAE of the host with cells of 4 pixels."""


FAMILIES = {"SD1.5": (comfy.supported_models.SD15, SD15), "SDXL": (comfy.supported_models.SDXL, SDXL)}
"""What the host makes a model of: its class, and the UNet's configuration."""
POOLED = 1280
"""The width of SDXL's pooled prompt; SD1.5 leaves it."""


def full_size_model(
    device: torch.device, dtype: torch.dtype, inpainting: bool, family: str = "SD1.5"
) -> comfy.model_patcher.ModelPatcher:
    """SD1.5's UNet, 860 million weights, or SDXL's, 2570 million; 9 channels in if `inpainting`, else 4."""
    host_class, unet = FAMILIES[family]
    config = host_class({**unet, "in_channels": 9 if inpainting else 4})
    config.set_inference_dtype(dtype, None)
    with torch.device(device):
        model = config.get_model({})
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        bound = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.uniform_(-bound, bound, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


class Scene:
    """One picture of `size` pixels with a square hole of a quarter of its area, and two prompts."""

    def __init__(self, size: int, family: str = "SD1.5"):
        cells = size // 8
        _, unet = FAMILIES[family]
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
                "pooled_output": torch.randn(1, POOLED, generator=generator),
                # For inpainting models; others leave it.
                "concat_latent_image": self.latent,
                "concat_mask": self.hole,
                "truefill_prompt_tokens": tokens,
            }
            self.sides.append([[torch.randn(1, 77, unet["context_dim"], generator=generator), options]])

    def sample(
        self,
        model: comfy.model_patcher.ModelPatcher,
        sampler: comfy.samplers.Sampler,
        sigmas: tuple[float, ...] = (10.0, 8.0),
        cfg: float = 7.5,
        callback: Callable[..., None] | None = None,
    ) -> None:
        """The host's custom sampling; by default one step, where PAIntA is on."""
        comfy.sample.sample_custom(
            model,
            self.noise,
            cfg,
            sampler,
            torch.tensor(sigmas),
            self.sides[0],
            self.sides[1],
            self.latent,
            noise_mask=self.hole,
            callback=callback,
            disable_pbar=True,
            seed=0,
        )


def measure(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds and MiB of one step."""
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, memory.bytes / MIB


def compare(
    rows: Mapping[str, Callable[[], None]],
    rounds: int,
    warm_up: bool,
    device: torch.device,
    with_gradients: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Median time and memory of each row, and their ratios to the first. They run in turn, round by round; a warm-up counts
    for nothing. All but `with_gradients` run in inference mode, as in the host."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    memory: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(0 if warm_up else 1, rounds + 1):
        for name, step in rows.items():
            with torch.inference_mode(name not in with_gradients):
                taken, grown = measure(step, device)
            if round_ > 0:
                seconds[name].append(taken)
                memory[name].append(grown)
    first = next(iter(rows))
    to_seconds, to_memory = statistics.median(seconds[first]), statistics.median(memory[first])
    return [
        {
            "variant": name,
            "seconds": round(statistics.median(seconds[name]), 4),
            "time_ratio": round(statistics.median(seconds[name]) / to_seconds, 3),
            "memory_mib": round(statistics.median(memory[name]), 1),
            "memory_ratio": round(statistics.median(memory[name]) / to_memory, 3),
        }
        for name in rows
    ]


def show_head() -> None:
    """The head of a table of `show_row`."""
    print(f"{'pixels':>6}  {'variant':<22} {'seconds':>9} {'x plain':>8} {'MiB':>9} {'x plain':>8}", flush=True)


def show_row(size: int, row: Mapping[str, Any]) -> None:
    """A row of `compare` as text."""
    print(
        f"{size:>6}  {row['variant']:<22} {row['seconds']:>9.3f} {row['time_ratio']:>8.2f} "
        f"{row['memory_mib']:>9.0f} {row['memory_ratio']:>8.2f}",
        flush=True,
    )


def machine(device: torch.device) -> str:
    """What it ran on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
