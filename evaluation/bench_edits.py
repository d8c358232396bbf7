"""Edits that drift: how well Align Edit takes back what an edit model did to the whole picture.

A picture is changed in a disc of 5 to 40 % of it, then shifted by up to 4 pixels, scaled by up to 0.8 %, recolored (gains and
offsets of the channels, or a gamma) and saved as a JPEG. The truth is known. Pictures: the pack's photograph, and of ComfyUI's
templates those that look like one, where they are installed.

- off by: the largest error of place anywhere in the picture, in pixels; tone: the largest of the channels' mean errors where
  nothing changed, in levels of 255. Both of the edit once it has been aligned.
- touched: the share of the pixels farther than 24 from the change that are not the original's any more; by: their mean error in
  levels. missed: the share of the change that is not in the picture that comes out.

Beside it is what a graph without this node does: the edit as it is; the edit with the original's mean and deviation of each
channel (a usual color match); and the original with what differs by more than 25 levels from that, widened by 8 pixels.

    python dev.py bench edits [--pictures 6] [--edits 6] [--size 768] [--json FILE] [--grid FILE.jpg]
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ..imaging.edits import EditSettings, take_edit
from ..imaging.examples import FOLDER
from ..imaging.morphology import grow
from ..imaging.pictures import resampled
from .metrics import mean_interval
from .tables import show_table

AWAY = 24
_TEMPLATES = (
    "flux_fill_inpaint_example-1",
    "sd3.5_simple_example-1",
    "sdxl_simple_example-1",
    "flux_schnell-1",
    "sdxl_refiner_prompt_example-1",
)
METHODS = ("the edit", "color match", "difference mask", "Align Edit")


@dataclass(frozen=True, eq=False)
class Case:
    """An original and its edit, [3, H, W], what was changed of the original, bool [H, W], and where its pixels went."""

    original: torch.Tensor
    edited: torch.Tensor
    changed: torch.Tensor
    scale: tuple[float, float]
    shift: tuple[float, float]


def load_pictures(count: int, size: int) -> list[torch.Tensor]:
    """[3, h, w] in [0, 1], `size` pixels along the longer side."""
    paths = [FOLDER / "coffee.png"]
    try:
        templates = Path(str(files("comfyui_workflow_templates_media_image"))) / "templates"
        paths += [templates / f"{name}.webp" for name in _TEMPLATES]
    except ModuleNotFoundError:
        pass
    found: list[torch.Tensor] = []
    for path in paths[:count]:
        picture = np.asarray(Image.open(path).convert("RGB"))
        planes = torch.from_numpy(picture.copy()).movedim(-1, 0).float() / 255
        ratio = size / max(planes.shape[-2:])
        sides = (round(planes.shape[-2] * ratio), round(planes.shape[-1] * ratio))
        found.append(resampled(planes[None], sides, "bicubic")[0].clamp(0.0, 1.0))
    return found


def drifted(original: torch.Tensor, other: torch.Tensor, seed: int) -> Case:
    """An edit with `other` in a disc."""
    random = np.random.default_rng(seed)
    height, width = original.shape[-2:]
    rows, columns = np.mgrid[:height, :width]
    share = random.uniform(0.05, 0.4)
    centre = random.uniform(0.4, 0.6, 2) * (height, width)
    inside = torch.from_numpy((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < share * height * width / np.pi)
    replaced = torch.where(inside, resampled(other[None], (height, width), "bicubic")[0].clamp(0.0, 1.0), original)
    scale = (1.0 + random.uniform(-0.008, 0.008), 1.0 + random.uniform(-0.008, 0.008))
    shift = (2.0 * random.uniform(-4.0, 4.0) / width, 2.0 * random.uniform(-4.0, 4.0) / height)
    at = [
        (((2.0 * np.arange(side) + 1.0) / side - 1.0 - b) / a * side + side - 1.0) / 2.0
        for side, a, b in ((height, scale[1], shift[1]), (width, scale[0], shift[0]))
    ]
    grid = np.meshgrid(*at, indexing="ij")
    moved = np.stack([ndimage.map_coordinates(of, grid, order=5, mode="mirror") for of in replaced.double().numpy()])
    moved = moved.clip(0.0, 1.0)
    if seed % 2:
        moved = moved ** random.uniform(0.9, 1.12)
    else:
        moved = moved * random.uniform(0.92, 1.05, (3, 1, 1)) + random.uniform(-0.03, 0.03, (3, 1, 1))
    file = io.BytesIO()
    values = (moved.clip(0.0, 1.0) * 255).round().astype(np.uint8)
    Image.fromarray(values.transpose(1, 2, 0)).save(file, "JPEG", quality=92)
    edited = torch.from_numpy(np.asarray(Image.open(file)).copy()).movedim(-1, 0).float() / 255
    return Case(original, edited, inside, scale, shift)


def color_matched(edited: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The original's mean and deviation of each channel."""
    of, to = edited.flatten(1), original.flatten(1)
    gain = to.std(dim=1, keepdim=True) / of.std(dim=1, keepdim=True).clamp_min(1e-6)
    return ((of - of.mean(dim=1, keepdim=True)) * gain + to.mean(dim=1, keepdim=True)).clamp(0, 1).view_as(edited)


