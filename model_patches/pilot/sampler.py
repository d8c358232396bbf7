"""PILOT: inpainting with any text-to-image model, by optimising the latent while it is sampled.

arXiv 2407.08019, section 4, as in the released code. At some of the steps the noisy latent goes down the gradient of two losses
of the conditional prediction: the known part of the predicted picture shall be the original's (background preservation), and the
prompt's attention shall lie in the hole (semantic centralisation). Later steps put the noised original into the known part
(blend stage). Every step itself is an ordinary guided one, DDIM's; semantic boundary control acts all the time.

The paper's latents are x / sqrt(1 + s^2) in the host's coordinates, s being the noise level.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import comfy.sampler_helpers
import torch
from comfy.model_management import (
    OOM_EXCEPTION,
    get_free_memory,
    soft_empty_cache,
    throw_exception_if_processing_interrupted,
)
from comfy.model_sampling import ModelSamplingDiscrete
from comfy.samplers import Sampler, calc_cond_batch
from tqdm.auto import tqdm

from ...imaging.masks import as_mask_batch, hole_cells
from ..core.autograd import as_ordinary, gradients_enabled, recomputed, saving_copies, staying
from ..core.refusals import refuse_compiled
from ..core.sampling_run import SamplingRun, running
from ..core.unet_attention import require_unet
from .private_controls import own_controls
from .semantic_boundary import SemanticBoundary
from .semantic_centralisation import Centralisation

NAME = "PILOT"
_ORDER = 400

LR_BASE = 1.002
"""The learning rate grows by this factor with every training timestep towards the clean picture (released code)."""

COEFFICIENT_PIXELS = 1499.0
"""Known latent pixels at which lambda is `coefficient` (released code)."""

GRAPH_ELEMENTS = {"SD": 110_000, "SDXL": 290_000}
"""Numbers that a graph through the whole UNet keeps for each latent pixel, rounded up (`python dev.py bench graph`)."""

Memory = Literal["auto", "record", "recompute"]


@dataclass(frozen=True, eq=False, kw_only=True)
class PILOT:
    """Settings, with the released defaults for text prompts.

    gamma: the coherence scale, the share of the noise schedule in which the latent is optimised; 0.8 with adapters.
    interval: every so many steps are optimised; more than there are steps: none.
    iterations: steps of the optimiser at each of them.
    boundary: strength of semantic boundary control, 0 to 1.
    memory: "record" keeps what the backward pass needs, "recompute" computes most of it again, and "auto" does that where
        the host's free memory would not do.
    mask: [B, 1, H, W], 1 = hole; overrules those of latent and conditioning.
    """

    gamma: float = 1.0
    interval: int = 10
    iterations: int = 10
    learning_rate: float = 0.025
    first_learning_rate: float = 0.007
    momentum: float = 0.7
    coefficient: float = 150.0
    boundary: float = 1.0
    memory: Memory = "auto"
    mask: torch.Tensor | None = None


def background_loss(denoised: torch.Tensor, latent: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """L_bg of each picture, [B]: a quarter of the sum of squares over known pixels (equation 9, released code)."""
    return 0.25 * (known * (latent - denoised)).square().flatten(1).sum(dim=1)


def balance(timestep: float, known: torch.Tensor, coefficient: float) -> torch.Tensor:
    """lambda of equation 15 for each picture, [B]; `known` is [B, 1, h, w].

    A tenth of its full size below timestep 300, from there it rises linearly up to timestep 999.
    """
    rise = max(0.0, (timestep - 300.0) / 699.0)
    return (0.1 + 0.9 * rise) * coefficient * known.flatten(1).sum(dim=1) / COEFFICIENT_PIXELS


def pilot_sampler(settings: PILOT, announce: Callable[[str], None] = logging.info) -> PILOTSampler:
    """A SAMPLER for the host's custom sampling nodes; `announce` is told how many passes a run will take.

    Raises ValueError for a mask that is none.
    """
    mask = None if settings.mask is None else as_mask_batch(settings.mask)
    return PILOTSampler(replace(settings, mask=mask), announce)


class PILOTSampler(Sampler):
    """See `pilot_sampler`. Known latents are near the original's at the end, not equal: put the original's pixels back."""

    def __init__(self, settings: PILOT, announce: Callable[[str], None]):
        self._settings = settings
        self._announce = announce

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[int, torch.Tensor, torch.Tensor, int], None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """The host's call: latents [B, C, h, w] in the model's scale. `callback` hears of every pass.

        Raises ValueError for a model that PILOT cannot optimise through, and where there is no hole or nothing but hole;
        FloatingPointError where a loss is not finite.
        """
        settings, guider, options = self._settings, model_wrap, extra_args["model_options"]
        refuse_compiled(options, NAME)
        _require_text_to_image(guider.inner_model)
        with (
            _weights_that_stay(guider, noise, options),
            running(guider, options, noise, latent_image, denoise_mask) as run,
            own_controls(_positive_entries(guider), guider.inner_model) as positive,
        ):
            run.require_finite(NAME)
            covered = run.hole(settings.mask, NAME)
            hole = hole_cells(covered, (noise.shape[-2], noise.shape[-1]))[:, None].float()
            _require_some_of_both(hole)
            if settings.boundary:
                run.begin(SemanticBoundary(strength=settings.boundary, mask=hole))
            plan = _Plan.of(settings, sigmas, guider.inner_model.model_sampling)
            self._announce(plan.forecast)
            job = _Job(guider, run, settings, positive, latent_image, hole, extra_args.get("seed"))
            with tqdm(total=plan.passes, disable=disable_pbar) as bar:
                done = 0

                def passed(denoised: torch.Tensor, x: torch.Tensor, passes: int = 1) -> None:
                    nonlocal done
                    throw_exception_if_processing_interrupted()
                    bar.update(passes)
                    done += passes
                    if callback is not None:
                        callback(done - 1, denoised, x, plan.passes)

                return job.sample(plan, sigmas, noise, self.max_denoise(guider, sigmas), passed)


@contextmanager
def _weights_that_stay(guider: Any, noise: torch.Tensor, model_options: dict[str, Any]) -> Iterator[None]:
    """Samples with a copy of the model whose weights the host doesn't evict between a forward and its backward pass."""
    patcher, model = guider.model_patcher, guider.inner_model
    if not patcher.is_dynamic():
        yield
        return
    own = staying(patcher)
    guider.inner_model, _, _ = comfy.sampler_helpers.prepare_sampling(own, noise.shape, guider.conds, model_options)
    guider.model_patcher = own
    own.pre_run()
    try:
        yield
    finally:
        own.cleanup()
        guider.model_patcher, guider.inner_model = patcher, model


