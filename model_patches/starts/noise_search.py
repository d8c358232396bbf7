"""Before sampling begins, the noise in the hole climbs the score that Best Start chooses by.

What the first noise says to cross-attention decides much of where things go. The score is differentiated through one evaluation
of the model at the first noise level, a step is made along it, and the noise gets back its mean and its deviation, so that the
model sees what it was trained on. The idea is FreeInpaint's (arXiv 2512.21104); score, step and renormalizing are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.call_rows import Conds, by_role
from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun
from ..core.score_gradient import ScoreGradient
from ..core.unet_attention import AUTO, chosen_factors, require_grids, require_unet
from .reading import AttentionScore

NAME = "Noise Search"


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseSearch(Method):
    """Settings.

    steps: how many steps are made.
    rate: how far each goes: the root mean square of its change of the noise in the hole, whose deviation is 1.
    grid: where attention is read, see `unet_attention.chosen_factors`.
    announce: is told what the search costs before it starts.
    """

    name: ClassVar = NAME
    order: ClassVar = 850
    records_graph: ClassVar = True

    steps: int = 1
    rate: float = 0.2
    grid: str = AUTO
    announce: Callable[[str], None] = logging.info

    def check(self, model: object) -> None:
        require_grids(require_unet(model, self.name), self.grid, self.name)

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        run.require_finite(self.name)
        return NoiseSearchRun(self, run, hole)


class NoiseSearchRun(MethodRun):
    """The search in one run."""

    def __init__(self, settings: NoiseSearch, run: SamplingRun, hole: torch.Tensor) -> None:
        self._settings = settings
        self._hole = hole
        factors = chosen_factors(settings.grid, (hole.shape[-2], hole.shape[-1]))
        self._gradient = ScoreGradient(run, hole, factors, lambda: AttentionScore(hole, factors), settings.name)
        self._looking = False
        self._recording = False
        self._said = False

    def noise(self, noise: torch.Tensor, look: Callable[[torch.Tensor], None]) -> torch.Tensor:
        # As the advanced KSampler has it without 'add noise'.
        if not bool(noise.any()):
            return noise
        settings = self._settings
        if not self._said:
            self._said = True
            often = "once" if settings.steps == 1 else f"{settings.steps} times"
            settings.announce(
                f"{NAME}: evaluates the positive prompt {often} with a gradient for each noise that begins."
            )
        for _ in range(settings.steps):
            self._gradient.total, self._looking = None, True
            try:
                look(noise)
            finally:
                self._looking = False
            if self._gradient.total is None:
                settings.announce(f"{NAME}: no positive prompt acts at the first step, so the noise stays as it is.")
                break
            noise = climbed(noise, self._gradient.total, self._hole > 0, settings.rate)
        return noise

    def evaluate(self, call_next: Callable[[Conds], list[torch.Tensor]], conds: Conds) -> list[torch.Tensor]:
        positives, _ = by_role(conds) if self._looking else (None, None)
        if positives is None:
            return call_next(conds)
        self._recording = True
        try:
            # Nobody looks at the answer, and the negative prompts have no say.
            return call_next(positives)
        finally:
            self._recording = False

    def call_unet(self, call_next: Callable[[UNetCall], torch.Tensor], call: UNetCall) -> torch.Tensor:
        return self._gradient.call_unet(call_next, call) if self._recording else call_next(call)


def climbed(noise: torch.Tensor, gradient: torch.Tensor, inside: torch.Tensor, rate: float) -> torch.Tensor:
    """`noise` [B, C, h, w] after one step along `gradient` in the hole, `inside` (bool [B, 1, h, w]).

    The step's root mean square in each picture's hole is `rate`; then the noise there gets back its mean and its deviation. Where
    the gradient is zero, and outside of the hole, the noise stays as it is, bit for bit.
    """
    inside, found = inside.to(noise.device).expand_as(noise), noise.clone()
    for picture, own in enumerate(inside):
        before, step = noise[picture][own], gradient[picture].to(noise)[own]
        size = step.square().mean().sqrt()
        if before.numel() > 1 and bool(size > 0):
            after = before + rate * step / size
            found[picture][own] = (after - after.mean()) / after.std() * before.std() + before.mean()
    return found
