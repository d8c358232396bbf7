"""Reweighting Attention Score Guidance: the noise of a stochastic sampler, replaced by a gradient of equal size.

HD-Painter, section 3.4. The score S of a noisy latent says how well the prompt's cross-attention at 1/32 of the picture
agrees with the hole (equations 8 and 9, with the signs and the shift of the released code); its normalised gradient
takes the place of the noise in DDIM's step (equation 7).

1/32 of the 512 pixels of the paper is a grid of 16x16. On smaller pictures the attention that knows what is where lies at 1/16,
so that the level can be chosen, also by the picture's size (`unet_attention.chosen_factors`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from comfy.k_diffusion.sampling import default_noise_sampler
from comfy.model_management import OOM_EXCEPTION, soft_empty_cache

from ...imaging.masks import hole_cells
from ..core.autograd import as_ordinary, full_precision, gradients_enabled, saving_copies
from ..core.call_rows import Conds, by_role, joined
from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun
from ..core.unet_attention import (
    Place,
    add_patch,
    chosen_factors,
    require_grids,
    require_unet,
    use_differentiable_attention,
)
from . import stochastic_samplers

SHIFT = 1.0
"""Subtracted from the attention scores before they are compared with the hole (released code, not in the paper)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RASG(Method):
    """Settings of RASG. `strength` is the share of the noise that is replaced, `eta` DDIM's, and `sigma` "ddim" or "released"
    (see `stochastic_samplers.released_over_ddim`). `grid` is where attention is read (see `unet_attention.chosen_factors`); the
    paper's by default. For models with a Stable Diffusion UNet and cross-attention there."""

    name: ClassVar = "RASG"
    order: ClassVar = 300
    records_graph: ClassVar = True

    eta: float = 0.01
    sigma: str = "ddim"
    grid: str = "1/32"

    def check(self, model: object) -> None:
        require_grids(require_unet(model, self.name), self.grid, self.name)

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        return RASGRun(self, run, hole)


