"""Tunes a user's MODEL on a subject: what is noised, how the error is weighed, and the steps of the optimizer.

A step takes a picture of the subject, one of its training masks and one of its prompts, and a noise level; the error of the
predicted noise counts more inside of the mask (DreamMix, equation 7). Pictures of the class that are not the subject keep the
rest of the model where it was, with a smaller weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import numpy as np
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.samplers import encode_model_conds

from ...model_patches.core.autograd import as_ordinary, gradients_enabled, make_weights_ordinary, recomputed, staying
from .adapters import LowRank, attached, fresh_adapters
from .memory import step_memory


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The paper's settings; `outputs` adapts to_out.0 as well (the release), `recompute` keeps little and computes twice.

    inside, outside: what the error counts in a training mask and around it. regular_weight: what a picture of the class counts
    that is not the subject. accumulate: pictures to a step of the optimizer.
    """

    steps: int = 1000
    accumulate: int = 4
    learning_rate: float = 1e-4
    rank: int = 4
    outputs: bool = False
    inside: float = 1.5
    outside: float = 0.7
    regular_weight: float = 0.4
    clip: float = 1.0
    seed: int = 0
    recompute: bool = True


@dataclass(frozen=True, eq=False, kw_only=True)
class Example:
    """A picture to learn from.

    latent: as the VAE encodes it, [1, C, h, w]. masks: its training masks on the same grid, how much of each cell, [n, 1, h, w].
    concat: what an inpainting model sees besides for each mask, by the names of the conditioning's options; empty for others.
    prompts: CONDITIONING for each of its prompts.
    """

    latent: torch.Tensor
    masks: torch.Tensor
    concat: Sequence[Mapping[str, torch.Tensor]]
    prompts: Sequence[Any]


@dataclass(frozen=True, eq=False)
class Draw:
    """What chance decides of one picture in one step."""

    example: int
    mask: int
    prompt: int
    timestep: int
    noise_seed: int


def draw(examples: Sequence[Example], timesteps: int, seed: int, step: int, part: int, regular: bool) -> Draw:
    """A pure function of its arguments, so that a run that was stopped goes on as if it had not been."""
    chance = np.random.default_rng((seed, step, part, int(regular)))
    index = int(chance.integers(len(examples)))
    example = examples[index]
    return Draw(
        index,
        int(chance.integers(len(example.masks))),
        int(chance.integers(len(example.prompts))),
        int(chance.integers(timesteps)),
        int(chance.integers(1 << 31)),
    )


def weighted_error(error: torch.Tensor, mask: torch.Tensor, inside: float, outside: float) -> torch.Tensor:
    """The mean of `inside` m e^2 + `outside` (1 - m) e^2 (equation 7), of an error [B, C, h, w] and a mask [B, 1, h, w]."""
    return ((inside * mask + outside * (1.0 - mask)) * error.square()).mean()


