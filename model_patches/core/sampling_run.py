"""One run of a sampler with the methods of step 4: what its model calls need to know, and what they tell each other."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from comfy.model_management import OOM_EXCEPTION, soft_empty_cache
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..hd_painter import stochastic_samplers as stochastic
from ..hd_painter.painta import NeedsConditionalRows, PAIntA, PAIntACall, PAIntAState
from ..hd_painter.rasg import RASG, RASGCall, normalized
from ..pilot.semantic_boundary import BoundaryCall, BoundaryState, SemanticBoundary
from .autograd import as_ordinary, make_weights_ordinary, saving_copies
from .call_rows import CHUNKS_KEY, Chunk, ChunkCond
from .prompt_tokens import prompt_tokens
from .unet_attention import TransformerPlace, transformer_places, use_differentiable_attention

KEY = "TrueFill"
"""Key of our wrappers, and of the nodes' settings in `model_options`."""

Method = TypeVar("Method", PAIntA, RASG, SemanticBoundary)


@dataclass(frozen=True, eq=False)
class Acting(Generic[Method]):
    """A method that acts in a run: its settings, and the hole [B, 1, h, w] on the latent grid."""

    settings: Method
    hole: torch.Tensor


class Reader(Protocol):
    """What reads the attention of the calls whose graph is recorded (see `GuidedRun.read_by`)."""

    def install(
        self, transformer_options: dict[str, Any], places: Sequence[TransformerPlace], chunks: Sequence[Chunk]
    ) -> None:
        """Adds its patches to the options of one call of the UNet."""


