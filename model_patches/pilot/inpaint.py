"""PILOT from pictures to pictures: encode, sample, decode, and put the original's known pixels back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F

from ...imaging.fill import fill_hole
from ...imaging.harmonize import ONLY_BLEND, harmonize_pictures
from ...imaging.masks import resize_mask
from ...imaging.morphology import feather as feather_mask
from ...imaging.pictures import check_pictures, common_count
from ..core.autograd import staying
from ..core.diffusion import Diffusion, Sampling
from .sampler import PILOT, pilot_sampler

Under = Literal["blurred", "original"]


def inpaint(
    pictures: torch.Tensor,
    mask: torch.Tensor,
    diffusion: Diffusion,
    sampling: Sampling,
    settings: PILOT,
    feather: float,
    under: Under = "blurred",
    announce: Callable[[str], None] = logging.info,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills the holes of `pictures` [B, H, W, 3 or 4] in [0, 1] with what the positive prompt says.

    `mask` is as for `as_mask_batch`, of any size; each count is 1 or the larger one. `feather` adds a soft edge of so many pixels
    outside of the hole. The VAE sees across the hole's edge: `under` says what it sees there, "blurred" what is around the hole,
    "original" what the picture shows (released code). Sizes that the VAE cannot take are filled up at the right and the bottom.

    Returns the latents [B, C, h, w] as VAE Encode gives them, and the pictures: the originals bit for bit where neither the
    hole nor its edge is. Without any hole nothing is sampled. Raises ValueError for counts, and for a VAE and a model, that don't
    go together, and as `PILOTSampler.sample`.
    """
    check_pictures(pictures, "'image'")
    height, width = pictures.shape[1:3]
    hole = resize_mask(mask, (height, width)).to(pictures.device)
    count = common_count(image=len(pictures), mask=len(hole))
    hole = feather_mask((hole > 0).float(), feather, "outside", "smooth") if feather else hole
    pictures, hole = pictures.expand(count, -1, -1, -1), hole.expand(count, -1, -1, -1)

    vae, channels = diffusion.vae, diffusion.model.model.latent_format.latent_channels
    if vae.latent_channels != channels:
        raise ValueError(
            f"The VAE makes latents of {vae.latent_channels} channels, and the model takes {channels}: connect the VAE that "
            "comes with the model."
        )
    cell = vae.spacial_compression_encode()
    missing = (0, -width % cell, 0, -height % cell)
    seen = pictures[..., :3].movedim(-1, 1)
    if under == "blurred":
        seen = fill_hole(seen, (hole > 0).float(), "blurred")
    latent = vae.encode(F.pad(seen, missing, mode="replicate").movedim(1, -1))
    if not bool(hole.any()):
        announce("PILOT: the mask has no hole, so the picture stays as it is.")
        return latent, pictures
    model = staying(diffusion.model)
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), sampling.scheduler, sampling.steps
    )
    latent = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, sampling.seed),
        sampling.cfg,
        pilot_sampler(replace(settings, mask=F.pad((hole > 0).float(), missing, mode="replicate")), announce),
        sigmas,
        diffusion.positive,
        diffusion.negative,
        latent,
        callback=latent_preview.prepare_callback(model, sampling.steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=sampling.seed,
    )
    made = vae.decode(latent)[:, :height, :width].to(pictures)
    return latent, harmonize_pictures(made, pictures, hole[:, 0], ONLY_BLEND)