def measure(case: Case) -> Iterator[tuple[str, dict[str, float], torch.Tensor]]:
    """The figures of each method, and its picture."""
    far = ~(grow(case.changed.float(), AWAY)[0, 0] > 0)
    matched = color_matched(case.edited, case.original)
    differs = (matched - case.original).abs().amax(dim=0) > 25 / 255
    usual = grow(differs.float(), 8)[0, 0] > 0
    for method in METHODS:
        figures: dict[str, float] = {}
        taken = torch.ones_like(case.changed)
        started = time.monotonic()
        if method == "Align Edit":
            edit = take_edit(case.original, case.edited, settings=EditSettings())
            picture, taken = edit.composite, edit.mask > 0
            if edit.alignment is not None:
                errors = [
                    (abs(found - true) + abs(moved - truly)) * side / 2
                    for found, true, moved, truly, side in zip(
                        edit.alignment.scale,
                        case.scale,
                        edit.alignment.shift,
                        case.shift,
                        case.original.shape[:0:-1],
                        strict=True,
                    )
                ]
                off = (edit.aligned - case.original)[:, far].mean(dim=1).abs().max()
                figures |= {"off by": max(errors), "tone": 255 * float(off)}
        elif method == "difference mask":
            picture, taken = torch.where(usual, matched, case.original), usual
        else:
            picture = case.edited if method == "the edit" else matched
        error = (picture - case.original).abs().mean(dim=0)[far] * 255
        figures |= {
            "touched": 100 * float((error > 0).float().mean()),
            "by": float(error.mean()),
            "missed": 100 * float((case.changed & ~taken).sum() / case.changed.sum()),
            "seconds": time.monotonic() - started,
        }
        yield method, figures, picture


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="dev.py bench edits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=6, help="how many (default: 6)")
    parser.add_argument("--edits", type=int, default=6, help="of each (default: 6)")
    parser.add_argument("--size", type=int, default=768, help="pixels along the longer side (default: 768)")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    parser.add_argument("--grid", type=Path, help="write pictures: original, edit, and what each method makes of it")
    options = parser.parse_args()
    pictures = load_pictures(options.pictures, options.size)
    print(f"{platform.machine()}, torch {torch.__version__}; {len(pictures)} pictures, {options.edits} edits of each")
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    shown = []
    for number, original in enumerate(pictures):
        for turn in range(options.edits):
            case = drifted(original, pictures[(number + 1) % len(pictures)].flip(-1), 100 * number + turn)
            planes = [case.original, case.edited]
            for method, figures, picture in measure(case):
                found[method].append(figures)
                planes += [picture] if method != "the edit" else []
            if turn == 0:
                shown.append(torch.cat([resampled(of[None], (256, 256), "bicubic")[0] for of in planes], dim=2))
    names = ("off by", "tone", "touched", "by", "missed", "seconds")
    rows: list[dict[str, Any]] = []
    for method, of in found.items():
        row: dict[str, Any] = {"method": method, "n": len(of)}
        for name in names:
            values = [figures[name] for figures in of if name in figures]
            row[name] = "{:.2f} ({:.2f} to {:.2f})".format(*mean_interval(values)) if values else ""
        worst = [figures["off by"] for figures in of if "off by" in figures]
        row["off by, most"] = f"{max(worst):.3f}" if worst else ""
        rows.append(row)
    show_table("Shares are in percent; means and their 95 % intervals.", rows)
    if options.json:
        options.json.write_text(json.dumps(found))
    if options.grid:
        grid = (torch.cat(shown, dim=1).clamp(0, 1).movedim(0, -1).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(grid).save(options.grid, optimize=True, quality=88)
    return 0
