"""Reweighting Attention Score Guidance: the noise of a stochastic sampler, replaced by a gradient of equal size.

HD-Painter, section 3.4. The score S of a noisy latent says how well the prompt's cross-attention at 1/32 of the picture
agrees with the hole (equations 8 and 9, with the signs and the shift of the released code); its normalised gradient
takes the place of the noise in DDIM's step (equation 7).

1/32 of the 512 pixels of the paper is a grid of 16x16. On smaller pictures the attention that knows what is where lies at 1/16,
so that the level can be chosen, also by the picture's size (`unet_attention.chosen_factors`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from comfy.k_diffusion.sampling import default_noise_sampler

from ...imaging.masks import hole_cells
from ..core.autograd import full_precision
from ..core.call_rows import Conds, PromptRows, by_role, joined
from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun
from ..core.score_gradient import Grid, ScoreGradient
from ..core.unet_attention import TransformerPlace, chosen_factors, require_grids, require_unet
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
        self._hole = hole
        factors = chosen_factors(settings.grid, (hole.shape[-2], hole.shape[-1]))
        self._gradient = ScoreGradient(run, hole, factors, lambda: RASGScore(hole), settings.name)
        self._due = False
        self._recording = False
        if settings.eta > 0 and _mixes_prompts(run.options):
            logging.warning(
                "RASG: NAGuidance mixes positive and negative prompt inside the model, and RASG evaluates them one after the "
                "other, so NAGuidance has no effect while RASG acts."
            )

    def sampler(self, sampler: Any) -> Any:
        return stochastic_samplers.with_noise(sampler, self._settings.eta, self._noise(sampler), self._settings.sigma)

    def begin_evaluation(self) -> None:
        self._gradient.total = None
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
        return self._gradient.call_unet(call_next, call) if self._recording else call_next(call)

    def _noise(self, sampler: Any) -> stochastic_samplers.NoiseFactory:
        # A sampler without an eta cannot add less noise, so a share of its noise is replaced instead.
        has_eta = stochastic_samplers.has_eta(sampler)
        share = self._settings.strength * (1.0 if has_eta else min(self._settings.eta, 1.0))
        has_hole = self._hole.flatten(1).any(dim=1).view(-1, 1, 1, 1)

        def factory(x: torch.Tensor, seed: int | None) -> stochastic_samplers.NoiseSampler:
            random = default_noise_sampler(x, seed=seed)

            def draw(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
                noise = random(sigma, sigma_next)
                gradient = self._gradient.total
                if gradient is None:
                    return noise
                mixed = share * normalized(gradient).to(noise) + (1.0 - share**2) ** 0.5 * noise
                return torch.where(has_hole, mixed, noise)

            return draw

        return factory


def _mixes_prompts(model_options: dict[str, Any]) -> bool:
    """Whether the host's NAGuidance is on the model."""
    patches = model_options.get("transformer_options", {}).get("patches", {}).get("attn1_output_patch", ())
    return any(getattr(patch, "__name__", "") == "nag_attention_output_patch" for patch in patches)


class RASGScore:
    """S of one call of the UNet on conditional rows."""

    def __init__(self, hole: torch.Tensor) -> None:
        """`hole` [B, 1, h, w] is how much of each latent cell is hole."""
        self._hole = hole
        # By level and group of rows; levels of a very small picture may have the same grid.
        self._scores: dict[tuple[int, PromptRows], torch.Tensor] = {}
        self._blocks: Counter[tuple[int, PromptRows]] = Counter()
        self._grids: dict[int, Grid] = {}

    def read(
        self, place: TransformerPlace, grid: Grid, rows: PromptRows, n: torch.Tensor, context: torch.Tensor
    ) -> None:
        cross = place.cross
        tokens = rows.tokens.words_and_ends.any(dim=0).nonzero()[:, 0].to(context.device)
        query = full_precision(cross.to_q(n))
        key = full_precision(cross.to_k(context[:, tokens]))
        # The mean over heads of q_h . k_h / sqrt(d) is the product over all channels at once.
        scores = query @ key.transpose(1, 2) * (cross.dim_head**-0.5 / cross.heads)
        known = self._scores.get((place.factor, rows))
        self._scores[place.factor, rows] = scores if known is None else known + scores
        self._blocks[place.factor, rows] += 1
        self._grids[place.factor] = grid

    def value(self) -> torch.Tensor:
        """The sum over levels and groups of rows, of all pictures."""
        found = []
        for (factor, rows), scores in self._scores.items():
            hole = hole_cells(rows.cut(self._hole), self._grids[factor]).flatten(1).to(scores.device)
            mean, own = scores / self._blocks[factor, rows], rows.tokens.words_and_ends
            if len(own) == 1:
                found.append(attention_score(mean, hole))
                continue
            own = own[:, own.any(dim=0)].to(scores.device)
            for picture, tokens in enumerate(own):
                here = slice(picture, picture + 1)
                found.append(attention_score(mean[here, :, tokens], hole[here]))
        return torch.stack(found).sum()
