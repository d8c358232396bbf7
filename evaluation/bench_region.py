"""Cropping, stitching, masks and harmonizing: what they change, how visible the seam is, and how long they take.

Errors are in levels of 255, distances in pixels. The baselines are what a graph without these nodes does: a plain composite, a
square dilation for growing (MaskEditor-style "expand"), and a crop that is always resampled. Pictures are synthetic: noise of
several scales, and fills whose tone is shifted by a constant, along a ramp, or with a texture of its own.

Memory is the host's own estimate for Stable Diffusion's x4 upscaler, in its real shapes.

    python dev.py bench region [--sizes 512 2048] [--batch 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import comfy.ldm.models.autoencoder
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
import torch.nn.functional as F

from ..imaging import morphology
from ..imaging.color import match_color
from ..imaging.fill import fill_hole
from ..imaging.harmonize import Harmony, Mode, harmonize
from ..imaging.poisson import poisson_blend
from ..imaging.region import crop, stitch
from ..imaging.region_plan import RegionSettings
from ..model_patches.hd_painter import super_resolution
from .full_size import X4, X4_VAE
from .metrics import background_error, seam_visibility
from .tables import show_table

QUALITY_SIZE = 512


def texture(size: int, seed: int, batch: int = 1) -> torch.Tensor:
    """Noise of several scales around a mid tone: [B, 3, size, size] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.full((batch, 3, size, size), 0.5)
    for cells in (4, 16, 64):
        noise = torch.randn(batch, 3, cells, cells, generator=generator)
        total += 0.06 * F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
    return total.clamp(0.1, 0.9)


def blob(size: int, batch: int = 1) -> torch.Tensor:
    """An irregular hole of about a quarter of the picture: [B, 1, size, size]."""
    generator = torch.Generator().manual_seed(7)
    field = F.interpolate(torch.randn(batch, 1, 6, 6, generator=generator), size=(size, size), mode="bicubic")
    line = torch.linspace(-1, 1, size)
    field = field - 2.5 * (line[:, None] ** 2 + line[None, :] ** 2)
    return (
        (field > field.flatten(1).quantile(0.75, dim=1)[:, None, None, None]).float()
        if size <= 1024
        else (F.interpolate(blob(1024, batch), size=(size, size), mode="nearest"))
    )


def shifts(size: int) -> dict[str, torch.Tensor]:
    """Tone shifts of a fill: [1, 3, size, size], about ten levels."""
    ramp = torch.linspace(-1, 1, size)
    tint = torch.tensor([1.0, -0.6, 0.4])[:, None, None] * (12 / 255)
    return {
        "constant": tint.expand(1, 3, size, size),
        "linear": (tint * ramp).expand(1, 3, size, size),
        "texture": 0.5 * (texture(size, 5) - 0.5),
    }


def quality() -> list[dict[str, Any]]:
    """Seam, error inside and error outside for each tone shift and each way to finish."""
    scene, hole = texture(QUALITY_SIZE, 1), blob(QUALITY_SIZE)
    content = torch.where(hole > 0, texture(QUALITY_SIZE, 2) * 0.5 + scene * 0.5, scene)
    # The wanted fill meets the scene at its edge: what is left there is the shift's doing.
    wanted = poisson_blend(content, scene, hole)
    inside = (hole > 0).expand_as(scene)
    rows = []
    for shift, amount in shifts(QUALITY_SIZE).items():
        made = (wanted + amount).clamp(0.0, 1.0)
        for mode in get_args(Mode):
            result = harmonize(made, scene, hole, Harmony(mode))
            rows.append(
                {
                    "shift": shift,
                    "harmonize": mode,
                    "seam": float(seam_visibility(result, wanted, hole)),
                    "inside_error": 255 * float((result - wanted).abs()[inside].mean()),
                    "outside_max_error": background_error(result, scene, hole),
                }
            )
    return rows


