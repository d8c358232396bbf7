"""PILOT in the paper's own (variance-preserving) coordinates, in float64, on the literal UNet (section 4).

    x0     = (z - sqrt(1 - abar) eps) / sqrt(abar)          eps: the conditional branch alone, boundary control on    8
    L_bg   = 1/4 sum over channels and pixels of B (z_src - x0)^2                     B = 1 - H, 1 = known            9
    s_n    = mean over heads of sum over prompt tokens k of softmax(Q K^T / sqrt(d))[n, k]      before the boundary
    L_sc   = mean over layers of (mean of s_n over known n - mean of s_n over n in the hole)                         14
    L      = L_bg + lambda(t) L_sc,  lambda(t) = coef N_known / 1499 part(t)                                     15
    m      <- momentum m - lr(t) dL/dz,  z <- z + m         m = 0 at the start of every optimised timestep
    lr(t)  = lr 1.002^(1000 - t), at the run's first timestep lr_warmup
    z_s    = sqrt(abar_s) z0 + sqrt(1 - abar_s) eps         eps after CFG: one DDIM step, after the iterations
    z      <- H z + B (sqrt(abar) z_src + sqrt(1 - abar) n)            before the step where t < 1000 (1 - gamma) 17, 18

The numbers on the right are the paper's; where it leaves something open, the released code decides. Layers: all
cross-attentions but those on the latent's own grid. A layer that has no known pixel, or no hole, counts 0 and stays in
the mean. Every picture has losses and a lambda of its own.

t is the training timestep nearest to a host sigma, abar that of the sigma itself. Latents that go in and come out are
in the host's coordinates, x = z / sqrt(abar), and in the model's latent scale; gradients are dL/dz.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch

from .literal_boundary import Boundary, known_pixels
from .literal_sampling import Prompt, alpha_bar, from_the_end, nearest_timestep, start
from .literal_unet import CrossScores, literal_unet

SELECTED_FACTORS = (2, 4, 8)
"""Latent to level downsampling of the layers in L_sc: 1/16, 1/32 and 1/64 of the image."""


@dataclass
class PilotSettings:
    """`boundary`: strength of semantic boundary control in every UNet call of both stages and branches; None: off."""

    gamma: float = 1.0
    interval: int = 10
    iterations: int = 10
    lr: float = 0.025
    lr_warmup: float = 0.007
    momentum: float = 0.7
    coef: float = 150.0
    boundary: float | None = 1.0


@dataclass
class Iteration:
    """One iteration of the optimiser, on the latent x [B, 4, h, w] (the host's coordinates) before its update.

    background and centralisation: L_bg and L_sc of each picture [B], L_sc without lambda. gradient: dL/dz [B, 4, h, w].
    """

    step: int
    timestep: int
    x: torch.Tensor
    background: torch.Tensor
    centralisation: torch.Tensor
    gradient: torch.Tensor


@dataclass
class PilotRun:
    """The final latent [B, 4, h, w], what the optimiser did, and the x that each guided step started from.

    That x is what the guided UNet calls see: after the iterations, or after the blend.
    """

    latent: torch.Tensor
    iterations: list[Iteration] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Predictor:
    """The UNet as a function of z [B, 4, h, w] that gives eps, with semantic boundary control or without."""

    unet: torch.nn.Module
    boundary: Boundary | None
    v_prediction: bool = False

    def __call__(
        self, z: torch.Tensor, timestep: int, abar: float, prompt: Prompt
    ) -> tuple[torch.Tensor, list[CrossScores]]:
        """eps for one prompt, and the scores of the selected layers."""
        pictures = len(z)
        output, recorded = literal_unet(
            self.unet,
            z,
            torch.full((pictures,), timestep),
            prompt.context.double().expand(pictures, -1, -1),
            None if prompt.y is None else prompt.y.double().expand(pictures, -1),
            boundary=self.boundary,
            record=True,
            factors=SELECTED_FACTORS,
        )
        if self.v_prediction:
            output = math.sqrt(abar) * output + math.sqrt(1.0 - abar) * z
        return output, recorded


def literal_pilot(
    unet: torch.nn.Module,
    table: torch.Tensor,
    sigmas: torch.Tensor,
    noise: torch.Tensor,
    latent: torch.Tensor,
    positive: Prompt,
    negative: Prompt,
    cfg: float,
    hole: torch.Tensor,
    settings: PilotSettings,
    *,
    v_prediction: bool = False,
    blend_noise: torch.Tensor | None = None,
    start_latent: torch.Tensor | None = None,
) -> PilotRun:
    """Fill the hole of each picture.

    unet          float64 copy of the host's UNet (`as_float64`), 4 channels
    table         the model's training sigmas, `model_sampling.sigmas` [1000]
    sigmas        the schedule [steps + 1], falling
    noise, latent [B, 4, h, w]: `latent` is that of the whole source picture
    positive      its `tokens` are the prompt tokens of L_sc
    hole          [B, 1, h, w], 0 or 1
    blend_noise   the blend stage's noise for every step [steps, B, 4, h, w]
    start_latent  [B, 4, h, w], mixed with the noise at the start. By default nothing (0) if the schedule begins at the
                  last training timestep, otherwise `latent`
    """
    table, noise, latent, hole = table.double(), noise.double(), latent.double(), hole.double()
    if not ((hole == 0.0) | (hole == 1.0)).all():
        raise ValueError("the hole has to be binary")
    known = 1.0 - hole
    schedule = [float(sigma) for sigma in sigmas]
    steps = len(schedule) - 1
    # Not 1000 (1 - gamma), which is a little more than 300 for gamma = 0.7.
    last_optimised = 1000.0 - 1000.0 * settings.gamma
    boundary = None if settings.boundary is None else Boundary(hole, settings.boundary)
    predict = Predictor(unet, boundary, v_prediction)
    if start_latent is None:
        start_latent = torch.zeros_like(latent) if from_the_end(schedule[0], float(table[-1])) else latent
    z = start(noise, start_latent.double(), schedule[0], float(table[-1]))
    run = PilotRun(latent=z)

    for index, (sigma_t, sigma_s) in enumerate(itertools.pairwise(schedule)):
        abar_t, abar_s = alpha_bar(sigma_t), alpha_bar(sigma_s)
        timestep = nearest_timestep(sigma_t, table)

        if timestep < last_optimised:
            if blend_noise is None:
                raise ValueError("the blend stage needs noise")
            noised = math.sqrt(abar_t) * latent + math.sqrt(1.0 - abar_t) * blend_noise[index].double()
            z = hole * z + known * noised
        elif settings.interval <= steps and index % settings.interval == 0:
            weights = loss_weights(timestep, hole, settings)
            rate = learning_rate(timestep, index == 0, settings)
            momentum = torch.zeros_like(z)
            for _ in range(settings.iterations):
                z = z.detach().requires_grad_()
                background, centralisation = losses(predict, z, timestep, abar_t, positive, latent, hole)
                (gradient,) = torch.autograd.grad((background + weights * centralisation).sum(), z)
                z = z.detach()
                x = z / math.sqrt(abar_t)
                run.iterations.append(
                    Iteration(index, timestep, x, background.detach(), centralisation.detach(), gradient)
                )
                momentum = settings.momentum * momentum - rate * gradient
                z = z + momentum

        run.steps.append(z / math.sqrt(abar_t))
        with torch.no_grad():
            cond, _ = predict(z, timestep, abar_t, positive)
            uncond, _ = predict(z, timestep, abar_t, negative)
        eps = uncond + cfg * (cond - uncond)
        z = math.sqrt(abar_s) * one_step(z, eps, abar_t) + math.sqrt(1.0 - abar_s) * eps
    run.latent = z / math.sqrt(alpha_bar(schedule[-1]))
    return run


def losses(
    predict: Predictor,
    z: torch.Tensor,
    timestep: int,
    abar: float,
    prompt: Prompt,
    latent: torch.Tensor,
    hole: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_bg and L_sc (without lambda) of each picture: [B], [B]."""
    if prompt.tokens is None:
        raise ValueError("the prompt has no tokens marked")
    pictures = len(z)
    tokens = prompt.tokens.expand(pictures, -1)
    eps, recorded = predict(z, timestep, abar, prompt)
    x0 = one_step(z, eps, abar)
    background = [
        background_preservation(latent[picture], x0[picture], hole[picture, 0]) for picture in range(pictures)
    ]
    centralisation = [
        semantic_centralisation(recorded, picture, tokens[picture], hole[picture, 0]) for picture in range(pictures)
    ]
    return torch.stack(background), torch.stack(centralisation)


def one_step(z: torch.Tensor, eps: torch.Tensor, abar: float) -> torch.Tensor:
    """Eq. 8: x0."""
    return (z - math.sqrt(1.0 - abar) * eps) / math.sqrt(abar)


def background_preservation(source: torch.Tensor, x0: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """Eq. 9 for one picture: source and x0 [4, h, w], hole [h, w]."""
    return 0.25 * ((1.0 - hole) * (source - x0) ** 2).sum()


def semantic_centralisation(
    recorded: list[CrossScores], row: int, tokens: torch.Tensor, hole: torch.Tensor
) -> torch.Tensor:
    """Eq. 12 to 14 for one picture, row `row` of the scores: prompt `tokens` bool [L], hole [h, w]."""
    total = recorded[0].scores.new_zeros(())
    for layer in recorded:
        known = known_pixels(hole, layer.grid)
        if known.all() or not known.any():
            continue
        probabilities = layer.scores[row].softmax(dim=-1)
        heads, pixels, _ = probabilities.shape
        of_prompt = probabilities.new_zeros(heads, pixels)
        for token in tokens.nonzero().flatten().tolist():
            of_prompt = of_prompt + probabilities[:, :, token]
        mean_known = of_prompt[:, known].sum() / (int(known.sum()) * heads)
        mean_hole = of_prompt[:, ~known].sum() / (int((~known).sum()) * heads)
        total = total + mean_known - mean_hole
    return total / len(recorded)


def loss_weights(timestep: int, hole: torch.Tensor, settings: PilotSettings) -> torch.Tensor:
    """lambda(t) of each picture [B] for holes [B, 1, h, w]."""
    part = 0.1 if timestep < 300 else 0.1 + 0.9 * (timestep - 300) / (999 - 300)
    known_cells = [int((picture == 0.0).sum()) for picture in hole]
    return torch.tensor([settings.coef * count / 1499 * part for count in known_cells], dtype=torch.float64)


def learning_rate(timestep: int, first: bool, settings: PilotSettings) -> float:
    """lr(t); `first`: at the run's first timestep."""
    return settings.lr_warmup if first else settings.lr * 1.002 ** (1000 - timestep)
