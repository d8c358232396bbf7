"""DDIM in the paper's own (variance-preserving) coordinates, in float64, on the literal UNet (HD-Painter, eq. 3 and 7).

    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps                  abar: the paper's alpha, cumulative
    z_s = sqrt(abar_s) z0 + sqrt(1 - abar_s - sigma^2) eps + sigma n             a step from t to s < t, eq. 3
    n   = g / std(g)                                                             RASG, eq. 7; else what the test gives

The host's (variance-exploding) coordinates: x = z / sqrt(abar), its sigma has abar = 1 / (1 + sigma^2). Everything that
goes in and comes out here is in the host's coordinates and in the model's latent scale (after `process_latent_in`,
before `process_latent_out`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from .literal_boundary import Boundary
from .literal_painta import Painta, Row
from .literal_rasg import normalised, objective
from .literal_unet import RECORDED_FACTOR, literal_unet


@dataclass
class Prompt:
    """One text condition: `context` [1 or B, L, C], ADM `y` [1 or B, A], ind(prompt) `tokens` bool [L] or [B, L]."""

    context: torch.Tensor
    y: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass
class PaintaSettings:
    """PAIntA at every step whose training timestep is > `above`: "the first half of sampling" is > 500 of 1000."""

    strength: float = 1.0
    smooth: bool = True
    above: int = 500


@dataclass
class Step:
    """One step, in the host's coordinates.

    x before it; the prediction x0 (after CFG and the noise mask); the factor `sigma_up` of the noise that is added;
    RASG's raw gradient with respect to the latent that the model sees (after a noise mask has put in the known part).
    """

    timestep: int
    x: torch.Tensor
    x0: torch.Tensor
    sigma_up: float
    gradient: torch.Tensor | None


@dataclass
class Run:
    """The final latent [B, 4, h, w] and what happened at each step."""

    latent: torch.Tensor
    steps: list[Step] = field(default_factory=list)


def alpha_bar(sigma: float) -> float:
    """The cumulative alpha of a host sigma: 1 / (1 + sigma^2)."""
    return 1.0 / (1.0 + sigma**2)


def training_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> torch.Tensor:
    """The per-step betas that SD1.5, SD2 and SDXL were trained with ("scaled linear"): [steps], float64."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def nearest_timestep(sigma: float, table: torch.Tensor) -> int:
    """The training timestep whose sigma (`table`, [1000]) is nearest in the logarithm: what the host gives the UNet."""
    return int((table.double().log() - math.log(sigma)).abs().argmin())


def true_ddim_sigma(abar_t: float, abar_s: float) -> float:
    """DDIM's sigma at eta = 1 for a step from t to s < t: sqrt((1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s))."""
    return math.sqrt((1.0 - abar_s) / (1.0 - abar_t) * (1.0 - abar_t / abar_s))


def released_sigma(beta_t: float, beta_s: float) -> float:
    """The released code's sigma at eta = 1: DDIM's formula with the per-step 1 - beta in place of abar.

    sqrt(beta_s / beta_t (1 - (1 - beta_t) / (1 - beta_s))), t the current timestep, s < t the next. For 50 steps,
    t = 999 and s = 979 it is 0.0185.
    """
    return math.sqrt(beta_s / beta_t * (1.0 - (1.0 - beta_t) / (1.0 - beta_s)))


