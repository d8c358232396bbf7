"""An experiment: before sampling begins, the noise in the hole climbs the score that Best Start chooses by.

The idea is FreeInpaint's (arXiv 2512.21104): what the first noise says to cross-attention decides much of where things go. The
score is differentiated through the first evaluation; after each step the noise has its mean and deviation again. It is no node
yet: README says what came out.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ..model_patches.best_start.reading import AttentionScore
from ..model_patches.core.autograd import gradients_enabled
from ..model_patches.core.protocol import Method, MethodRun, UNetCall
from ..model_patches.core.sampling_run import SamplingRun
from ..model_patches.core.unet_attention import AUTO, chosen_factors, use_differentiable_attention
from ..model_patches.hd_painter.rasg import normalized


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseSearch(Method):
    """Settings: how many steps, each of how many deviations of the noise; `scores` are those before each step."""

    name: ClassVar = "Noise search"
    order: ClassVar = 850
    records_graph: ClassVar = True

    steps: int = 10
    rate: float = 0.05
    scores: list[float] = field(default_factory=list)

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        return NoiseSearchRun(self, run, hole)


class NoiseSearchRun(MethodRun):
    """The search in one run, for prompts that act on the whole picture."""

    def __init__(self, settings: NoiseSearch, run: SamplingRun, hole: torch.Tensor) -> None:
        self._settings = settings
        self._run = run
        self._hole = hole
        self._factors = chosen_factors(AUTO, (hole.shape[-2], hole.shape[-1]))
        self._score: AttentionScore | None = None
        self._gradient = torch.empty(0)

    def sampler(self, sampler: Any) -> Any:
        function = sampler.sampler_function

        @functools.wraps(function)
        def searched(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **keywords: Any) -> torch.Tensor:
            evaluate = functools.partial(model, **keywords["extra_args"])
            return function(model, self._search(evaluate, x, sigmas[0]), sigmas, **keywords)

        changed = copy.copy(sampler)
        changed.sampler_function = searched
        return changed

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        return nullcontext() if self._score is None else self._score.reader.edit(call)

    def call_unet(self, call_next: Callable[[UNetCall], torch.Tensor], call: UNetCall) -> torch.Tensor:
        if self._score is None:
            return call_next(call)
        self._run.make_weights_ordinary(call.unet)
        with gradients_enabled():
            x = call.x.clone().requires_grad_()
            options = call.options.copy()
            use_differentiable_attention(options)
            output = call_next(replace(call.ordinary(), x=x, options=options))
            score = self._score.value()
            assert score is not None
            (gradient,) = torch.autograd.grad(score.sum(), x)
        self._settings.scores.append(float(score.sum()))
        channels = self._run.model.latent_format.latent_channels
        self._gradient = gradient[:, :channels].unflatten(0, (len(call.rows), -1)).sum(dim=0)
        return output.detach()

    def _search(self, evaluate: Callable[..., torch.Tensor], x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        inside = (self._hole > 0).to(x.device)
        for _ in range(self._settings.steps):
            self._score = AttentionScore(self._hole, self._factors, differentiable=True)
            try:
                evaluate(x, sigma * x.new_ones(len(x)))
            finally:
                self._score = None
            step = normalized(self._gradient.to(x) * inside)
            x = torch.where(inside, _alike(x + self._settings.rate * sigma * step, x, inside), x)
        return x


def _alike(moved: torch.Tensor, original: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """`moved` with the mean and the deviation that `original` has in each picture's hole."""
    found = []
    for one, other, own in zip(moved, original, inside.expand_as(moved), strict=True):
        before, after = other[own], one[own]
        found.append((one - after.mean()) / after.std() * before.std() + before.mean())
    return torch.stack(found)
