"""Keeps what is known while a model samples: a blend of clean latents in every step.

HD-Painter, section 3.5 and equation 10: the predicted clean latent z0 becomes z0' = M z0 + (1 - M) E(image), and the next
latent is made from z0' and the *old* noise prediction. Detail of the known part reaches the hole in every step, without noise
in it. In the host's coordinates x = z0 + s eps, a step of Euler's from noise level s to s' with a prediction D gives
(1 - r) D + r x, r = s' / s; the paper's step gives z0' + r (x - z0). They are equal for D = z0 + (z0' - z0) / (1 - r).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.model_sampling import CONST
from comfy.patcher_extension import WrappersMP

from ...imaging.masks import as_mask_batch, coverage
from ..core.call_rows import repeat_to_batch

KEY = "TrueFill known"
"""Key of the wrappers, and of the settings in a model's options."""

_RUN = "TrueFill known run"
"""Where the options of a run have its `_Run`."""


@dataclass(frozen=True, eq=False)
class _Known:
    latent: torch.Tensor
    mask: torch.Tensor
    strength: float


@dataclass(eq=False)
class _Run:
    """One run: what replaces the known part, on the model's device, and how far (`gains`) by noise level."""

    latent: torch.Tensor
    weight: torch.Tensor
    gains: dict[float, float]
    blended: torch.Tensor | None = field(default=None)
    """The last z0', where the sampler got something else."""


def with_known(model: ModelPatcher, latent: torch.Tensor, mask: torch.Tensor, strength: float = 1.0) -> ModelPatcher:
    """Returns a clone of `model` that keeps `latent` where `mask` is 0, whatever it is sampled with.

    `latent` is [B, C, h, w], as VAE Encode gives it; `mask` [H, W] or [B, H, W] of any size, 1 = hole, averaged over the
    cells of the latent. Each count is 1 or the batch's. `strength` 1 is the paper, 0 the model as it was before; a second
    call replaces the first. Euler, DDIM and (but for flow models) Euler ancestral take the paper's step exactly; other
    samplers get z0' as the model's prediction, which takes the noise prediction along.

    Raises ValueError for a latent that isn't finite or [B, C, h, w], and for a mask that is none. Sampling raises it for
    latents of another size.
    """
    if latent.ndim != 4 or 0 in latent.shape or not latent.isfinite().all():
        raise ValueError(
            f"The known latent has the shape {list(latent.shape)}{'' if latent.ndim != 4 else ' or holds NaN'}, but finite "
            "values [B, C, h, w] are needed: connect what VAE Encode makes of the picture."
        )
    if mask.isnan().any():
        raise ValueError("The mask of the known latent holds NaN, but values from 0 to 1 are needed.")
    known = _Known(latent, as_mask_batch(mask), strength)
    model = model.clone()
    for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, _sample), (WrappersMP.PREDICT_NOISE, _predict)):
        model.remove_wrappers_with_key(kind, KEY)
        if strength:
            model.add_wrapper_with_key(kind, KEY, wrapper)
    options: dict[str, Any] = model.model_options
    options[KEY] = known
    return model


def _sample(
    executor: Any,
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    callback: Any,
    noise: torch.Tensor,
    latent_image: torch.Tensor | None = None,
    denoise_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Wrapper around the host's `Sampler.sample`."""
    later = executor.wrappers[executor.idx + 1 :]
    if later:
        # Others, RASG among them, change the sampler: this one has to see what comes of it.
        last = type(executor).new_class_executor(executor.original, executor.class_obj, [*later, _sample])
        return last.execute(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    options = create_model_options_clone(extra_args["model_options"])
    run = options[_RUN] = _run(options[KEY], executor.class_obj, guider.inner_model, sigmas, noise)

    def report(step: int, x0: torch.Tensor, *rest: Any) -> None:
        if run.blended is not None:
            x0 = run.blended
            if denoise_mask is not None and latent_image is not None:
                x0 = torch.lerp(latent_image, x0, denoise_mask)
        callback(step, x0, *rest)

    # UniPC writes into the schedule.
    ends_clean = float(sigmas[-1]) == 0.0
    out = executor(
        guider,
        sigmas,
        {**extra_args, "model_options": options},
        None if callback is None else report,
        noise,
        latent_image,
        denoise_mask,
        *args,
        **kwargs,
    )
    if not ends_clean:
        return out
    # Samplers of several stages end near the known latent, not at it.
    known = run.weight == 1.0 if denoise_mask is None else (run.weight == 1.0) & (denoise_mask == 1.0)
    return torch.where(known, run.latent, out)


def _run(known: _Known, sampler: Any, model: Any, sigmas: torch.Tensor, noise: torch.Tensor) -> _Run:
    if known.latent.shape[1:] != noise.shape[1:]:
        raise ValueError(
            f"The known latent has {known.latent.shape[1]} channels of {known.latent.shape[3]}x{known.latent.shape[2]} cells "
            f"and the latent that is sampled {noise.shape[1]} of {noise.shape[3]}x{noise.shape[2]}: encode the picture at the "
            "size that is sampled, with this model's VAE."
        )
    latent = model.process_latent_in(known.latent.to(noise.device, torch.float32))
    weight = known.strength * (1.0 - coverage(known.mask.to(noise.device), (noise.shape[-2], noise.shape[-1])))
    return _Run(
        repeat_to_batch(latent, len(noise)),
        repeat_to_batch(weight, len(noise)),
        _gains(sampler, sigmas, model.model_sampling),
    )


def _predict(
    executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, *args: Any
) -> torch.Tensor:
    """Wrapper around the host's guided prediction of the clean latent."""
    options = model_options or {}
    predicted = executor(x, timestep, options, *args)
    run: _Run | None = options.get(_RUN)
    if run is None:
        return predicted
    change = run.weight * (run.latent - predicted)
    gain = run.gains.get(float(timestep.flatten()[0]), 1.0)
    run.blended = None if gain == 1.0 else predicted + change
    return predicted + gain * change


def _gains(sampler: Any, sigmas: torch.Tensor, model_sampling: Any) -> dict[float, float]:
    """By noise level, what (z0' - z0) is multiplied by, so that the sampler's step is the one with the old noise."""
    function, options = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", {})
    eulers = (k_diffusion.sample_euler, k_diffusion.sample_euler_ancestral)
    # RASG wraps the sampler that it changes.
    function = None if function is None else inspect.unwrap(function, stop=lambda inner: inner in eulers)
    flow = isinstance(model_sampling, CONST)
    if function is k_diffusion.sample_euler and not options.get("s_churn"):
        eta = 0.0
    elif function is k_diffusion.sample_euler_ancestral and not flow:
        eta = options.get("eta", 1.0)
    else:
        return {}
    levels = [float(sigma) for sigma in sigmas]
    gains = {}
    for level, following in pairwise(levels):
        down = float(k_diffusion.get_ancestral_step(level, following, eta)[0])
        if down < level:
            # A flow model's x is (1 - s) z0 + s eps.
            gains[level] = (1.0 - following if flow else 1.0) / (1.0 - down / level)
    return gains