class GuidedRun:
    """The state of one run, and the wrappers through which the host's calls reach it."""

    def __init__(
        self,
        model: Any,
        latent: torch.Tensor,
        painta: Acting[PAIntA] | None = None,
        rasg: Acting[RASG] | None = None,
        boundary: Acting[SemanticBoundary] | None = None,
    ):
        """`model` is the host's loaded model, and what is sampled has the shape of `latent`, [B, C, h, w]."""
        self._painta = painta and painta.settings
        self._painta_state = painta and PAIntAState(painta.hole)
        self._rasg = rasg and rasg.settings
        self._rasg_hole = rasg and rasg.hole
        self._boundary: SemanticBoundary | None = None
        self._boundary_state: BoundaryState | None = None
        self._batch, self._latent_size = len(latent), (latent.shape[-2], latent.shape[-1])
        self._model_sampling = model.model_sampling
        self._in_window: dict[PAIntA | RASG | SemanticBoundary, Callable[[float], bool]] = {
            method.settings: _window(self._model_sampling, method.settings)
            for method in (painta, rasg)
            if method is not None
        }
        if boundary is not None:
            self.use_boundary(boundary)
        self._latent_channels = model.latent_format.latent_channels
        self._sigma = 0.0
        self._conditional_first = False
        self._plain_without_relevance = False
        self._gradient_due = False
        self._recording = False
        self._graph_on_cpu = False
        self._gradient: torch.Tensor | None = None
        self._ordinary_weights: set[int] = set()
        self._reader: Reader | None = None
        self._open_while_reading = ExitStack()

    def conds_with_chunks(self, conds: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        """The guider's conditionings, each with its role and token set attached. The given ones are not changed."""
        return {role: [self._with_chunk(role, entry) for entry in entries] for role, entries in conds.items()}

    def _with_chunk(self, role: str, entry: dict[str, Any]) -> dict[str, Any]:
        text = entry["model_conds"].get("c_crossattn")
        if text is None:
            return entry
        with torch.inference_mode(False):
            tokens = prompt_tokens(entry, text.cond)
        chunk = Chunk(role != "negative", tokens)
        return {**entry, "model_conds": {**entry["model_conds"], CHUNKS_KEY: ChunkCond(chunk, self._latent_size)}}

    def install(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """Adds this run's wrappers to `model_options`, which must be the run's own copy."""
        add_wrapper_with_key(
            WrappersMP.CALC_COND_BATCH, KEY, self._calc_cond_batch, model_options, is_model_options=True
        )
        add_wrapper_with_key(
            WrappersMP.DIFFUSION_MODEL, KEY, self._diffusion_model, model_options, is_model_options=True
        )
        return model_options

    def sampler(self, sampler: Any) -> Any:
        """The sampler to run: with RASG a copy whose noise is the gradient, else the given one."""
        if self._rasg is None:
            return sampler
        changed = stochastic.with_noise(sampler, self._rasg.eta, self._noise(sampler), self._rasg.sigma)
        sample = changed.sampler_function

        @functools.wraps(sample)
        def evaluated(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return sample(_Evaluations(model, self), *args, **kwargs)

        changed.sampler_function = evaluated
        return changed

    def begin_evaluation(self) -> None:
        """The sampler is about to evaluate the model: the gradient of the evaluation before is spent."""
        self._gradient = None
        self._gradient_due = self._rasg is not None and self._rasg.eta > 0

    @property
    def has_boundary(self) -> bool:
        return self._boundary is not None

    def use_boundary(self, boundary: Acting[SemanticBoundary]) -> None:
        """From now on the boundary acts."""
        self._boundary, self._boundary_state = boundary.settings, BoundaryState(boundary.hole)
        self._in_window[boundary.settings] = _window(self._model_sampling, boundary.settings)

    @contextmanager
    def read_by(self, reader: Reader) -> Iterator[None]:
        """Within it `reader` reads every call of the UNet, and a graph through the call can be recorded.

        The backward pass belongs into it as well: blocks may run again there.
        """
        self._reader = reader
        try:
            with ExitStack() as self._open_while_reading:
                yield
        finally:
            self._reader = None

    def _noise(self, sampler: Any) -> stochastic.NoiseFactory:
        assert self._rasg is not None and self._rasg_hole is not None
        # A sampler without an eta cannot add less noise, so a share of its noise is replaced instead.
        share = self._rasg.strength * (1.0 if stochastic.has_eta(sampler) else min(self._rasg.eta, 1.0))
        has_hole = self._rasg_hole.flatten(1).any(dim=1).view(-1, 1, 1, 1)

        def factory(x: torch.Tensor, seed: int | None) -> stochastic.NoiseSampler:
            random = default_noise_sampler(x, seed=seed)

            def draw(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
                noise = random(sigma, sigma_next)
                if self._gradient is None:
                    return noise
                mixed = share * normalized(self._gradient).to(noise) + (1.0 - share**2) ** 0.5 * noise
                return torch.where(has_hole, mixed, noise)

            return draw

        return factory

    def _active(self, settings: PAIntA | RASG | SemanticBoundary | None) -> bool:
        return settings is not None and self._in_window[settings](self._sigma)

    def _calc_cond_batch(
        self,
        executor: Any,
        model: Any,
        conds: list[Any],
        x: torch.Tensor,
        timestep: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Wrapper around the host's evaluation of all conditionings at one noise level."""
        self._sigma = float(timestep[0])
        gradient_due, self._gradient_due = self._gradient_due and self._active(self._rasg), False
        negative = [any(_is_negative(entry) for entry in entries or ()) for entries in conds]
        if not any(entries for skip, entries in zip(negative, conds, strict=True) if not skip):
            # Another node (SAG, say) asks for the negative prompt alone: it keeps the relevance found at this noise level.
            with self._without_positive():
                return executor(model, conds, x, timestep, *args, **kwargs)
        if self._painta_state is not None:
            self._painta_state.relevance.clear()
        model_options = args[0] if args else kwargs.get("model_options", {})
        if not (gradient_due or self._conditional_first or "multigpu_clones" in model_options):
            try:
                return executor(model, conds, x, timestep, *args, **kwargs)
            except NeedsConditionalRows:
                # Short of memory the host evaluates the negative prompt by itself, and before the positive one.
                self._conditional_first = True
        self._recording = gradient_due
        try:
            positives = [None if skip else entries for skip, entries in zip(negative, conds, strict=True)]
            out = executor(model, positives, x, timestep, *args, **kwargs)
        finally:
            self._recording = False
        if not any(negative):
            return out
        with self._without_positive():
            negatives = [entries if take else None for take, entries in zip(negative, conds, strict=True)]
            rest = executor(model, negatives, x, timestep, *args, **kwargs)
        return [second if take else first for take, first, second in zip(negative, out, rest, strict=True)]

    @contextmanager
    def _without_positive(self) -> Iterator[None]:
        """No rows of a positive prompt will come: rows for which no relevance is known stay plain."""
        self._plain_without_relevance = True
        try:
            yield
        finally:
            self._plain_without_relevance = False

    def _diffusion_model(
        self,
        executor: Any,
        x: torch.Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Wrapper around one call of the UNet."""
        chunks: tuple[Chunk, ...] | None = kwargs.pop(CHUNKS_KEY, None)
        options = {} if transformer_options is None else transformer_options.copy()
        if chunks is None:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        self._check_rows(x, chunks)
        # ControlNets and some packs' patches (FreeU, say) write into tensors that autograd needs afterwards.
        others_write = control is not None or any(options.get(kind) for kind in ("patches", "patches_replace"))
        unet = executor.class_obj
        places = transformer_places(unet)
        if self._boundary is not None and self._boundary_state is not None and self._active(self._boundary):
            BoundaryCall(self._boundary, places, chunks, context.shape[1], self._boundary_state).install(options)
        painta = nullcontext()
        if self._painta is not None and self._painta_state is not None and self._active(self._painta):
            call = PAIntACall(self._painta, places, chunks, context, self._painta_state, self._plain_without_relevance)
            painta = call.installed(options)
        if self._reader is not None:
            self._open_while_reading.enter_context(painta)
            painta = nullcontext()
        with painta:
            arguments = (timesteps, context, y, control)
            guided = self._recording and self._rasg_hole is not None
            if self._reader is None and not guided:
                return executor(x, *arguments, options, **kwargs)
            if id(unet) not in self._ordinary_weights:
                with torch.inference_mode(False):
                    make_weights_ordinary(unet)
                self._ordinary_weights.add(id(unet))
            if self._reader is None:
                return self._guided_call(executor, x, arguments, kwargs, options, places, chunks, others_write)
            self._reader.install(options, places, chunks)
            use_differentiable_attention(options)
            return executor(x, *as_ordinary(list(arguments)), options, **as_ordinary(kwargs))

    def _guided_call(
        self,
        executor: Any,
        x: torch.Tensor,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        options: dict[str, Any],
        places: list[TransformerPlace],
        chunks: tuple[Chunk, ...],
        others_write: bool,
    ) -> torch.Tensor:
        """One call of the UNet on conditional rows, which adds to the run's gradient."""
        hole = self._rasg_hole
        assert hole is not None

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            rasg = RASGCall(places, chunks, hole, self._latent_channels)
            copies = others_write or self._graph_on_cpu
            saving = saving_copies(executor.class_obj, self._graph_on_cpu) if copies else nullcontext()
            return rasg.run(executor, x, arguments, keywords, options.copy(), saving), rasg.gradient

        try:
            output, gradient = call()
        except OOM_EXCEPTION:
            if self._graph_on_cpu:
                raise
            logging.info("RASG: the graph does not fit on the GPU and goes to main memory, which is slower.")
            self._graph_on_cpu = True
            soft_empty_cache()
            output, gradient = call()
        self._add_gradient(gradient, chunks)
        return output

    def _add_gradient(self, gradient: torch.Tensor, chunks: tuple[Chunk, ...]) -> None:
        assert self._rasg_hole is not None
        batch, _, height, width = self._rasg_hole.shape
        if self._gradient is None:
            self._gradient = gradient.new_zeros(batch, gradient.shape[1], height, width)
        for chunk, part in zip(chunks, gradient.split(batch), strict=True):
            target = chunk.cut(self._gradient)
            target += part.to(target.device)

    def _check_rows(self, x: torch.Tensor, chunks: tuple[Chunk, ...]) -> None:
        height, width = self._latent_size if chunks[0].area is None else chunks[0].area[:2]
        if tuple(x.shape[-2:]) != (height, width) or x.shape[0] != self._batch * len(chunks):
            raise ValueError(
                f"PAIntA, RASG, Semantic Boundary and PILOT expected latents of {width}x{height} cells and the model was called "
                f"with {x.shape[-1]}x{x.shape[-2]}: another node cuts the latent into tiles; take it or the TrueFill nodes out."
            )


class _Evaluations:
    """The model as a sampler calls it, telling the run when an evaluation begins."""

    def __init__(self, model: Any, run: GuidedRun):
        self._model = model
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._run.begin_evaluation()
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _is_negative(entry: dict[str, Any]) -> bool:
    cond = entry["model_conds"].get(CHUNKS_KEY)
    return cond is None or not cond.chunk.conditional


def _window(model_sampling: Any, settings: PAIntA | RASG | SemanticBoundary) -> Callable[[float], bool]:
    """Whether a noise level lies between start and end, in percent of sampling."""
    first = model_sampling.percent_to_sigma(settings.start_percent)
    last = model_sampling.percent_to_sigma(settings.end_percent)
    return lambda sigma: last < sigma <= first
