"""The host's samplers with another source of noise and another amount of it.

In the host's variance-exploding coordinates DDIM with eta is Euler ancestral with the same eta, and every stochastic
sampler of the host takes a `noise_sampler`: guidance that replaces the noise of a step serves all of them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy.samplers import KSAMPLER, SAMPLER_NAMES, sampler_object
from tqdm.auto import trange

NoiseSampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Called with the sigma of a step and the next; returns noise of unit variance, shaped like the latent."""

NoiseFactory = Callable[[torch.Tensor, int | None], NoiseSampler]
"""Called with the first latent and the seed."""

STOCHASTIC_FORMS = {
    "euler": "euler_ancestral",
    "euler_cfg_pp": "euler_ancestral_cfg_pp",
    "dpm_2": "dpm_2_ancestral",
    "dpmpp_2m": "dpmpp_2m_sde",
    "res_multistep": "res_multistep_ancestral",
    "res_multistep_cfg_pp": "res_multistep_ancestral_cfg_pp",
    "exp_heun_2_x0": "exp_heun_2_x0_sde",
}
"""Deterministic samplers and the stochastic ones that equal them at eta 0. The host's `ddim` is its `euler`."""

ETA_IN_EXPONENT = ("dpmpp_2m_sde", "dpmpp_3m_sde", "seeds_2", "seeds_3", "exp_heun_2_x0_sde")
"""Samplers (by the beginning of their names) whose noise is sqrt(1 - exp(-2 h eta)): their eta is about DDIM's squared."""


def with_noise(sampler: object, eta: float, noise: NoiseFactory | None, sigma: str = "ddim") -> KSAMPLER:
    """Returns a copy of a host sampler that adds noise from `noise`, as much of it as DDIM does at `eta`.

    A sampler without noise runs its stochastic form (`STOCHASTIC_FORMS`); one that has no eta (lcm, ddpm, er_sde,
    sa_solver) keeps its amount. `noise` None keeps the sampler's own random noise. `sigma` "released" takes the amount of
    noise from HD-Painter's released code instead, which is a rule for DDIM alone (euler, ddim, euler_ancestral). The given
    sampler is not changed. Raises ValueError, naming samplers that work, where there is no noise to replace.
    """
    if not isinstance(sampler, KSAMPLER):
        raise ValueError(f"RASG cannot change the noise of {type(sampler).__name__}; {_ADVICE}")
    options = dict(sampler.extra_options)
    name, function = _stochastic_form(sampler, options)
    if function is not sampler.sampler_function:
        logging.info("RASG: this sampler adds no noise, so '%s' runs in its place.", name)
    if sigma == "released":
        if function is not k_diffusion.sample_euler_ancestral:
            raise ValueError(
                f"RASG's 'released' sigma is a rule for DDIM, and the sampler is '{name}': choose euler, ddim or "
                "euler_ancestral, or set sigma to 'ddim'."
            )
        function = _euler_with_released_sigma
    if "eta" in inspect.signature(function).parameters:
        options["eta"] = eta**2 if name.startswith(ETA_IN_EXPONENT) else eta

    @functools.wraps(function)
    def sample(
        model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, **keywords: Any
    ) -> torch.Tensor:
        if noise is not None:
            keywords["noise_sampler"] = noise(x, (extra_args or {}).get("seed"))
        return function(model, x, sigmas, extra_args=extra_args, **keywords)

    changed = copy.copy(sampler)
    changed.sampler_function = sample
    changed.extra_options = options
    return changed


def has_eta(sampler: object) -> bool:
    """Whether `with_noise` can choose how much noise a sampler adds."""
    if not isinstance(sampler, KSAMPLER):
        return False
    _, function = _stochastic_form(sampler, dict(sampler.extra_options))
    return "eta" in inspect.signature(function).parameters


_ADVICE = "choose euler, ddim, dpmpp_2m, euler_ancestral, dpmpp_2m_sde or another sampler that adds noise."


def _name_of(function: Callable[..., torch.Tensor]) -> str:
    """What the host's menus call a sampler's function; the function's own name for one that is not in them."""
    own = getattr(function, "__qualname__", type(function).__name__)
    for name in SAMPLER_NAMES:
        offered = getattr(sampler_object(name), "sampler_function", None)
        if offered is function or (offered is not None and offered.__qualname__ == own and "<locals>" in own):
            return name
    return own.split(".")[-1].removeprefix("sample_")


def _stochastic_form(sampler: KSAMPLER, options: dict[str, Any]) -> tuple[str, Callable[..., torch.Tensor]]:
    function = sampler.sampler_function
    name = _name_of(function)
    if getattr(k_diffusion, f"sample_{name}", None) is function and name in STOCHASTIC_FORMS:
        if options.get("s_churn"):
            raise ValueError(
                f"RASG cannot run '{name}' with s_churn {options['s_churn']}: set s_churn to 0, or {_ADVICE}"
            )
        for option in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
            options.pop(option, None)
        name = STOCHASTIC_FORMS[name]
        function = getattr(k_diffusion, f"sample_{name}")
    adds_noise = "noise_sampler" in inspect.signature(function).parameters
    if not adds_noise or name == "res_multistep":
        raise ValueError(f"RASG replaces the noise that a sampler adds, and '{name}' adds none: {_ADVICE}")
    return name, function


@torch.no_grad()
def _euler_with_released_sigma(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Any = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """The host's Euler ancestral step by step, each step with the eta that gives `released_sigma`."""
    seed = (extra_args or {}).get("seed")
    noise_sampler = k_diffusion.default_noise_sampler(x, seed=seed) if noise_sampler is None else noise_sampler
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    for i in trange(len(sigmas) - 1, disable=disable):

        def report(state: dict[str, Any], step: int = i) -> None:
            if callback is not None:
                callback({**state, "i": step})

        step_eta = eta * released_over_ddim(model_sampling, sigmas[i], sigmas[i + 1])
        x = k_diffusion.sample_euler_ancestral(
            model, x, sigmas[i : i + 2], extra_args, report, True, step_eta, s_noise, noise_sampler
        )
    return x


def released_over_ddim(model_sampling: Any, sigma: torch.Tensor, sigma_next: torch.Tensor) -> float:
    """The sigma of HD-Painter's released code in units of DDIM's, for a step between two noise levels of the host.

    The released code takes per-step alphas where DDIM has cumulative ones: sqrt(beta_s / beta_t (1 - (1 - beta_t) /
    (1 - beta_s))), t being the step's timestep and s the next. The last step, to sigma 0, adds no noise: 0.
    """
    if sigma_next <= 0:
        return 0.0
    beta_t, beta_s = (_training_beta(model_sampling, level) for level in (sigma, sigma_next))
    released = (beta_s / beta_t * max(0.0, 1.0 - (1.0 - beta_t) / (1.0 - beta_s))) ** 0.5
    variance, variance_next = float(sigma) ** 2, float(sigma_next) ** 2
    alpha_bar, alpha_bar_next = 1.0 / (1.0 + variance), 1.0 / (1.0 + variance_next)
    ddim = ((1.0 - alpha_bar_next) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_next)) ** 0.5
    return released / ddim


def _training_beta(model_sampling: Any, sigma: torch.Tensor) -> float:
    step = int(model_sampling.timestep(sigma))
    alpha_bar = 1.0 / (1.0 + model_sampling.sigmas.cpu().double() ** 2)
    before = float(alpha_bar[step - 1]) if step > 0 else 1.0
    return 1.0 - float(alpha_bar[step]) / before
