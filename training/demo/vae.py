"""Stage 1: the autoencoder.

The loss is the mean absolute error of the pixels and of their differences to the next pixel. The second term is what keeps
edges sharp: flat colours and hard outlines make up this world, so that a perceptual network (which could not be downloaded
anyway) has nothing to add but texture. Latents are pushed towards mean 0 and variance 1, the scale the UNet works in, and get
a little noise before they are decoded, so that a sampler's small errors stay invisible.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..loop import Batch, Task, step_seed
from ..world.attributes import SIZE
from ..world.scenes import make_scene
from .latents import as_pixels
from .narrow_taesd import NarrowTAESD

_CROP = 96
_SCENES = 1_000_000
_EDGES, _SCALE, _NOISE = 0.5, 0.02, 0.1


def _edge_error(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    error = made - real
    across = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return across + down


class VaeTask(Task):
    """Trains a NarrowTAESD on crops of 96 pixels."""

    name = "vae"

    def __init__(self, seed: int) -> None:
        self.vae = NarrowTAESD(seed)
        self.networks = nn.ModuleDict({"vae": self.vae})

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        crops = []
        for index in rng.integers(_SCENES, size=size):
            top, left = rng.integers(SIZE - _CROP + 1, size=2)
            crops.append(make_scene("train", int(index)).picture[top : top + _CROP, left : left + _CROP])
        return {"pixels": as_pixels(np.stack(crops))}

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        pixels = batch["pixels"]
        latents = self.vae.encode(pixels).float()
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        made = self.vae.decode(latents + _NOISE * noise).float()
        pixel_error, edge_error = (made - pixels).abs().mean(), _edge_error(made, pixels)
        mean = latents.mean(dim=(0, 2, 3))
        std = latents.std(dim=(0, 2, 3)) + 1e-4
        scale = (mean.square() + std.log().square()).mean()
        loss = pixel_error + _EDGES * edge_error + _SCALE * scale
        return {"loss": loss, "pixels": pixel_error, "edges": edge_error, "scale": scale}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR in dB over 32 pictures, and the smallest and largest deviation of a latent channel."""
        device = next(self.vae.parameters()).device
        pixels = as_pixels(np.stack([make_scene("dev", index).picture for index in range(32)])).to(device)
        latents = torch.cat([self.vae.encode(part) for part in pixels.split(4)])
        made = torch.cat([self.vae.decode(part) for part in latents.split(4)]).clamp(0.0, 1.0)
        error = (made - pixels).square().mean(dim=(1, 2, 3))
        deviations = latents.std(dim=(0, 2, 3))
        return {
            "psnr": float((-10 * error.log10()).mean()),
            "smallest_std": float(deviations.min()),
            "largest_std": float(deviations.max()),
        }
