"""Photographs and published weights: what the nodes make of real pictures, with Real-ESRGAN and the masks of real objects.

Nothing of this ships with the pack: weights and photographs come from package indexes (`photo_weights`). Errors are in levels of
255; outside is how many pixels outside of the mask Compare finds changed, and by how much at most. Seam is by how much the
picture is steeper or flatter across the hole's edge than the true one (`seam_visibility`, without its sign).

Upscale: an ellipse of a quarter of a photograph is made anew from the photograph at a quarter of its size, and should be as it
was. Error and detail (the energy of the gradients; 1 is the photograph's) are of the ellipse, the seam of the ellipse widened by
`expand`. Tiles are the host's, as it takes them where memory is short.

Large: the same with squares of 2048 and 4096 pixels, which photographs and their mirror images fill, so that they are as sharp as
they were; ellipses of a quarter and of a hundredth. The node enlarges what is around the hole, in the host's tiles where that has
more than 512 pixels. "all at once" enlarges all of the small picture without tiles; the difference between the two is of the
widened ellipse. MiB is by how much the process grows.

Objects: the object of a photograph, half as large, is pasted into it somewhere else, and all of it has a tone that isn't the
photograph's, as if a model had made it. What has to come out is the same in the photograph's tone. The hole ends 16 pixels from
the object, hard or feathered by 8, or is tight around it. Fills are compared with the photograph in a hole of the object's shape
somewhere else; "of the object" is by how much a fill changes at the object's own place where the object's colors are inverted,
with a hole where the mask is above one half, and with one 8 pixels larger.

    python dev.py bench photos [--parts upscale large objects] [--photographs cat] [--sides 2048] [--json FILE] [--grid FILE.png]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import numpy as np
import spandrel
import torch
import torch.nn.functional as F
from PIL import Image

from devtools import program

from ..imaging.compare import compare
from ..imaging.fill import Fill, fill_hole
from ..imaging.harmonize import ONLY_BLEND, POISSON, Harmony, harmonize
from ..imaging.masks import as_mask_batch
from ..imaging.morphology import feather, grow
from ..imaging.pictures import resampled
from ..imaging.region import crop, place, stitch
from ..imaging.region_plan import RegionSettings
from ..imaging.super_resolution import widened
from ..model_patches.hd_painter.super_resolution import Layout, upscale_hole
from .memory import PeakMemory
from .metrics import seam_visibility
from .photo_weights import PHOTOGRAPHS, ObjectMasks, photograph, real_esrgan
from .tables import show_table

PARTS = ("upscale", "large", "objects")
FACTOR = 4
LAYOUT = Layout()
TILE, TILE_OVERLAP, TILED_SIDE = 128, 32, 160
"""The host's smallest tile and its overlap, and the side of a picture that needs four of them."""
SHARE, SMALL_SHARE = 0.25, 0.01
"""Of a picture, what a hole takes."""
PLACES = 2
MARGIN, FEATHER = 16, 8
HARMONIES = {
    "off": ONLY_BLEND,
    "color": Harmony("color"),
    "color, covariance": Harmony("color", "covariance"),
    "poisson": POISSON,
    "both": Harmony("both"),
    "both, covariance": Harmony("both", "covariance"),
}
CELL = 256


