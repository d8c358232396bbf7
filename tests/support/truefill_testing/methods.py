"""Every method that samples, on a small model, by one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from devtools.pack import load_pack, pack_module

from .branch_scene import SmallBranch
from .joint_scene import JointScene, two_holes, with_boundary, with_painta
from .pilot_scene import sampler
from .scene import Scene, randn
from .subject_weights import random_assign

load_pack()
_with_method = pack_module("model_patches.core.sampling_run").with_method
_PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
_RASG = pack_module("model_patches.hd_painter.rasg").RASG
_SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary
_BestStart = pack_module("model_patches.starts.best_start").BestStart
_NoiseSearch = pack_module("model_patches.starts.noise_search").NoiseSearch
_Refine = pack_module("model_patches.lar_gen.reference").Refine

STEPS = 2
TRANSFORMERS = ("flux", "z_image", "wan")
"""Families without a UNet on which "SBC, PAIntA" is tried: with two kinds of blocks, with one, with a cross-attention."""


@dataclass(frozen=True)
class Method:
    """How it comes onto a model; what it works on here; whether it is a sampler of its own."""

    on: Callable[[Any], Any]
    inpainting: bool = True
    is_sampler: bool = False


METHODS = {
    "none": Method(lambda model: model),
    "PAIntA": Method(lambda model: _with_method(model, _PAIntA(end_percent=1.0))),
    "RASG": Method(lambda model: _with_method(model, _RASG(eta=0.1))),
    "SBC": Method(lambda model: _with_method(model, _SemanticBoundary())),
    "PAIntA, RASG": Method(lambda model: _with_method(_with_method(model, _PAIntA(end_percent=1.0)), _RASG(eta=0.1))),
    "Best Start": Method(lambda model: _with_method(model, _BestStart(candidates=2, announce=lambda text: None))),
    "Noise Search": Method(lambda model: _with_method(model, _NoiseSearch(rate=0.2, announce=lambda text: None))),
    "Assign": Method(lambda model: _with_method(model, random_assign(model.model.diffusion_model))),
    "Refine": Method(
        lambda model: _with_method(model, _Refine(latents=randn(1, 4, 8, 8, seed=9).float(), is_one=True))
    ),
    "Branch": Method(lambda model: SmallBranch("sd15").on(model), inpainting=False),
    "PILOT": Method(lambda model: model, inpainting=False, is_sampler=True),
}


def sampled(name: str, model: Any, callback: Any = None) -> torch.Tensor:
    """Two steps of a method on a small SD1.5 model (of `small_model`, which it has to fit); the final latent."""
    method = METHODS[name]
    scene = Scene("sd15", bool(model.model.concat_keys), True, torch.float32)
    scene.CFG = 2.0
    chosen = sampler(interval=1, iterations=1) if method.is_sampler else "euler"
    return scene.host(scene.sigmas("simple", STEPS), method.on(model), sampler=chosen, callback=callback)


def sampled_by_transformer(family: str, model: Any, acts: bool = True, callback: Any = None) -> torch.Tensor:
    """Two steps of SBC with PAIntA, or of neither, on a model of `small_transformer`; the final latent."""
    scene = JointScene(family, hole=two_holes()[:1])
    if acts:
        model = with_painta(scene, with_boundary(scene, model))
    return scene.host(model, callback=callback)