def identity() -> list[dict[str, Any]]:
    """Crop and stitch without a change: the greatest error in the picture, against a crop that is always resampled."""
    scene = texture(600, 3).movedim(1, -1)
    rows = []
    for side, native in ((510, 512), (250, 512), (590, 512)):
        hole = torch.zeros(1, 600, 600)
        middle = slice(300 - side // 4, 300 + side // 4)
        hole[:, middle, middle] = 1.0
        crops, _, place = crop(scene, hole, RegionSettings(native_size=native, context_percent=50.0))
        ours = stitch(place, crops)
        box = place.plan.boxes[0]
        part = scene[:, box.top : box.bottom, box.left : box.right].movedim(-1, 1)
        there = F.interpolate(part, size=(native, native), mode="bicubic", antialias=True)
        back = F.interpolate(there, size=part.shape[-2:], mode="bicubic", antialias=True)
        rows.append(
            {
                "region": side,
                "scale": [round(float(value), 3) for value in place.plan.scale],
                "max_error": 255 * float((ours - scene).abs().max()),
                "resampled_max_error": 255 * float((back - part).abs().max()),
                "outside_max_error": 255 * float((ours - scene)[hole == 0].abs().max()),
            }
        )
    return rows


def growth() -> list[dict[str, Any]]:
    """How far a disc's edge moves, along the axes and across, when it is grown: ours and a square dilation."""
    line = torch.arange(401) - 200.0
    disc = (line[:, None] ** 2 + line[None, :] ** 2 <= 60**2).float()[None, None]
    rows = []
    for pixels in (4, 16, 64):
        square = F.max_pool2d(disc, 2 * pixels + 1, 1, pixels)
        for name, grown in (("ours", morphology.grow(disc, pixels)), ("square", square)):
            along = float(grown[0, 0, 200, 200:].sum()) - float(disc[0, 0, 200, 200:].sum())
            diagonal = grown[0, 0].diagonal()[200:].sum() - disc[0, 0].diagonal()[200:].sum()
            rows.append({"pixels": pixels, "method": name, "along": along, "diagonal": float(diagonal) * 2**0.5})
    return rows


def timed(work: Callable[[], Any], rounds: int) -> float:
    """Median seconds, after one run that does not count."""
    seconds = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def speed(sizes: list[int], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of each operation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for size in sizes:
        scene, made, hole = (
            part.to(device) for part in (texture(size, 1, batch), texture(size, 2, batch), blob(size, batch))
        )
        image, mask = scene.movedim(1, -1).contiguous(), hole[:, 0]
        settings = RegionSettings(native_size=512)
        crops, _, place = crop(image, mask, settings)
        work: dict[str, Callable[[], Any]] = {
            "copy": scene.clone,
            "grow 16": partial(morphology.grow, hole, 16),
            "feather 16": partial(morphology.feather, hole, 16, "outside", "smooth"),
            "crop": partial(crop, image, mask, settings),
            "stitch": partial(stitch, place, crops),
            "fill blurred": partial(fill_hole, scene, hole, "blurred"),
            "color": partial(match_color, made, scene, hole),
            "poisson": partial(poisson_blend, made, scene, hole),
        }
        rows += [
            {"size": size, "batch": batch, "operation": name, "seconds": timed(function, rounds)}
            for name, function in work.items()
        ]
    return rows


def upscaler_memory(tiles: tuple[int, ...] = (512, 768, 1024, 2048)) -> list[dict[str, Any]]:
    """GiB that the x4 upscaler takes in half precision, weights included, by the side of a tile in pixels.

    By the host's formulas; the one for decoding counts 64 pixels for each cell of a latent, of which this VAE has 16.
    """
    config = comfy.supported_models.SD_X4Upscaler(dict(X4))
    config.set_inference_dtype(torch.float16, None)
    cpu = torch.device("cpu")
    unet = comfy.model_patcher.ModelPatcher(config.get_model({}, device=torch.device("meta")), cpu, cpu)
    network = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=X4_VAE, embed_dim=4)
    vae = comfy.sd.VAE(sd=network.state_dict(), dtype=torch.float16)
    diffusion = super_resolution.Diffusion(model=unet, positive=None, negative=None, vae=vae)
    engine = super_resolution.X4(diffusion, super_resolution.UpscaleSampling())
    rows = []
    for side in tiles:
        sampling, decoding = engine.memory(side // engine.factor, side // engine.factor)
        rows.append({"tile": side, "sampling": sampling / 2**30, "decoding": decoding / 2**30})
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python dev.py bench region", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048], help="default: 512 2048")
    parser.add_argument("--batch", type=int, default=1, help="default: 1")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    machine = f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(machine)
    results = {"harmonize": quality(), "identity": identity(), "grow": growth()}
    show_table(f"Tone shifts of a fill, {QUALITY_SIZE} px (levels of 255; seam 0 can't be seen)", results["harmonize"])
    show_table("Crop and stitch without a change (levels of 255)", results["identity"])
    show_table("Growing a disc (pixels that its edge moves)", results["grow"])
    results["memory"] = upscaler_memory()
    show_table(
        "Upscale Inpainted with the x4 upscaler (GiB, the host's estimate on this machine, half precision)",
        results["memory"],
    )
    results["speed"] = speed(options.sizes, options.batch, options.rounds)
    show_table("Seconds", results["speed"])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, **results}, indent=1))
