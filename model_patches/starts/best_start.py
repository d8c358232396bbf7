"""Several noises begin, and the one that the attention finds best goes on.

HD-Painter's score says at each step how well the prompt's attention agrees with the hole. RASG climbs it; this only looks: every
candidate runs for the first part of the schedule, then its cross-attention is read (`reading`), and for each picture of the batch
the candidate with the highest score is sampled to the end. No gradient, any of the host's samplers. Ours, not the paper's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from comfy.samplers import KSAMPLER

from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun
from ..core.unet_attention import AUTO, chosen_factors, require_grids, require_unet
from .reading import AttentionScore

NAME = "Best Start"

_SEEDS = 2**64


@dataclass(frozen=True, eq=False, kw_only=True)
class BestStart(Method):
    """Settings.

    candidates: how many noises begin: the run's own, and those of the following seeds.
    choose_at: after which share of the run's steps one is chosen, in (0, 1).
    grid: where attention is read, see `unet_attention.chosen_factors`.
    announce: is told what a run costs before it starts, and what was chosen.
    """

    name: ClassVar = NAME
    order: ClassVar = 900

    candidates: int = 4
    choose_at: float = 0.5
    grid: str = AUTO
    announce: Callable[[str], None] = logging.info

    def check(self, model: object) -> None:
        require_grids(require_unet(model, self.name), self.grid, self.name)

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        run.require_finite(self.name)
        return BestStartRun(self, run, hole)


class BestStartRun(MethodRun):
    """Best Start in one run."""

    def __init__(self, settings: BestStart, run: SamplingRun, hole: torch.Tensor) -> None:
        self.settings = settings
        self.run = run
        self.hole = hole
        self._score: AttentionScore | None = None

    def sampler(self, sampler: Any) -> Any:
        if not isinstance(sampler, KSAMPLER) or type(sampler).sample is not KSAMPLER.sample:
            raise ValueError(
                f"{NAME} begins with several noises and goes on with one, which {type(sampler).__name__} can't: take the Best "
                "Start node out, or choose one of the KSampler's samplers."
            )
        return _Candidates(sampler, self)

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        return nullcontext() if self._score is None else self._score.reader.edit(call)

    @contextmanager
    def reading(self) -> Iterator[AttentionScore]:
        """Reads the attention of the evaluation within the context."""
        height, width = self.hole.shape[-2:]
        factors = chosen_factors(self.settings.grid, (height, width))
        self._score = AttentionScore(self.hole, factors)
        try:
            yield self._score
        finally:
            self._score = None


class _Read(Exception):
    """Ends a candidate's run: its attention has been read."""