@dataclass(frozen=True)
class _Plan:
    """Which steps are optimised and which blended: `optimised` and `blended` have one entry for each step."""

    timesteps: list[float]
    optimised: list[bool]
    blended: list[bool]
    iterations: int

    @classmethod
    def of(cls, settings: PILOT, sigmas: torch.Tensor, model_sampling: ModelSamplingDiscrete) -> _Plan:
        timesteps = [float(model_sampling.timestep(sigma)) for sigma in sigmas[:-1]]
        last = 1000.0 - 1000.0 * settings.gamma
        often_enough = settings.iterations > 0 and settings.interval <= len(timesteps)
        due = [often_enough and index % settings.interval == 0 for index in range(len(timesteps))]
        return cls(
            timesteps,
            [is_due and timestep >= last for is_due, timestep in zip(due, timesteps, strict=True)],
            [timestep < last for timestep in timesteps],
            settings.iterations,
        )

    @property
    def passes(self) -> int:
        return sum(self.optimised) * self.iterations + len(self.timesteps)

    @property
    def forecast(self) -> str:
        optimised, steps = sum(self.optimised), len(self.timesteps)
        return (
            f"PILOT: {optimised * self.iterations} passes with a gradient ({self.iterations} at {optimised} of {steps} steps) "
            f"and {steps} guided steps."
        )


