"""HD-Painter's inpainting-specialised super-resolution (section 3.5; eq. 3, 4, 10) written out, in float64.

    X_T ~ N(0, 1), X_0 = E(I), M = 1 in the hole; for every step from t to s < t, alpha the cumulative alpha:

    eps_t   = eps_uncond + cfg (eps_cond - eps_uncond)
    X0pred  = (X_t - sqrt(1 - alpha_t) eps_t) / sqrt(alpha_t)
    X0pred <- M X0pred + (1 - M) X_0                                                                    eq. 10
    X_s     = sqrt(alpha_s) X0pred + sqrt(1 - alpha_s) eps_t                                            eq. 4
    X_s     = sqrt(alpha_s) X0pred + sqrt(1 - alpha_s - sigma^2) eps_t + sigma n                        eq. 3

Eq. 10 changes X0pred alone: eps_t stays the model's, though X_t is no longer sqrt(alpha_t) X0pred + sqrt(1 - alpha_t)
eps_t with it. After the last step the (blended) X0pred is the result. A v-predicting model (the x4 upscaler) gives
v = sqrt(alpha_t) eps - sqrt(1 - alpha_t) X0, from which eps = sqrt(alpha_t) v + sqrt(1 - alpha_t) X_t.

Everything is in the paper's variance-preserving coordinates and in the model's latent scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .literal_sampling import true_ddim_sigma

Unet = Callable[[torch.Tensor, int, bool], torch.Tensor]
"""(X_t [B, C, h, w], training timestep, conditional or not) -> the model's output [B, C, h, w], eps or v."""


@dataclass(eq=False)
class Network:
    """The host's own network with two prompts, as a `Unet`.

    network  float64 copy of the host's UNet (`as_float64`)
    texts    the embeddings of the conditional and of the unconditional prompt, [1, L, C]
    image    further channels [B, C, h, w], or None
    level    their noise level, which the network is told as a class
    """

    network: torch.nn.Module
    texts: tuple[torch.Tensor, torch.Tensor]
    image: torch.Tensor | None = None
    level: int = 0

    def __call__(self, x: torch.Tensor, timestep: int, conditional: bool) -> torch.Tensor:
        batch, text = len(x), self.texts[0 if conditional else 1]
        inputs: dict[str, Any] = {"context": text.double().expand(batch, -1, -1), "transformer_options": {}}
        if self.image is not None:
            x = torch.cat([x, self.image], dim=1)
            inputs["y"] = torch.full((batch,), self.level)
        with torch.inference_mode():
            return self.network(x, torch.full((batch,), timestep), **inputs)


@dataclass
class Step:
    """One step: X_t before it, eps_t, X0pred as the model has it and as eq. 10 leaves it, all [B, C, h, w]."""

    x: torch.Tensor
    eps: torch.Tensor
    predicted: torch.Tensor
    x0: torch.Tensor


@dataclass
class Run:
    """The result X0 [B, C, h, w] and what happened at each step."""

    x0: torch.Tensor
    steps: list[Step] = field(default_factory=list)


def literal_upscale(
    unet: Unet,
    timesteps: list[int],
    alphas: list[float],
    start: torch.Tensor,
    known: torch.Tensor,
    mask: torch.Tensor,
    cfg: float,
    *,
    v_prediction: bool,
    eta: float = 0.0,
    noises: list[torch.Tensor] | None = None,
) -> Run:
    """Denoise `start` = X_T [B, C, h, w] with `known` = X_0 [B, C, h, w] where `mask` = M [B, 1, h, w] is 0.

    timesteps  of the steps, falling; the training's, which the model is given
    alphas     cumulative, one more than timesteps: those of the timesteps, then what the last step leads to (1.0)
    eta        sigma = eta * DDIM's sigma (section 4.1); 0 is eq. 4
    noises     n of every step that adds noise, [B, C, h, w] each; the step to alpha = 1 adds none
    """
    start, known, mask = start.double(), known.double(), mask.double()
    x = start
    run = Run(x0=x)
    for index, timestep in enumerate(timesteps):
        alpha_t, alpha_s = alphas[index], alphas[index + 1]
        eps_cond = _eps(unet(x, timestep, True), x, alpha_t, v_prediction)
        eps_uncond = _eps(unet(x, timestep, False), x, alpha_t, v_prediction)
        eps = eps_uncond + cfg * (eps_cond - eps_uncond)
        predicted = (x - math.sqrt(1.0 - alpha_t) * eps) / math.sqrt(alpha_t)
        x0 = mask * predicted + (1.0 - mask) * known
        run.steps.append(Step(x, eps, predicted, x0))
        run.x0 = x0

        if eta > 0.0 and alpha_s < 1.0:
            sigma = eta * true_ddim_sigma(alpha_t, alpha_s)
            x = math.sqrt(alpha_s) * x0 + math.sqrt(1.0 - alpha_s - sigma**2) * eps + sigma * noises[index].double()
        else:
            x = math.sqrt(alpha_s) * x0 + math.sqrt(1.0 - alpha_s) * eps
    return run


def _eps(output: torch.Tensor, x: torch.Tensor, alpha: float, v_prediction: bool) -> torch.Tensor:
    if v_prediction:
        return math.sqrt(alpha) * output + math.sqrt(1.0 - alpha) * x
    return output