def outside(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """What Compare says of [1, 3, H, W] outside of a mask."""
    _, (figures,) = compare(before.movedim(1, -1), after.movedim(1, -1), mask)
    return {"outside": figures.outside.changed, "outside, most": figures.outside.maximum}


def error(result: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor) -> float:
    """The mean absolute difference where the mask [1, 1, H, W] isn't 0, in levels."""
    return 255 * float((result - truth).abs()[(inside > 0).expand_as(truth)].mean())


def seam(result: torch.Tensor, truth: torch.Tensor, hole: torch.Tensor) -> float:
    """The hole's edge in levels, 0 where it can't be seen."""
    return abs(float(seam_visibility(result, truth, (hole > 0).float())))


def detail(result: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor) -> float:
    """The energy of the gradients between pixels that the mask [1, 1, H, W] marks with 1, as a ratio to the truth's."""

    def energy(pixels: torch.Tensor) -> float:
        total = 0.0
        for axis in (2, 3):
            count = inside.shape[axis] - 1
            pairs = inside.narrow(axis, 0, count) * inside.narrow(axis, 1, count)
            total += float((pixels.diff(dim=axis).square() * pairs).sum())
        return total

    return energy(result) / energy(truth)


def ellipse(height: int, width: int, share: float = SHARE) -> torch.Tensor:
    """An ellipse of so much of a picture, [1, 1, H, W] of 0 and 1."""
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return (rows**2 + columns**2 <= 4 * share / np.pi).float()[None, None]


def upscale_model() -> Any:
    """Real-ESRGAN as the host's Load Upscale Model makes it."""
    found: Any = spandrel.ModelLoader().load_from_state_dict(real_esrgan()).eval()
    found.patcher = comfy.model_patcher.CoreModelPatcher(
        found.model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return found


def cut_to_multiples(picture: torch.Tensor) -> torch.Tensor:
    """A photograph [3, H, W] as [1, 3, h, w] with sides of whole multiples of 4."""
    height, width = (side // FACTOR * FACTOR for side in picture.shape[-2:])
    return picture[None, :, :height, :width]


def mirrored_to(picture: torch.Tensor, side: int) -> torch.Tensor:
    """A square [1, 3, side, side] of a photograph [3, H, W] and its mirror images, edge pixels not repeated."""
    for axis in (1, 2):
        last = picture.shape[axis] - 1
        picture = picture.index_select(axis, last - (torch.arange(side) % (2 * last) - last).abs())
    return picture[None]


def upscaled(
    name: str, truth: torch.Tensor, model: Any, harmony: Harmony, share: float = SHARE, at_once: bool = False
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """The figures of a photograph [1, 3, H, W] and the picture: bicubic, by the node and, if asked for, `at_once`."""
    height, width = truth.shape[-2:]
    hole = ellipse(height, width, share)
    made_anew = widened(hole, LAYOUT.expand)[:, None]
    low = resampled(truth, (height // FACTOR, width // FACTOR), "bicubic").clamp(0.0, 1.0)
    # The nodes get a picture whose hole shows nothing of the truth.
    emptied = torch.where(made_anew > 0, 0.5, truth)
    device = comfy.model_management.get_torch_device()

    def bicubic() -> torch.Tensor:
        return harmonize(resampled(low, (height, width), "bicubic").clamp(0.0, 1.0), emptied, made_anew, harmony)

    def by_the_node() -> torch.Tensor:
        pictures = (emptied.movedim(1, -1), low.movedim(1, -1))
        return upscale_hole(*pictures, hole, None, model, layout=LAYOUT, harmony=harmony).movedim(-1, 1)

    def all_at_once() -> torch.Tensor:
        comfy.model_management.load_models_gpu([model.patcher])
        large = model(low.to(device)).clamp(0.0, 1.0).to(low)
        return harmonize(large, emptied, made_anew, harmony)

    methods = {"bicubic": bicubic, "Real-ESRGAN": by_the_node} | ({"all at once": all_at_once} if at_once else {})
    results: dict[str, torch.Tensor] = {}
    seconds: dict[str, float] = {}
    for method, make in methods.items():
        with PeakMemory(device) as memory:
            started = time.perf_counter()
            result = results[method] = make()
            seconds[method] = time.perf_counter() - started
        row: dict[str, Any] = {"photograph": name, "size": f"{width}x{height}", "hole": share, "method": method}
        row |= {"harmonize": harmony.mode, "seam": seam(result, truth, made_anew)}
        row |= {"detail": detail(result, truth, hole), "error": error(result, truth, hole)}
        row |= outside(truth, result, made_anew)
        row |= {"seconds": seconds[method], "x bicubic": seconds[method] / seconds["bicubic"]}
        row |= {"MiB": memory.bytes / 2**20}
        if method == "all at once":
            difference = 255 * (result - results["Real-ESRGAN"]).abs()
            row |= {"difference": error(result, results["Real-ESRGAN"], made_anew), "at most": float(difference.max())}
        yield row, result


def tiled(name: str, picture: torch.Tensor, model: Any) -> dict[str, Any]:
    """A part of a photograph enlarged in tiles against the same part enlarged at once."""
    height, width = picture.shape[-2:]
    side = min(TILED_SIDE, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    part = picture[None, :, top : top + side, left : left + side].to(comfy.model_management.get_torch_device())
    comfy.model_management.load_models_gpu([model.patcher])
    found, seconds = [], []
    for tile in (side, TILE):
        started = time.perf_counter()
        large = comfy.utils.tiled_scale(part, model, tile, tile, TILE_OVERLAP, FACTOR)
        seconds.append(time.perf_counter() - started)
        found.append(large.clamp(0.0, 1.0))
    difference = 255 * (found[1] - found[0]).abs()
    return {
        "photograph": name,
        "from": f"{side}x{side}",
        "tiles": comfy.utils.get_tiled_scale_steps(side, side, TILE, TILE, TILE_OVERLAP),
        "difference, most": float(difference.max()),
        "difference, mean": float(difference.mean()),
        "seconds": seconds[1],
        "x at once": seconds[1] / seconds[0],
    }


@dataclass(frozen=True, eq=False)
class Pasted:
    """A photograph [1, 3, H, W], the same with its object once more, half as large, and where that is: [1, 1, H, W] in [0, 1]."""

    scene: torch.Tensor
    wanted: torch.Tensor
    weight: torch.Tensor


def pasted(scene: torch.Tensor, mask: torch.Tensor, seed: int) -> Pasted:
    """The object that the mask [1, 1, H, W] marks in a photograph [1, 3, H, W], pasted at a place that the seed says."""
    height, width = scene.shape[-2:]
    size = (height // 2, width // 2)
    patch = resampled(scene, size, "bicubic").clamp(0.0, 1.0)
    weight = as_mask_batch(resampled(mask, size, "bilinear"))
    random = np.random.default_rng(seed)
    top, left = (int(random.integers(0, length - part + 1)) for length, part in zip((height, width), size, strict=True))
    around = (left, width - size[1] - left, top, height - size[0] - top)
    patch, weight = F.pad(patch, around), F.pad(weight, around)
    return Pasted(scene, torch.where(weight > 0, torch.lerp(scene, patch, weight), scene), weight)


def tones(picture: torch.Tensor) -> dict[str, torch.Tensor]:
    """A picture [1, 3, H, W] in tones as models return them."""
    tint = torch.tensor([1.0, -0.6, 0.4])[:, None, None] * (12 / 255)
    ramp = torch.linspace(-1, 1, picture.shape[-1])
    made = {
        "as it was": picture,
        "offset": picture + tint,
        "ramp": picture + tint * ramp,
        "gamma": picture**1.12,
        "contrast": 0.9 * (picture - 0.5) + 0.5 + tint / 2,
    }
    return {name: of.clamp(0.0, 1.0) for name, of in made.items()}


def harmonized(case: Pasted) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """The figures of each tone and each way to harmonize, and the picture."""
    tight = (case.weight > 0).float()
    hole = grow(tight, MARGIN)
    soft = as_mask_batch(feather(hole, FEATHER, "outside", "smooth"))
    for tone, made in tones(case.wanted).items():
        for name, harmony in HARMONIES.items():
            result = harmonize(made, case.scene, hole, harmony)
            feathered, close = (harmonize(made, case.scene, mask, harmony) for mask in (soft, tight))
            row = {"tone": tone, "harmonize": name, "seam": seam(result, case.wanted, hole)}
            row |= {"error": error(result, case.wanted, hole), "feathered: error": error(feathered, case.wanted, soft)}
            row |= {"tight: seam": seam(close, case.wanted, tight), "tight: error": error(close, case.wanted, tight)}
            yield row | outside(case.scene, result, hole), result


def cropped(scene: torch.Tensor, mask: torch.Tensor) -> Iterator[dict[str, Any]]:
    """The figures of a crop around an object that is stitched back as it is, and of one that is laid over the photograph."""
    picture, hole = scene.movedim(1, -1).contiguous(), (mask > 0.5).float()
    for native in (512, 768, 1024):
        crops, _, region = crop(picture, hole, RegionSettings(native_size=native), feather=16)
        result = stitch(region, crops).movedim(-1, 1)
        weight = region.mask[:, None]
        beside = outside(scene, place(region, crops).movedim(-1, 1), weight)
        yield {
            "model": native,
            "scale": float(max(region.plan.scale)),
            **outside(scene, result, weight),
            "seam": seam(result, scene, weight),
            "inside": error(result, scene, weight),
            "laid over: outside": beside["outside"],
            "laid over: most": beside["outside, most"],
        }


def filled(case: Pasted, mask: torch.Tensor) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """The figures of each fill and what it makes of the object's own place; `mask` is the object's, [1, 1, H, W]."""
    scene, elsewhere = case.scene, (case.weight > 0.5).float()
    exact = (mask > 0.5).float()
    larger = grow(exact, 8)
    inverted = torch.lerp(scene, 1.0 - scene, mask)
    for method in get_args(Fill):
        started = time.perf_counter()
        result = fill_hole(scene, elsewhere, method)
        seconds = time.perf_counter() - started
        row = {"fill": method, "seam": seam(result, scene, elsewhere), "error": error(result, scene, elsewhere)}
        difference = (result - scene).masked_select(elsewhere > 0).reshape(3, -1)
        row["mean color"] = 255 * float(difference.mean(dim=1).abs().mean())
        removed = fill_hole(scene, larger, method)
        row["of the object"] = error(fill_hole(inverted, exact, method), fill_hole(scene, exact, method), exact)
        row["8 px larger"] = error(fill_hole(inverted, larger, method), removed, exact)
        yield row | {"seconds": seconds}, removed


def means(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The mean of rows that agree in `keys`, and of what is outside the sum of the pixels and the largest error."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for group in groups.values():
        of: dict[str, Any] = {key: group[0][key] for key in keys} | {"n": len(group)}
        for name in group[0]:
            values = [row[name] for row in group]
            if name.endswith("outside"):
                of[name] = sum(values)
            elif name.endswith("most"):
                of[name] = max(values)
            elif isinstance(values[0], float):
                of[name] = statistics.fmean(values)
        found.append(of)
    return found


def write_grid(path: Path, rows: Sequence[Sequence[torch.Tensor]]) -> None:
    """Pictures [3, H, W] in rows, each in a square cell; a PNG file."""
    columns = max(len(row) for row in rows)
    cells = [[resampled(of[None], (CELL, CELL), "bicubic")[0] for of in row] for row in rows]
    empty = torch.ones(3, CELL, CELL)
    lines = [torch.cat([*row, *[empty] * (columns - len(row))], dim=2) for row in cells]
    planes = (torch.cat(lines, dim=1).clamp(0, 1).movedim(0, -1).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(planes).save(path, optimize=True)


def middle(picture: torch.Tensor, along: float = 0.5) -> torch.Tensor:
    """A cell of the grid from the middle of a picture [1, 3, H, W], or from so far along its width: [3, h, w]."""
    height, width = picture.shape[-2:]
    top, left = max(0, (height - CELL) // 2), int(along * width) - CELL // 2
    left = max(0, min(left, width - CELL))
    return picture[0, :, top : top + CELL, left : left + CELL]


def measure_upscale(names: Sequence[str], grid: list[list[torch.Tensor]]) -> dict[str, Any]:
    """The rows of the first part, printed."""
    photographs, model = {name: photograph(name) for name in names}, upscale_model()
    rows = []
    for name, picture in photographs.items():
        truth = cut_to_multiples(picture)
        for harmony in (POISSON, ONLY_BLEND):
            shown = [middle(truth)]
            for row, result in upscaled(name, truth, model, harmony):
                rows.append(row)
                shown.append(middle(result))
            grid += [shown] if harmony is POISSON else []
    show_table("Upscale Inpainted: a quarter of the photograph from one of a quarter of its size", rows)
    show_table("The same, means", means(rows, "method", "harmonize"))
    found = {"upscale": rows, "tiles": [tiled(name, picture, model) for name, picture in photographs.items()]}
    show_table(f"Real-ESRGAN in tiles of {TILE} pixels that share {TILE_OVERLAP}, against all at once", found["tiles"])
    return found


def measure_large(
    names: Sequence[str], sides: Sequence[int], at_once: int, grid: list[list[torch.Tensor]]
) -> dict[str, Any]:
    """The rows of the second part, printed; small pictures of up to `at_once` pixels along a side are also enlarged at once."""
    model, rows = upscale_model(), []
    for side in sides:
        for share in (SHARE, SMALL_SHARE):
            for name in names:
                truth = mirrored_to(photograph(name), side // FACTOR * FACTOR)
                edge = 0.5 + (share / np.pi) ** 0.5
                shown = [middle(truth), middle(truth, edge)]
                for row, result in upscaled(name, truth, model, POISSON, share, side // FACTOR <= at_once):
                    rows.append(row)
                    # An hour's work: what has been found is not lost with what comes later.
                    print(json.dumps(row), flush=True)
                    shown += [middle(result), middle(result, edge)]
                grid.append(shown)
    show_table("Upscale Inpainted on large pictures, photographs mirrored", rows)
    show_table("The same, means", means(rows, "size", "hole", "method"))
    return {"large": rows}


def measure_objects(
    names: Sequence[str], masks_of: Callable[[torch.Tensor], torch.Tensor], grid: list[list[torch.Tensor]]
) -> dict[str, Any]:
    """The rows of the second part, printed."""
    found: dict[str, list[dict[str, Any]]] = {"harmonize": [], "crop": [], "fill": []}
    for name in names:
        picture = photograph(name)
        scene, mask = picture[None], masks_of(picture)
        found["crop"] += [{"photograph": name} | row for row in cropped(scene, mask)]
        for number in range(PLACES):
            case = pasted(scene, mask, number)
            shown = [picture, mask[0].expand_as(picture), case.wanted[0]]
            for row, result in harmonized(case):
                found["harmonize"].append({"photograph": name, "place": number} | row)
                shown += [result[0]] if row["tone"] == "offset" else []
            fills = [picture]
            for row, result in filled(case, mask):
                found["fill"].append({"photograph": name, "place": number} | row)
                fills.append(result[0])
            grid += [shown, fills] if number == 0 else []
    show_table(
        f"Harmonize: an object pasted in another tone, {MARGIN} pixels of context in the hole",
        means(found["harmonize"], "tone", "harmonize"),
    )
    show_table("Crop Region and Stitch Region without a change, feather 16", found["crop"])
    show_table("Fill Hole", means(found["fill"], "fill"))
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="dev.py bench photos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["upscale", "objects"], help="default: upscale objects"
    )
    parser.add_argument("--photographs", nargs="+", choices=tuple(PHOTOGRAPHS), default=list(PHOTOGRAPHS))
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=[2048, 4096],
        metavar="PIXELS",
        help="of the part large (default: 2048 4096)",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=512,
        metavar="PIXELS",
        help="the largest side of a small picture that is also enlarged all at once (default: 512; memory grows with its area)",
    )
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    parser.add_argument("--grid", type=Path, help="write pictures to look at")
    options = parser.parse_args()

    def work() -> int:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
        print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
        started, found, grid = time.perf_counter(), {}, []
        # First, since it may have to say that something is missing.
        masks_of = ObjectMasks() if "objects" in options.parts else None
        with torch.inference_mode():
            if "upscale" in options.parts:
                found |= measure_upscale(options.photographs, grid)
            if "large" in options.parts:
                found |= measure_large(options.photographs, options.sides, options.at_once, grid)
            if masks_of is not None:
                found |= measure_objects(options.photographs, masks_of, grid)
        print(f"\n{time.perf_counter() - started:.0f} seconds")
        if options.json:
            options.json.write_text(json.dumps(found))
        if options.grid:
            write_grid(options.grid, grid)
        return 0

    return program.run(work)
