"""PAIntA, RASG and semantic boundaries on a host MODEL: one composer for all, in any order, next to other packs' patches.

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

from ...imaging.masks import as_mask_batch, coverage
from ..hd_painter.painta import PAIntA
from ..hd_painter.rasg import FACTOR, RASG
from ..pilot.semantic_boundary import SemanticBoundary
from .call_rows import repeat_to_batch
from .sampling_run import KEY, Acting, GuidedRun, Method
from .unet_attention import require_unet, transformer_places

RUN_KEY = "TrueFill run"
"""Where the options of a run have its `GuidedRun`."""


@dataclass(frozen=True, eq=False)
class Guidance:
    """What the nodes have asked for. Never changed, only replaced: clones of a model share it."""

    painta: PAIntA | None = None
    rasg: RASG | None = None
    boundary: SemanticBoundary | None = None


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


def with_boundary(model: ModelPatcher, settings: SemanticBoundary) -> ModelPatcher:
    """Returns a clone of `model` in which known pixels read none of the prompt. Strength 0 is the model as it was before.

    `settings.mask` ([H, W] or [B, H, W], 1 = hole) overrules the masks of latent and conditioning. Raises ValueError for a
    model without a Stable Diffusion UNet, and for a mask that is none.
    """
    require_unet(model, "Semantic Boundary")
    mask = None if settings.mask is None else as_mask_batch(settings.mask)
    return _with_guidance(model.clone(), boundary=replace(settings, mask=mask) if settings.strength else None)


def _with_guidance(model: ModelPatcher, **changes: PAIntA | RASG | SemanticBoundary | None) -> ModelPatcher:
    options: dict[str, Any] = model.model_options
    guidance = options[KEY] = replace(options.get(KEY, Guidance()), **changes)
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    if any((guidance.painta, guidance.rasg, guidance.boundary)):
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
    refuse_compiled(extra_args["model_options"])
    painta = _acting(guidance.painta, guider, noise, denoise_mask, "PAIntA")
    rasg = _acting(guidance.rasg, guider, noise, denoise_mask, "RASG")
    boundary = _acting(guidance.boundary, guider, noise, denoise_mask, "Semantic Boundary")
    if painta is None and rasg is None and boundary is None:
        return executor(guider, sigmas, extra_args, *rest, **kwargs)
    run = GuidedRun(guider.inner_model, noise, painta, rasg, boundary)
    sampler = run.sampler(executor.class_obj)
    with installed(run, guider, extra_args["model_options"]) as options:
        # The next wrapper, or the sampler itself, with a sampler that is a changed copy of the one given.
        following = type(executor).new_class_executor(sampler.sample, sampler, executor.wrappers, executor.idx + 1)
        return following.execute(guider, sigmas, {**extra_args, "model_options": options}, *rest, **kwargs)


def _acting(
    settings: Method | None,
    guider: Any,
    noise: torch.Tensor,
    denoise_mask: torch.Tensor | None,
    who: str,
) -> Acting[Method] | None:
    """The method with the hole on the latent grid; None where there is nothing to do (not asked for, or no hole)."""
    if settings is None:
        return None
    hole = hole_on_latent(settings.mask, guider, noise, denoise_mask, who)
    return Acting(settings, hole) if bool(hole.any()) else None


def hole_on_latent(
    mask: torch.Tensor | None, guider: Any, noise: torch.Tensor, denoise_mask: torch.Tensor | None, who: str
) -> torch.Tensor:
    """How much of each cell of the latent is hole, [B, 1, h, w], by `mask`, else by what the latent or the conditioning says.

    Raises ValueError where none of them has a mask.
    """
    mask = denoise_mask if mask is None else mask
    if mask is None:
        masks = (entry.get("concat_mask") for entries in guider.conds.values() for entry in entries)
        mask = next((found for found in masks if found is not None), None)
    if mask is None:
        raise ValueError(
            f"{who} needs to know where the hole is, and neither the latent nor the conditioning has a mask: use "
            f"InpaintModelConditioning or Set Latent Noise Mask, or connect a MASK to the {who} node."
        )
    hole = coverage(as_mask_batch(mask).to(noise.device), (noise.shape[-2], noise.shape[-1]))
    return repeat_to_batch(hole, noise.shape[0])


def refuse_compiled(model_options: dict[str, Any]) -> None:
    """Raises ValueError, in one sentence, for the options of a compiled model."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if "torch.compile" in wrappers:
        raise ValueError(
            "PAIntA, RASG, Semantic Boundary and PILOT read and edit attention while the model runs, which a compiled model does "
            "not allow: take the TorchCompileModel node out of this graph, or the TrueFill nodes."
        )


@contextmanager
def installed(run: GuidedRun, guider: Any, model_options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options with which the model takes part in `run`, and the guider's conditionings with what it has to know of them."""
    options = run.install(create_model_options_clone(model_options))
    options[RUN_KEY] = run
    original = guider.conds
    guider.conds = run.conds_with_chunks(original)
    try:
        yield options
    finally:
        guider.conds = original
