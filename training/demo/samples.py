"""Grids of pictures to judge the models by, made without the host's sampling."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from PIL import Image, ImageDraw

from ..diffusion import ddim, flow_euler, guided
from ..world.scenes import make_scene
from ..world.triplets import make_triplet
from .dit import predict_flow
from .latents import GRID, as_pixels, latent_hole, with_hole
from .narrow_taesd import NarrowTAESD
from .networks import TextEncoder, predict_noise
from .vocabulary import Vocabulary

_LINE, _LETTERS = 12, 41
_AT_ONCE = 8


def as_picture(pixels: torch.Tensor) -> np.ndarray:
    """Pixels [3, H, W] in [0, 1] as uint8 [H, W, 3]."""
    return (pixels.float().clamp(0.0, 1.0) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def grid(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]]) -> Image.Image:
    """Pictures uint8 [H, W, 3] of one size in rows and columns, each with its caption below."""
    height, width = rows[0][0].shape[:2]
    lines = [[textwrap.wrap(caption, _LETTERS * width // 256) for caption in row] for row in captions]
    strip = _LINE * max(len(wrapped) for row in lines for wrapped in row) + 8
    canvas = Image.new("RGB", (width * max(map(len, rows)), (height + strip) * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            corner = (across * width, down * (height + strip))
            canvas.paste(Image.fromarray(picture), corner)
            for number, line in enumerate(lines[down][across]):
                pen.text((corner[0] + 4, corner[1] + height + 2 + number * _LINE), line, fill="black")
    return canvas


def world_grid(columns: int = 5, rows: int = 4, side: int = 160) -> Image.Image:
    """Scenes of the development split with their captions, `side` pixels wide each."""
    scenes = [[make_scene("dev", row * columns + column) for column in range(columns)] for row in range(rows)]
    pictures = [[np.asarray(Image.fromarray(scene.picture).resize((side, side))) for scene in row] for row in scenes]
    return grid(pictures, [[scene.global_caption for scene in row] for row in scenes])


@torch.no_grad()
def vae_grid(vae: NarrowTAESD, device: torch.device, count: int = 5) -> Image.Image:
    """Scenes, and below each what the autoencoder makes of it."""
    scenes = [make_scene("dev", index).picture for index in range(count)]
    made = vae.decode(vae.encode(as_pixels(np.stack(scenes)).to(device)))
    return grid([scenes, [as_picture(pixels) for pixels in made]], [["scene"] * count, ["decoded"] * count])


@torch.no_grad()
def sample(
    network: UNetModel | Flux,
    text: TextEncoder,
    vocabulary: Vocabulary,
    captions: Sequence[str],
    device: torch.device,
    known: torch.Tensor | None = None,
    scale: float = 4.0,
    steps: int = 30,
    seed: int = 0,
) -> torch.Tensor:
    """Latents [B, 4, 32, 32] for captions of the world; `known` [B, 5, 32, 32] is an inpainting UNet's mask and picture.

    The noise comes from the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), 4, GRID, GRID, generator=generator).to(device)
    empty = text(vocabulary.batch([""]).to(device))
    parts = []
    for first in range(0, len(captions), _AT_ONCE):
        rows = vocabulary.batch(captions[first : first + _AT_ONCE]).to(device)
        extra = None if known is None else known[first : first + _AT_ONCE].to(device).repeat(2, 1, 1, 1)

        def predict(x: torch.Tensor, times: torch.Tensor, context: torch.Tensor, extra=extra) -> torch.Tensor:
            if isinstance(network, Flux):
                return predict_flow(network, x, times, context)
            return predict_noise(network, x if extra is None else torch.cat([x, extra], dim=1), times, context)

        solve = flow_euler if isinstance(network, Flux) else ddim
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(solve(guided(predict, text(rows), empty, scale), noise[first : first + _AT_ONCE], steps))
    return torch.cat(parts)


@torch.no_grad()
def text2image_grid(
    network: UNetModel | Flux,
    text: TextEncoder,
    vae: NarrowTAESD,
    vocabulary: Vocabulary,
    device: torch.device,
    columns: int = 4,
    rows: int = 3,
    steps: int = 30,
) -> Image.Image:
    """Pictures for captions of the development split."""
    captions = [make_scene("dev", index).global_caption for index in range(columns * rows)]
    made = vae.decode(sample(network, text, vocabulary, captions, device, steps=steps))
    pictures = [as_picture(pixels) for pixels in made]
    starts = range(0, len(captions), columns)
    return grid([pictures[i : i + columns] for i in starts], [captions[i : i + columns] for i in starts])


@torch.no_grad()
def inpaint_grid(
    unet: UNetModel,
    text: TextEncoder,
    vae: NarrowTAESD,
    vocabulary: Vocabulary,
    device: torch.device,
    count: int = 5,
    steps: int = 30,
) -> Image.Image:
    """Triplets of the development split: the picture with its hole, and below it the filled one."""
    triplets = [make_triplet("dev", index) for index in range(count)]
    pixels = as_pixels(np.stack([triplet.scene.picture for triplet in triplets]))
    hole = torch.from_numpy(np.stack([triplet.hole for triplet in triplets])).float()[:, None]
    grey = with_hole(pixels, hole)
    known = torch.cat([latent_hole(hole), vae.encode(grey.to(device)).cpu()], dim=1)
    prompts = [triplet.prompt for triplet in triplets]
    made = vae.decode(sample(unet, text, vocabulary, prompts, device, known, steps=steps)).cpu()
    filled = torch.where(hole > 0, made, pixels)
    return grid(
        [[as_picture(picture) for picture in pictures] for pictures in (grey, filled)],
        [[triplet.kind for triplet in triplets], prompts],
    )
