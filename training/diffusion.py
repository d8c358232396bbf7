"""Noise as SD1.5 and as flow models add it, the loss on it, and samplers to look at a model with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from comfy.model_sampling import ModelSamplingDiscrete

STEPS = 1000
_SNR_LIMIT = 5.0
_CPU = torch.device("cpu")


@cache
def signal_shares(device: torch.device = _CPU) -> torch.Tensor:
    """The share of the signal in the variance after each of the 1000 noise steps ("alphas_cumprod"): float32 [1000]."""
    sigmas: torch.Tensor = ModelSamplingDiscrete().get_buffer("sigmas")
    return (1.0 / (sigmas**2 + 1.0)).to(device)


def noise_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    generator: torch.Generator,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The error of predicted noise, weighted by min(SNR, 5) / SNR.

    That weight (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy") takes effort from the last bit of
    noise, which is texture, and leaves it to the noisy steps, in which shapes are decided. `predict` maps noisy latents
    [B, 4, H, W] and time steps [B] to the noise; `latents` are the clean ones; `generator` lives on the CPU. `weight`
    [B, 1, H, W] says how much each cell counts; without one all count the same.
    """
    count, device = len(latents), latents.device
    # One from each of B equal parts of the schedule: as random for each picture, and less so for the mean of a batch.
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    times = (parts * STEPS).long().clamp(max=STEPS - 1).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    share = signal_shares(device)[times]
    noisy = share.sqrt()[:, None, None, None] * latents + (1 - share).sqrt()[:, None, None, None] * noise
    error = (predict(noisy, times).float() - noise).square().mean(dim=1, keepdim=True)
    if weight is not None:
        error = error * weight / weight.mean(dim=(1, 2, 3), keepdim=True)
    error = error.mean(dim=(1, 2, 3))
    snr = share / (1 - share)
    return (error * (snr.clamp(max=_SNR_LIMIT) / snr)).mean()


def flow_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], latents: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The error of a predicted flow, from the picture to the noise, at noise levels whose logit is normal.

    As in Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis". `predict` maps noisy latents
    [B, 4, H, W] and noise levels [B] in (0, 1) to the flow; the rest is as for `noise_loss`.
    """
    count = len(latents)
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    levels = torch.special.ndtri(parts.double().clamp(1e-6, 1 - 1e-6)).float().sigmoid().to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    at = levels[:, None, None, None]
    return (predict((1 - at) * latents + at * noise, levels).float() - (noise - latents)).square().mean()


@torch.no_grad()
def flow_euler(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, steps: int = 30
) -> torch.Tensor:
    """Latents [B, 4, H, W] from noise of the same shape, by Euler's steps; `predict` as in `flow_loss`."""
    x = noise
    for level, following in pairwise(torch.linspace(1.0, 0.0, steps + 1, device=noise.device)):
        x = x + (following - level) * predict(x, level.expand(len(x)).to(x)).float()
    return x


@torch.no_grad()
def ddim(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, steps: int = 30
) -> torch.Tensor:
    """Latents [B, 4, H, W] from noise of the same shape, by deterministic DDIM; `predict` as in `noise_loss`."""
    shares = signal_shares(noise.device)
    times = torch.linspace(STEPS - 1, 0, steps + 1).round().long()[:-1].tolist()
    x = noise
    for number, time in enumerate(times):
        share = shares[time]
        # The last step goes to the clean picture.
        after = shares[times[number + 1]] if number + 1 < len(times) else torch.ones_like(share)
        eps = predict(x, torch.full((len(x),), time, device=x.device, dtype=torch.long)).float()
        clean = (x - (1 - share).sqrt() * eps) / share.sqrt()
        x = after.sqrt() * clean + (1 - after).sqrt() * eps
    return x


def guided(
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    context: torch.Tensor,
    empty: torch.Tensor,
    scale: float,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Classifier-free guidance: `predict` also takes a context [B, 77, C]; `empty` [1, 77, C] is the empty caption's."""

    def both(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        contexts = torch.cat([context, empty.expand_as(context)])
        with_caption, without = predict(torch.cat([x, x]), torch.cat([times, times]), contexts).float().chunk(2)
        return without + scale * (with_caption - without)

    return both