class _Start:
    """A candidate: its noise, what the model answered to it up to the choice, and its score."""

    def __init__(self, noise: torch.Tensor) -> None:
        self.noise = noise
        self.answers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.score: torch.Tensor | None = None

    def recorded(self, model: Any, method: BestStartRun, sigma_of_choice: float) -> _Model:
        """The model for the candidate's run, which ends by `_Read` at the first evaluation at or below a noise level."""

        def evaluate(x: torch.Tensor, sigma: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
            is_last = float(sigma[0]) <= sigma_of_choice * (1 + 1e-6)
            with method.reading() if is_last else nullcontext() as score:
                answer = model(x, sigma, *args, **keywords)
            self.answers.append((x.clone(), answer.clone()))
            if score is not None:
                self.score = score.value() if score.has_read else None
                raise _Read
            return answer

        return _Model(model, evaluate)


class _Candidates(KSAMPLER):
    """A host sampler that runs for each candidate up to the choice, and then to the end for the chosen ones."""

    def __init__(self, sampler: KSAMPLER, method: BestStartRun) -> None:
        super().__init__(sampler.sampler_function, sampler.extra_options, sampler.inpaint_options)
        self._method = method

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[int, torch.Tensor, torch.Tensor, int], None] | None,
        noise: torch.Tensor,
        *rest: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        """The host's call: latents [B, C, h, w] in the model's scale. `callback` hears of the candidates' steps as well."""
        method, settings, steps = self._method, self._method.settings, len(sigmas) - 1
        early = min(max(1, round(settings.choose_at * steps)), steps - 1)
        count = settings.candidates
        # Without noise, and in a single step, all would be the same.
        if count < 2 or early < 1 or not bool(noise.any()):
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, *rest, **keywords)

        def run(noise: torch.Tensor, steps_before: int, model_for_run: Callable[[Any], Any]) -> torch.Tensor:
            def step(index: int, denoised: torch.Tensor, x: torch.Tensor, _: int) -> None:
                if callback is not None:
                    callback(steps_before + index, denoised, x, count * early + steps)

            @functools.wraps(self.sampler_function)
            def sampler_function(model: Any, *args: Any, **options: Any) -> torch.Tensor:
                return self.sampler_function(model_for_run(model), *args, **options)

            sampler = KSAMPLER(sampler_function, self.extra_options, self.inpaint_options)
            return sampler.sample(model_wrap, sigmas, dict(extra_args), step, noise, *rest, **keywords)

        again = method.run.needs_every_evaluation
        total = count * (early + 1) + steps - (0 if again else early + 1)
        settings.announce(
            f"{NAME}: {count} candidates for {early} of {steps} steps, then the best: the time of {total} steps, not {steps}."
        )
        seed = extra_args.get("seed") or 0
        others = (_noise_of(seed + number, noise) for number in range(1, count))
        starts = [
            _Start(noise),
            *(_Start(method.run.first_noise(sigmas, extra_args, other, *rest[:2])) for other in others),
        ]
        for number, start in enumerate(starts):
            # What a sampler takes from the global generator shall be the same for all.
            with torch.random.fork_rng([noise.device] if noise.device.type == "cuda" else []), suppress(_Read):
                run(
                    start.noise,
                    number * early,
                    lambda model, own=start: own.recorded(model, method, float(sigmas[early])),
                )
        chosen = _choice(starts, len(noise))
        settings.announce(_verdict(starts, [(seed + number) % _SEEDS for number in chosen]))
        known = [] if again else _answers_of(starts, chosen)
        picked = torch.stack([starts[number].noise[picture] for picture, number in enumerate(chosen)])
        return run(picked, count * early, lambda model: _replayed(model, known))


class _Model:
    """The model as a sampler knows it, with other evaluations."""

    def __init__(self, model: Any, evaluate: Callable[..., torch.Tensor]) -> None:
        self._model = model
        self._evaluate = evaluate

    def __call__(self, *args: Any, **keywords: Any) -> torch.Tensor:
        return self._evaluate(*args, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _replayed(model: Any, known: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Model:
    """The model, which needn't answer again what it is known to have answered, as long as it is asked the same."""
    left = list(reversed(known))

    def evaluate(x: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        if left:
            asked, answer = left.pop()
            if torch.equal(asked, x):
                return answer
            left.clear()
        return model(x, *args, **keywords)

    return _Model(model, evaluate)


def _noise_of(seed: int, like: torch.Tensor) -> torch.Tensor:
    """What the host's KSampler begins with at this seed."""
    generator = torch.Generator().manual_seed(seed % _SEEDS)
    return torch.randn(like.shape, generator=generator).to(like)


def _choice(starts: Sequence[_Start], pictures: int) -> list[int]:
    """For each picture the number of its best start; the first where they are equal, or nobody could read."""
    if any(start.score is None for start in starts):
        return [0] * pictures
    scores = torch.stack([start.score for start in starts if start.score is not None]).nan_to_num(nan=-torch.inf)
    columns = scores.T.tolist()
    return [column.index(max(column)) for column in columns]


def _verdict(starts: Sequence[_Start], seeds: Sequence[int]) -> str:
    if any(start.score is None for start in starts):
        return f"{NAME}: no positive prompt acts where the choice is due, so the first noise goes on."
    return f"{NAME}: the noise of seed {', '.join(map(str, seeds))} goes on."


def _answers_of(starts: Sequence[_Start], chosen: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the model was asked and answered, each picture's as in its own start."""
    calls = min(len(start.answers) for start in starts)

    def picked(call: int, part: int) -> torch.Tensor:
        return torch.stack([starts[number].answers[call][part][picture] for picture, number in enumerate(chosen)])

    return [(picked(call, 0), picked(call, 1)) for call in range(calls)]