def attention_score(scores: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """S = - sum over tokens of the mean over pixels of BCE(sigmoid(a - 1), hole), summed over the batch (equation 9).

    `scores` is [B, pixels, tokens], the mean of raw attention scores over layers and heads; `hole` bool [B, pixels].
    """
    target = hole[..., None].expand_as(scores).to(scores.dtype)
    loss = F.binary_cross_entropy_with_logits(scores - SHIFT, target, reduction="none")
    return -loss.mean(dim=1).sum()


def normalized(gradient: torch.Tensor) -> torch.Tensor:
    """`gradient` [B, C, H, W] divided by the standard deviation of each picture's; a zero gradient stays zero."""
    deviation = gradient.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    return gradient / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


class RASGRun(MethodRun):
    """RASG in one run: while it acts, the noise that the sampler asks for is the gradient of the evaluation before."""

    def __init__(self, settings: RASG, run: SamplingRun, hole: torch.Tensor) -> None:
        run.require_finite(settings.name)
        self._settings = settings
        self._run = run
        self._hole = hole
        self._factors = chosen_factors(settings.grid, (hole.shape[-2], hole.shape[-1]))
        self._due = False
        self._recording = False
        self._graph_on_cpu = False
        self._gradient: torch.Tensor | None = None
        if settings.eta > 0 and _mixes_prompts(run.options):
            logging.warning(
                "RASG: NAGuidance mixes positive and negative prompt inside the model, and RASG evaluates them one after the "
                "other, so NAGuidance has no effect while RASG acts."
            )

    def sampler(self, sampler: Any) -> Any:
        return stochastic_samplers.with_noise(sampler, self._settings.eta, self._noise(sampler), self._settings.sigma)

    def begin_evaluation(self) -> None:
        self._gradient = None
        self._due = self._settings.eta > 0

    def evaluate(self, call_next: Callable[[Conds], list[torch.Tensor]], conds: Conds) -> list[torch.Tensor]:
        due, self._due = self._due, False
        positives, negatives = by_role(conds)
        if not due or positives is None:
            return call_next(conds)
        self._recording = True
        try:
            out = call_next(positives)
        finally:
            self._recording = False
        return out if negatives is None else joined(out, call_next(negatives), negatives)

    def call_unet(self, call_next: Callable[[UNetCall], torch.Tensor], call: UNetCall) -> torch.Tensor:
        if not self._recording:
            return call_next(call)
        self._run.make_weights_ordinary(call.unet)
        try:
            output, gradient = self._guided(call_next, call)
        except OOM_EXCEPTION:
            if self._graph_on_cpu:
                raise
            logging.info("RASG: the graph does not fit on the GPU and goes to main memory, which is slower.")
            self._graph_on_cpu = True
            soft_empty_cache()
            output, gradient = self._guided(call_next, call)
        self._add(gradient, call)
        return output

    def _guided(
        self, call_next: Callable[[UNetCall], torch.Tensor], call: UNetCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        guided = RASGCall(call, self._hole, self._factors, self._run.model.latent_format.latent_channels)
        copies = call.others_write or self._graph_on_cpu
        saving = saving_copies(call.unet, self._graph_on_cpu) if copies else nullcontext()
        return guided.run(call_next, saving), guided.gradient

    def _add(self, gradient: torch.Tensor, call: UNetCall) -> None:
        batch, _, height, width = self._hole.shape
        if self._gradient is None:
            self._gradient = gradient.new_zeros(batch, gradient.shape[1], height, width)
        for rows, part in zip(call.rows, gradient.split(batch), strict=True):
            target = rows.cut(self._gradient)
            target += part.to(target.device)

    def _noise(self, sampler: Any) -> stochastic_samplers.NoiseFactory:
        # A sampler without an eta cannot add less noise, so a share of its noise is replaced instead.
        has_eta = stochastic_samplers.has_eta(sampler)
        share = self._settings.strength * (1.0 if has_eta else min(self._settings.eta, 1.0))
        has_hole = self._hole.flatten(1).any(dim=1).view(-1, 1, 1, 1)

        def factory(x: torch.Tensor, seed: int | None) -> stochastic_samplers.NoiseSampler:
            random = default_noise_sampler(x, seed=seed)

            def draw(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
                noise = random(sigma, sigma_next)
                if self._gradient is None:
                    return noise
                mixed = share * normalized(self._gradient).to(noise) + (1.0 - share**2) ** 0.5 * noise
                return torch.where(has_hole, mixed, noise)

            return draw

        return factory


def _mixes_prompts(model_options: dict[str, Any]) -> bool:
    """Whether the host's NAGuidance is on the model."""
    patches = model_options.get("transformer_options", {}).get("patches", {}).get("attn1_output_patch", ())
    return any(getattr(patch, "__name__", "") == "nag_attention_output_patch" for patch in patches)


class RASGCall:
    """RASG within one call of the UNet on conditional rows: eps as ever, and the gradient of S on the way."""

    def __init__(self, call: UNetCall, hole: torch.Tensor, factors: tuple[int, ...], latent_channels: int):
        self._call = call
        self._read = {t.place: t for t in call.places if t.factor in factors}
        self._last = list(self._read)[-1]
        self._hole = hole
        self._factors = factors
        self._latent_channels = latent_channels
        # By level and group of rows.
        self._scores: dict[tuple[int, int], torch.Tensor] = {}
        self._grids: dict[int, tuple[int, int]] = {}
        self._latent = torch.empty(0)
        self.gradient = torch.empty(0)
        """After the call: dS / dz, [rows, C, h, w]."""

    def run(self, call_next: Callable[[UNetCall], torch.Tensor], saving: AbstractContextManager[Any]) -> torch.Tensor:
        """Makes the call and returns its output, detached.

        The graph ends at the last block that is read: the backward pass runs there and then, before the expensive finer output
        blocks, which record nothing. `saving` is the context in which the graph is recorded (see `autograd.saving_copies`).
        Raises RuntimeError where the gradient is not finite.
        """
        call = self._call
        with gradients_enabled(), saving:
            self._latent = full_precision(call.x[:, : self._latent_channels]).clone().requires_grad_()
            rest = as_ordinary(call.x[:, self._latent_channels :].clone())
            options = call.options.copy()
            add_patch(options, "attn2_patch", self._read_scores)
            use_differentiable_attention(options)
            output = call_next(
                replace(call.ordinary(), x=torch.cat((self._latent.to(call.x.dtype), rest), dim=1), options=options)
            )
        return output.detach()

    def _read_scores(
        self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        place: Place = (*extra_options["block"], extra_options["block_index"])
        read = self._read.get(place)
        if read is None:
            return n, context, value
        cross = read.cross
        self._grids[read.factor] = tuple(extra_options["activations_shape"][-2:])
        batch = self._hole.shape[0]
        for number, rows in enumerate(self._call.rows):
            here = slice(number * batch, (number + 1) * batch)
            tokens = rows.tokens.words_and_ends.any(dim=0).nonzero()[:, 0].to(context.device)
            query = full_precision(cross.to_q(n[here]))
            key = full_precision(cross.to_k(context[here][:, tokens]))
            # The mean over heads of q_h . k_h / sqrt(d) is the product over all channels at once.
            scores = query @ key.transpose(1, 2) * (cross.dim_head**-0.5 / cross.heads)
            known = self._scores.get((read.factor, number))
            self._scores[read.factor, number] = scores if known is None else known + scores
        if place == self._last:
            self.gradient = self._gradient()
            torch.set_grad_enabled(False)
        return n, context, value

    def _score(self, factor: int) -> torch.Tensor:
        """S of all rows at one level."""
        score = self._latent.new_zeros(())
        blocks = sum(t.factor == factor for t in self._read.values())
        for number, rows in enumerate(self._call.rows):
            hole = hole_cells(rows.cut(self._hole), self._grids[factor]).flatten(1).to(self._latent.device)
            scores, own = self._scores[factor, number] / blocks, rows.tokens.words_and_ends
            if len(own) == 1:
                score = score + attention_score(scores, hole)
                continue
            own = own[:, own.any(dim=0)].to(scores.device)
            for picture, tokens in enumerate(own):
                here = slice(picture, picture + 1)
                score = score + attention_score(scores[here, :, tokens], hole[here])
        return score

    def _gradient(self) -> torch.Tensor:
        score = torch.stack([self._score(factor) for factor in self._factors]).sum()
        # Half precision would lose the small gradient of a mean over many pixels.
        scale = (
            float(max(math.prod(grid) for grid in self._grids.values())) if self._call.x.dtype == torch.float16 else 1.0
        )
        (gradient,) = torch.autograd.grad(score * scale, self._latent)
        if not bool(gradient.isfinite().all()):
            dtype = str(self._call.x.dtype).removeprefix("torch.")
            remedy = (
                "start ComfyUI with --bf16-unet or --fp32-unet"
                if self._call.x.dtype in (torch.float16, torch.bfloat16)
                else "the prompt, the checkpoint or a LoRA holds NaN or infinite values, so encode or load it anew"
            )
            raise RuntimeError(f"RASG's gradient is not finite in {dtype}: {remedy}, or take the RASG node out.")
        return gradient / scale