def literal_sample(
    unet: torch.nn.Module,
    table: torch.Tensor,
    sigmas: torch.Tensor,
    noise: torch.Tensor,
    latent: torch.Tensor,
    positive: list[Prompt],
    negative: list[Prompt],
    cfg: float,
    *,
    v_prediction: bool = False,
    concat: tuple[torch.Tensor, torch.Tensor] | None = None,
    noise_mask: torch.Tensor | None = None,
    eta: float = 0.0,
    sigma_choice: Literal["ddim", "released"] = "ddim",
    betas: torch.Tensor | None = None,
    levels: tuple[int, ...] = (RECORDED_FACTOR,),
    guidance: Literal["rasg"] | Callable[[int], torch.Tensor] | None = None,
    painta: PaintaSettings | None = None,
    boundary: float | None = None,
    hole: torch.Tensor | None = None,
) -> Run:
    """Sample as the host's KSampler does with `euler` (eta 0) or `euler_ancestral` (eta > 0), with g as its noise.

    unet          float64 copy of the host's UNet (`as_float64`)
    table         the model's training sigmas, `model_sampling.sigmas` [1000]
    sigmas        the schedule [steps + 1], falling; the step to 0 adds no noise
    noise, latent [B, 4, h, w]: the start is noise + what remains of the latent, as `noise_scaling` mixes them
    positive,     the prompts of each side, whose predictions are averaged; every one is a UNet call of its own, the
    negative      positive ones first, so that the negative ones find PAIntA's c
    concat        9-channel models: (mask [B, 1, h, w], masked-image latent [B, 4, h, w]); the mask is rounded
    noise_mask    [B, 1, h, w], 1 = sampled: known latents, noised, go into the model; clean ones into its prediction
    sigma_choice  "ddim": eta * true_ddim_sigma; "released": eta * released_sigma of `betas` [1000], the training's
    levels        on which RASG reads attention: the latent downsampled by each; S is the sum over them
    guidance      "rasg", or a function of the step's index that gives the noise [B, 4, h, w], or None: none
    boundary      semantic boundary control of this strength, at every step
    hole          [B, 1, h, w] for PAIntA, RASG and the boundary
    """
    table, noise, latent = table.double(), noise.double(), latent.double()
    concat = None if concat is None else (concat[0].double(), concat[1].double())
    noise_mask = None if noise_mask is None else noise_mask.double()
    schedule = [float(sigma) for sigma in sigmas]
    betas = training_betas() if betas is None else betas
    z = start(noise, latent, schedule[0], float(table[-1]))
    run = Run(latent=z)
    for index, (sigma_t, sigma_s) in enumerate(itertools.pairwise(schedule)):
        abar_t, abar_s = alpha_bar(sigma_t), alpha_bar(sigma_s)
        timestep = nearest_timestep(sigma_t, table)
        x = z / math.sqrt(abar_t)

        x_seen = x
        if noise_mask is not None:
            x_seen = noise_mask * x + (1.0 - noise_mask) * (latent + sigma_t * noise)
        x_seen = x_seen.detach().requires_grad_(guidance == "rasg")
        z_seen = x_seen * math.sqrt(abar_t)
        settings = painta if painta is not None and timestep > painta.above else None
        predicted, score = _predict(
            unet,
            z_seen,
            timestep,
            abar_t,
            positive,
            negative,
            cfg,
            v_prediction,
            concat,
            settings,
            None if boundary is None else Boundary(hole, boundary),
            hole,
            guidance,
            levels,
        )
        gradient = None
        noise_added = None
        if guidance == "rasg":
            (gradient,) = torch.autograd.grad(score, x_seen)
            noise_added = normalised(gradient)
        elif guidance is not None and sigma_s > 0.0:
            noise_added = guidance(index).double()
        z0 = ((z_seen - math.sqrt(1.0 - abar_t) * predicted) / math.sqrt(abar_t)).detach()
        if noise_mask is not None:
            z0 = noise_mask * z0 + (1.0 - noise_mask) * latent
        eps = (z - math.sqrt(abar_t) * z0) / math.sqrt(1.0 - abar_t)

        sigma = 0.0
        if noise_added is not None and sigma_s > 0.0:
            if sigma_choice == "ddim":
                sigma = eta * true_ddim_sigma(abar_t, abar_s)
            else:
                next_timestep = nearest_timestep(sigma_s, table)
                sigma = eta * released_sigma(float(betas[timestep]), float(betas[next_timestep]))
        sigma = min(sigma, math.sqrt(1.0 - abar_s))
        run.steps.append(Step(timestep, x, z0, sigma / math.sqrt(abar_s), gradient))
        z = math.sqrt(abar_s) * z0 + math.sqrt(1.0 - abar_s - sigma**2) * eps
        if noise_added is not None:
            z = z + sigma * noise_added
    run.latent = z / math.sqrt(alpha_bar(schedule[-1]))
    return run


def from_the_end(sigma: float, sigma_max: float) -> bool:
    """Whether a schedule that begins with `sigma` begins at the last training timestep, whose sigma is `sigma_max`."""
    return sigma > sigma_max or math.isclose(sigma, sigma_max, rel_tol=1e-5)


def start(noise: torch.Tensor, latent: torch.Tensor, sigma: float, sigma_max: float) -> torch.Tensor:
    """The host's `noise_scaling` in the paper's coordinates.

    From the last training timestep: noise of variance 1, z = noise + sqrt(abar) latent. From any other:
    z = sqrt(1 - abar) noise + sqrt(abar) latent.
    """
    abar = alpha_bar(sigma)
    return (1.0 if from_the_end(sigma, sigma_max) else math.sqrt(1.0 - abar)) * noise + math.sqrt(abar) * latent


def _predict(
    unet, z, timestep, abar, positive, negative, cfg, v_prediction, concat, settings, boundary, hole, guidance, levels
):
    """CFG's eps [B, 4, h, w] at z, uncond + cfg (cond - uncond), and RASG's S summed over the pictures."""
    pictures = z.shape[0]
    unet_input = z if concat is None else torch.cat([z, concat[0].round(), concat[1]], dim=1)
    timesteps = torch.full((pictures,), timestep)
    score = z.new_zeros(())
    c = {}
    predictions = {"cond": [], "uncond": []}
    for role, prompts in (("cond", positive), ("uncond", negative)):
        for prompt in prompts:
            tokens = [None] * pictures if prompt.tokens is None else prompt.tokens.expand(pictures, -1)
            rows = [Row(role=role, sample=sample, tokens=tokens[sample]) for sample in range(pictures)]
            painta = settings and Painta(rows, hole, settings.strength, settings.smooth, c)
            y = prompt.y if prompt.y is None else prompt.y.double().expand(pictures, -1)
            context = prompt.context.double().expand(pictures, -1, -1)
            # S is about the conditional prediction alone, so nothing has to be kept of the other one.
            scored = guidance == "rasg" and role == "cond"
            with torch.set_grad_enabled(scored):
                output, recorded = literal_unet(
                    unet,
                    unet_input,
                    timesteps,
                    context,
                    y,
                    painta=painta,
                    boundary=boundary,
                    record=True,
                    factors=levels,
                )
            if scored:
                for sample, grid in itertools.product(range(pictures), {layer.grid for layer in recorded}):
                    level = [layer for layer in recorded if layer.grid == grid]
                    score = score + objective(level, sample, tokens[sample], hole[sample : sample + 1])
            if v_prediction:
                output = math.sqrt(abar) * output + math.sqrt(1.0 - abar) * z
            predictions[role].append(output)
    cond, uncond = (torch.stack(predictions[role]).mean(dim=0) for role in ("cond", "uncond"))
    return uncond + cfg * (cond - uncond), score