class _Job:
    """One run of the sampler."""

    def __init__(
        self,
        guider: Any,
        run: SamplingRun,
        settings: PILOT,
        positive: Sequence[dict[str, Any]],
        latent: torch.Tensor,
        hole: torch.Tensor,
        seed: int | None,
    ):
        """`positive` are the entries of the prompt to optimise by, with controls of their own."""
        self._guider = guider
        self._run = run
        self._options = run.options
        self._settings = settings
        self._seed = seed
        # Several GPUs work in threads that record no graph.
        self._one_device = {key: value for key, value in run.options.items() if key != "multigpu_clones"}
        with torch.inference_mode(False):
            self._latent, self._hole = as_ordinary(latent), as_ordinary(hole)
            self._known = 1.0 - self._hole
            self._positive = [as_ordinary(entry) for entry in positive]
        self._has_moved = False
        self._recompute = settings.memory == "recompute" or (settings.memory == "auto" and self._is_short_of_memory())

    def sample(
        self,
        plan: _Plan,
        sigmas: torch.Tensor,
        noise: torch.Tensor,
        from_noise: bool,
        passed: Callable[..., None],
    ) -> torch.Tensor:
        """Runs all steps and returns the latent; `passed(denoised, x, passes=1)` is called after each pass, or several."""
        sampling = self._guider.inner_model.model_sampling
        start = torch.zeros_like(self._latent) if from_noise else self._latent
        x = sampling.noise_scaling(sigmas[0], noise, start, from_noise)
        generator = torch.Generator().manual_seed((self._seed or 0) + 1)
        for index, (sigma, following) in enumerate(pairwise(sigmas)):
            rows = sigma.expand(len(x))
            if plan.optimised[index]:
                momentum = torch.zeros_like(x)
                scale = (1.0 + sigma**2).sqrt()
                for iteration in range(plan.iterations):
                    found = self._gradient(x, rows, plan.timesteps[index])
                    if found is None:
                        passed(x, x, plan.iterations - iteration)
                        break
                    denoised, gradient = found
                    rate = self._rate(index, plan.timesteps[index])
                    momentum = self._settings.momentum * momentum - rate * scale * gradient
                    x = x + scale * momentum
                    self._has_moved = True
                    passed(denoised, x)
            elif plan.blended[index]:
                fresh = torch.randn(x.shape, generator=generator).to(x)
                x = torch.where(self._hole > 0, x, self._latent + sigma * fresh)
            denoised = self._guider(x, rows, model_options=self._options, seed=self._seed)
            x = denoised + following / sigma * (x - denoised)
            passed(denoised, x)
        return sampling.inverse_noise_scaling(sigmas[-1], x)

    def _rate(self, index: int, timestep: float) -> float:
        if index == 0:
            return self._settings.first_learning_rate
        return self._settings.learning_rate * LR_BASE ** (1000.0 - timestep)

    def _gradient(
        self, x: torch.Tensor, rows: torch.Tensor, timestep: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The conditional prediction, and the gradient of the losses of all pictures in the host's coordinates.

        None where no positive prompt acts at this noise level: there is nothing to optimise by.
        """
        try:
            return self._recorded_pass(x, rows, timestep)
        except OOM_EXCEPTION:
            if self._recompute or self._settings.memory != "auto":
                raise RuntimeError(
                    "PILOT's backward pass needs more memory than there is: work on a smaller crop (Crop Region) or a smaller "
                    "batch" + ("." if self._recompute else ", or set memory to 'recompute'.")
                ) from None
        logging.info("PILOT: the graph does not fit into memory and most of it is computed again, which is slower.")
        self._recompute = True
        soft_empty_cache()
        return self._gradient(x, rows, timestep)

    def _recorded_pass(
        self, x: torch.Tensor, rows: torch.Tensor, timestep: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        model, others_write = self._guider.inner_model, self._others_write()
        saving = saving_copies(model, on_cpu=False) if others_write else nullcontext()
        blocks = recomputed(model.diffusion_model, others_write) if self._recompute else nullcontext()
        reader = Centralisation(self._hole)
        reading = self._run.with_guest(NAME, _ORDER, reader)
        with gradients_enabled(), saving, blocks, self._run.graph_recorded(), reading:
            leaf = x.clone().requires_grad_()
            (denoised,) = calc_cond_batch(model, [self._positive], leaf, rows.clone(), self._one_device)
            if not reader.has_read:
                return None
            weight = balance(timestep, self._known, self._settings.coefficient)
            losses = background_loss(denoised, self._latent, self._known) + weight * reader.loss()
            if not bool(losses.isfinite().all()):
                remedy = self._remedy(model.get_dtype_inference() in (torch.float16, torch.bfloat16))
                raise FloatingPointError(f"PILOT's loss is not finite at timestep {timestep:.0f}{remedy}.")
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return denoised.detach(), gradient

    def _remedy(self, half_precision: bool) -> str:
        """What may help against a loss that is not finite; before the first step of the optimizer its rates are not at fault."""
        precision = "start ComfyUI with --bf16-unet or --fp32-unet"
        if self._has_moved:
            return f": lower learning_rate and first_rate{f', or {precision}' if half_precision else ''}"
        if half_precision:
            return f", before anything was optimized: {precision}"
        return (
            ", before anything was optimized: the prompt, the checkpoint or a LoRA holds NaN or infinite values, so encode or "
            "load it anew"
        )

    def _others_write(self) -> bool:
        """ControlNets and some packs' patches write into tensors that the backward pass needs."""
        patches = self._options.get("transformer_options", {})
        return any("control" in entry for entry in self._positive) or any(
            patches.get(kind) for kind in ("patches", "patches_replace")
        )

    def _is_short_of_memory(self) -> bool:
        model = self._guider.inner_model
        elements = GRAPH_ELEMENTS["SDXL" if model.diffusion_model.num_classes is not None else "SD"]
        cells = self._latent.shape[0] * self._latent.shape[-2] * self._latent.shape[-1] * len(self._positive)
        needed = cells * elements * model.get_dtype_inference().itemsize
        return needed > get_free_memory(self._latent.device)


def _positive_entries(guider: Any) -> list[dict[str, Any]]:
    entries = guider.conds.get("positive")
    if entries is None:
        raise ValueError(
            "PILOT optimises by the positive prompt, and this guider has none: use CFG Guider or Basic Guider."
        )
    return entries


def _require_text_to_image(model: Any) -> None:
    unet = require_unet(model, "PILOT")
    channels, latent_channels = unet.in_channels, model.latent_format.latent_channels
    if channels != latent_channels:
        raise ValueError(
            f"PILOT makes an inpainting model of a text-to-image one, and this model has {channels} channels in, not "
            f"{latent_channels}: load the plain checkpoint, or take a host sampler for this one."
        )
    if not isinstance(model.model_sampling, ModelSamplingDiscrete):
        raise ValueError(
            f"PILOT knows models with Stable Diffusion's training timesteps, and this one samples by "
            f"{type(model.model_sampling).__mro__[1].__name__}: take out the node that changes it, or load another checkpoint."
        )


def _require_some_of_both(hole: torch.Tensor) -> None:
    """Raises ValueError where no picture [B, 1, h, w] has both a hole and something known."""
    share = hole.flatten(1).mean(dim=1)
    if bool((share == 0).all()):
        raise ValueError("The mask has no hole, so PILOT has nothing to fill: paint what shall change (white).")
    if bool((share == 1).all()):
        raise ValueError(
            "The mask covers the whole picture, so PILOT has nothing to keep: paint less, or use a sampler without a mask."
        )