class Tuner:
    """A run: the adapters of a MODEL, their optimizer, and how many steps they have seen.

    Raises ValueError for a model that can't be tuned.
    """

    def __init__(self, model: ModelPatcher, tuning: Tuning) -> None:
        check(model)
        self._tuning = tuning
        self._patcher = staying(model)
        unet = self._patcher.model.diffusion_model
        with gradients_enabled():
            self.adapters: dict[str, LowRank] = fresh_adapters(unet, tuning.rank, tuning.outputs, tuning.seed)
            for of in self.adapters.values():
                of.to(self._patcher.load_device)
            self._weights = [weight for of in self.adapters.values() for weight in of.parameters()]
            self.optimizer = torch.optim.Adam(self._weights, lr=tuning.learning_rate)
        # Small gradients are 0 in float16.
        is_half = self._patcher.model.get_dtype_inference() == torch.float16
        self._scaler = torch.amp.GradScaler(self._patcher.load_device.type, enabled=is_half)
        self._memory: dict[tuple[int, int, tuple[int, int]], int] = {}
        self.step = 0

    @property
    def count(self) -> int:
        """How many weights are trained."""
        return sum(weight.numel() for weight in self._weights)

    @property
    def unet_config(self) -> dict[str, Any]:
        """Of the model, for `adapters.as_file`."""
        return self._patcher.model.model_config.unet_config

    def memory(self, examples: Sequence[Example]) -> int:
        """Bytes that a step holds at its peak beside the model's weights, by its largest picture: see `step_memory`."""
        latents = [example.latent for example in examples]
        texts = [prompt[0][0] for example in examples for prompt in example.prompts]
        height, width = max((latent.shape[-2:] for latent in latents), key=math.prod)
        context = max((text.shape[-2:] for text in texts), key=math.prod)
        shape = (height, width, (context[0], context[1]))
        if shape not in self._memory:
            of, trained = self._tuning, sum(weight.numel() * weight.element_size() for weight in self._weights)
            held = step_memory(self._patcher.model, *shape, of.rank, of.outputs, of.recompute)
            # The optimizer's two averages.
            self._memory[shape] = 2 * trained + held
        return self._memory[shape]

    def run(
        self,
        subject: Sequence[Example],
        regular: Sequence[Example],
        report: Callable[[int, float], None],
        until: int | None = None,
    ) -> None:
        """Goes on to step `until`, or to the last; `report` is told the step that is done and its loss, and may raise to end it.

        The MODEL is as it was afterwards, also after an error or an interrupt.
        """
        patcher, tuning = self._patcher, self._tuning
        comfy.model_management.load_models_gpu([patcher], memory_required=self.memory([*subject, *regular]))
        unet, device = patcher.model.diffusion_model, patcher.load_device
        patcher.pre_run()
        try:
            with gradients_enabled():
                make_weights_ordinary(unet)
                again: AbstractContextManager[None] = recomputed(unet, False) if tuning.recompute else nullcontext()
                with attached(unet, self.adapters), again:
                    while self.step < (tuning.steps if until is None else until):
                        loss = self._one_step(subject, regular, device)
                        self.step += 1
                        report(self.step, loss)
        finally:
            patcher.cleanup()

    def _one_step(self, subject: Sequence[Example], regular: Sequence[Example], device: torch.device) -> float:
        tuning, total = self._tuning, 0.0
        timesteps = len(self._patcher.model.model_sampling.sigmas)
        for part in range(tuning.accumulate):
            for examples, weight, is_regular in ((subject, 1.0, False), (regular, tuning.regular_weight, True)):
                if not examples or not weight:
                    continue
                chosen = draw(examples, timesteps, tuning.seed, self.step, part, is_regular)
                loss = weight * self._loss(examples[chosen.example], chosen, device) / tuning.accumulate
                self._scaler.scale(loss).backward()
                total += float(loss.detach())
                comfy.model_management.throw_exception_if_processing_interrupted()
        self._scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self._weights, tuning.clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, example: Example, chosen: Draw, device: torch.device) -> torch.Tensor:
        inner = self._patcher.model
        clean = as_ordinary(inner.process_latent_in(example.latent.to(device).float()))
        generator = torch.Generator().manual_seed(chosen.noise_seed)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        sampling = inner.model_sampling
        sigma = as_ordinary(sampling.sigma(torch.tensor([float(chosen.timestep)]))).to(clean)
        noised = as_ordinary(sampling.noise_scaling(sigma[:, None, None, None], noise, clean))
        seen = self._conditions(example, chosen, clean, device)
        predicted = inner.apply_model(noised, sigma, **seen)
        # The error of what the model predicts, the noise or v, from that of the clean latent.
        of_clean = 1.0 / sigma if inner.model_type == ModelType.EPS else (sigma.square() + 1.0).sqrt() / sigma
        error = (predicted - clean) * of_clean[:, None, None, None]
        mask = as_ordinary(example.masks[chosen.mask : chosen.mask + 1].to(device).float())
        return weighted_error(error, mask, self._tuning.inside, self._tuning.outside)

    def _conditions(
        self, example: Example, chosen: Draw, clean: torch.Tensor, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """What the host's model is called with besides the latent and the noise level."""
        entry = comfy.sampler_helpers.convert_cond(example.prompts[chosen.prompt])[0]
        if example.concat:
            entry.update(example.concat[chosen.mask])
        (entry,) = encode_model_conds(
            self._patcher.model.extra_conds, [entry], clean, device, "positive", latent_image=clean, denoise_mask=None
        )
        made = {name: of.process_cond(batch_size=1, area=None).cond for name, of in entry["model_conds"].items()}
        return as_ordinary(made)


def check(model: ModelPatcher) -> None:
    """Raises ValueError for a model that can't be tuned: one without a UNet, a flow model, quantized weights."""
    inner = model.model
    kind = getattr(inner, "model_type", None)
    if kind not in (ModelType.EPS, ModelType.V_PREDICTION) or not hasattr(inner.diffusion_model, "input_blocks"):
        raise ValueError(
            f"A subject is tuned on SD1.5, SD2 and SDXL models, which predict noise or v; this one is {type(inner).__name__} "
            f"({getattr(kind, 'name', 'of an unknown kind')})."
        )
    for name, weight in inner.diffusion_model.named_parameters():
        if not weight.is_floating_point() or weight.dtype.itemsize < 2 or type(weight.data) is not torch.Tensor:
            raise ValueError(
                f"The model's weights are quantized ({name}: {str(weight.dtype).removeprefix('torch.')}): load it in half or "
                "full precision for the training."
            )
