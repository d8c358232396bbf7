"""PAIntA and RASG on a host MODEL: one composer for both, in either order, next to other packs' patches.

A node only leaves its settings on a clone of the model, and one keyed wrapper around the sampler. All the rest is put
into the options of a single run, when it is known what else is on the model, and is gone with that run, also after an
error or an interrupt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP

from ..imaging.masks import as_mask_batch, coverage
from .chunks import repeat_to_batch
from .painta import PAIntA
from .rasg import FACTOR, RASG
from .run import KEY, GuidedRun
from .unet import require_unet, transformer_places


@dataclass(frozen=True, eq=False)
class Guidance:
    """What the nodes have asked for. Never changed, only replaced: clones of a model share it."""

    painta: PAIntA | None = None
    rasg: RASG | None = None


def with_painta(model: ModelPatcher, settings: PAIntA) -> ModelPatcher:
    """Returns a clone of `model` that samples with PAIntA. Strength 0 is the model as it was before any PAIntA.

    `settings.mask` ([H, W] or [B, H, W], 1 = hole) overrules the masks of latent and conditioning. Raises ValueError for a
    model without a Stable Diffusion UNet, and for a mask that is none.
    """
    require_unet(model, "PAIntA")
    mask = None if settings.mask is None else as_mask_batch(settings.mask)
    return _with_guidance(model.clone(), painta=replace(settings, mask=mask) if settings.strength else None)


def with_rasg(model: ModelPatcher, settings: RASG) -> ModelPatcher:
    """Returns a clone of `model` that samples with RASG. Strength 0 is the model as it was before any RASG.

    `settings.mask` ([H, W] or [B, H, W], 1 = hole) overrules the masks of latent and conditioning. Raises ValueError for a
    model without a Stable Diffusion UNet or without cross-attention at 1/32 of the picture, and for a mask that is none.
    """
    unet = require_unet(model, "RASG")
    if not any(t.factor == FACTOR for t in transformer_places(unet)):
        raise ValueError(
            "RASG reads the cross-attention at 1/32 of the picture, and this UNet has none there; load an SD1.5, SD2 or SDXL "
            "checkpoint."
        )
    mask = None if settings.mask is None else as_mask_batch(settings.mask)
    if not settings.strength:
        return _with_guidance(model.clone(), rasg=None)
    # Weights that the host may evict between the forward and the backward pass cannot be differentiated through.
    return _with_guidance(model.clone(disable_dynamic=True), rasg=replace(settings, mask=mask))


def _with_guidance(model: ModelPatcher, **changes: PAIntA | RASG | None) -> ModelPatcher:
    options: dict[str, Any] = model.model_options
    guidance = options[KEY] = replace(options.get(KEY, Guidance()), **changes)
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    if guidance.painta is not None or guidance.rasg is not None:
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _sample)
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
    """Wrapper around the host's `Sampler.sample`: one run with the guidance that the model's options ask for."""
    rest = (callback, noise, latent_image, denoise_mask, *args)
    guidance = extra_args["model_options"].get(KEY, Guidance())
    _refuse_compiled(extra_args["model_options"])
    painta_hole = _hole_if_any(guidance.painta, guider, noise, denoise_mask, "PAIntA")
    rasg_hole = _hole_if_any(guidance.rasg, guider, noise, denoise_mask, "RASG")
    if painta_hole is None and rasg_hole is None:
        return executor(guider, sigmas, extra_args, *rest, **kwargs)
    run = GuidedRun(guider.inner_model, guidance.painta, painta_hole, guidance.rasg, rasg_hole)
    sampler = run.sampler(executor.class_obj)
    options = run.install(create_model_options_clone(extra_args["model_options"]))
    with _conds_replaced(guider, run.conds_with_chunks(guider.conds)):
        # The next wrapper, or the sampler itself, with a sampler that is a changed copy of the one given.
        following = type(executor).new_class_executor(sampler.sample, sampler, executor.wrappers, executor.idx + 1)
        return following.execute(guider, sigmas, {**extra_args, "model_options": options}, *rest, **kwargs)


def _hole_if_any(
    settings: PAIntA | RASG | None,
    guider: Any,
    noise: torch.Tensor,
    denoise_mask: torch.Tensor | None,
    who: str,
) -> torch.Tensor | None:
    """The hole on the latent grid, [B, 1, h, w] in [0, 1]; None where there is nothing to do (not asked for, or no hole)."""
    if settings is None:
        return None
    mask = denoise_mask if settings.mask is None else settings.mask
    if mask is None:
        masks = (entry.get("concat_mask") for entries in guider.conds.values() for entry in entries)
        mask = next((found for found in masks if found is not None), None)
    if mask is None:
        raise ValueError(
            f"{who} needs to know where the hole is, and neither the latent nor the conditioning has a mask: use "
            f"InpaintModelConditioning or Set Latent Noise Mask, or connect a MASK to the {who} node."
        )
    hole = coverage(as_mask_batch(mask).to(noise.device), (noise.shape[-2], noise.shape[-1]))
    return repeat_to_batch(hole, noise.shape[0]) if bool(hole.any()) else None


def _refuse_compiled(model_options: dict[str, Any]) -> None:
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if "torch.compile" in wrappers:
        raise ValueError(
            "PAIntA and RASG read and edit attention while the model runs, which a compiled model does not allow: take the "
            "TorchCompileModel node out of this graph, or the TrueFill nodes."
        )


@contextmanager
def _conds_replaced(guider: Any, conds: dict[str, list[dict[str, Any]]]) -> Iterator[None]:
    original = guider.conds
    guider.conds = conds
    try:
        yield
    finally:
        guider.conds = original
