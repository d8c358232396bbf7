"""Pictures with holes and a small diffusion transformer, run by the host with our methods and with the literal attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from devtools.pack import ensure_host, pack_module

from .literal_joint import LiteralRows, literal_joint_attention
from .scene import TOKENS_KEY, randn, relative_error
from .small_transformers import LLAMA_TOKENS, VIDEO_LATENT, latent_shape, small_transformer, transformer_conditioning

ensure_host()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402

_sampling_run = pack_module("model_patches.core.sampling_run")
_PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
_SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary

TOLERANCE = 2.5e-5
"""Of a standard deviation; the host's own runs, with their attention written out in float64, differ by up to 2e-5."""
SIZE = (11, 14)
TOKENS = 9
WORDS = (2, 3, 5)

transformer_of = cache(small_transformer)


def two_holes() -> torch.Tensor:
    """Two pictures of 11x14 cells with different holes, one row of them partly covered."""
    hole = torch.zeros(2, 1, *SIZE)
    hole[0, 0, 3:9, 4:13] = 1.0
    hole[1, 0, 5:11, 2:7] = 1.0
    hole[:, :, 5] *= 0.6
    return hole


class JointScene:
    """A small transformer, a hole for each picture, and two prompts of so many `tokens` (Anima: of T5's).

    The hole is the latent's noise mask, but for latents with frames: there the host takes a batch of masks for frames, and a
    method has to be given `mask`.
    """

    def __init__(
        self,
        family: str,
        hole: torch.Tensor | None = None,
        tokens: int = TOKENS,
        negative_tokens: int | None = None,
        references: Sequence[tuple[int, int]] = (),
        **conditioning: Any,
    ) -> None:
        self.family = family
        self.patcher = transformer_of(family)
        self.hole = two_holes() if hole is None else hole
        self.references = references
        self.mask = self.hole if family in VIDEO_LATENT and len(self.hole) > 1 else None
        self._tokens = (tokens, negative_tokens or tokens)
        kinds = torch.zeros(1, tokens, dtype=torch.long)
        kinds[0, list(WORDS)] = 1
        further = {
            "reference_latents": [
                randn(*latent_shape(family, *size, batch=1), seed=20 + i).float() for i, size in enumerate(references)
            ]
        }
        further = further if references else {}
        self.positive, self.negative = (
            transformer_conditioning(family, seed, count, with_words={**words, **further}, **conditioning)
            for seed, count, words in ((1, self._tokens[0], {TOKENS_KEY: kinds}), (2, self._tokens[1], {}))
        )
        shape = latent_shape(family, *self.hole.shape[-2:], batch=len(self.hole))
        self.noise, self.latent = randn(*shape, seed=3).float(), randn(*shape, seed=4).float()

    def host(self, model: Any = None, cfg: float = 4.0, steps: int = 2, **changes: Any) -> torch.Tensor:
        """The host's own sampling, in inference mode as in a real run."""
        patcher = self.patcher if model is None else model
        sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "simple", steps)
        given = {
            "positive": self.positive,
            "negative": self.negative,
            "noise_mask": self.hole if self.mask is None else None,
        }
        given |= changes
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                patcher,
                self.noise.clone(),
                cfg,
                comfy.samplers.sampler_object("euler"),
                sigmas,
                latent_image=self.latent,
                disable_pbar=True,
                seed=0,
                **given,
            ).clone()

    def literal(self, cfg: float = 4.0, steps: int = 2, parts: Any = None, **edits: Any) -> torch.Tensor:
        """The same with the attention written out (`literal_joint_attention`)."""
        beside = LLAMA_TOKENS if self.family == "hidream" else 0
        of_role = [
            LiteralRows(True, self._tokens[0] + beside, list(WORDS)),
            LiteralRows(False, self._tokens[1] + beside, []),
        ]
        network = self.patcher.model.diffusion_model
        size = (self.hole.shape[-2], self.hole.shape[-1])
        with literal_joint_attention(
            self.family,
            network,
            size,
            self.hole,
            lambda roles: [of_role[role] for role in roles],
            references=self.references,
            parts=parts,
            **edits,
        ):
            return self.host(cfg=cfg, steps=steps)

    def error(self, model: Any, **edits: Any) -> float:
        """How far the host's picture with `model` is from the literal one, in standard deviations."""
        ours = self.host(model)
        assert relative_error(ours, self.host()) > 1e-3, "nothing was changed, so nothing was tested"
        return relative_error(ours, self.literal(**edits))


def with_boundary(scene: JointScene, model: Any = None, **settings: Any) -> Any:
    """The scene's model, or another, with semantic boundary control."""
    given = {"mask": scene.mask, **settings}
    return _sampling_run.with_method(scene.patcher if model is None else model, _SemanticBoundary(**given))


def with_painta(scene: JointScene, model: Any = None, **settings: Any) -> Any:
    """The scene's model, or another, with PAIntA in all of sampling."""
    given = {"mask": scene.mask, "end_percent": 1.0, **settings}
    return _sampling_run.with_method(scene.patcher if model is None else model, _PAIntA(**given))
