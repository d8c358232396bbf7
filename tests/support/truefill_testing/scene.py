"""Pictures with holes and a small model, run by the host and by the literal loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from devtools.pack import ensure_host

from .literal_sampling import Prompt, Run, literal_sample
from .literal_unet import as_float64
from .oracle import kept, made_of
from .small_models import small_conditioning, small_model

ensure_host()

import comfy.cldm.cldm  # noqa: E402
import comfy.controlnet  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402

from nodes import ControlNetApplyAdvanced  # noqa: E402

TOKENS_KEY = "truefill_prompt_tokens"

patcher_of = cache(small_model)


@cache
def exact_unet(family: str, inpainting: bool) -> torch.nn.Module:
    return as_float64(patcher_of(family, inpainting).model.diffusion_model)


def forget_models() -> None:
    exact_unet.cache_clear()
    patcher_of.cache_clear()


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _InFloat64:
    """torch, to a module of the host that casts to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def host_in_float64() -> Iterator[None]:
    """The host samples in float64. A random network makes much of a latent's last bit, and processors differ in that."""
    rounded = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.samplers, "torch", _InFloat64())
        patch.setattr(
            torch.Tensor, "float", lambda tensor: tensor if tensor.dtype == torch.float64 else rounded(tensor)
        )
        yield


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).abs().max() / expected.double().std())


def token_set(*indices: int) -> torch.Tensor:
    tokens = torch.zeros(77, dtype=torch.bool)
    tokens[list(indices)] = True
    return tokens


def boxes(size: tuple[int, int], *of_pictures: tuple[slice, slice]) -> torch.Tensor:
    """Holes [B, 1, h, w], a box for each picture."""
    hole = torch.zeros(len(of_pictures), 1, *size)
    for picture, (rows, columns) in enumerate(of_pictures):
        hole[picture, 0, rows, columns] = 1.0
    return hole


def two_boxes() -> torch.Tensor:
    """Two pictures of 16x13 cells with different holes, one row of them partly covered."""
    hole = boxes((16, 13), (slice(3, 9), slice(4, 13)), (slice(3, 16), slice(4, 7)))
    hole[:, :, 3] *= 0.6
    return hole


class Scene:
    """A small model, a hole for each picture, and two prompts. `masked` adds a noise mask to the latent."""

    CFG = 7.5
    WORDS, END = (1, 2), 5
    TOKENS = (*WORDS, END)
    """The tokens that HD-Painter's methods read; PILOT reads the words alone."""

    def __init__(
        self,
        family: str,
        inpainting: bool,
        masked: bool,
        dtype: torch.dtype = torch.float64,
        v_prediction: bool = False,
        hole: torch.Tensor | None = None,
    ) -> None:
        self.patcher = patcher_of(family, inpainting, dtype, v_prediction=v_prediction)
        self.model = self.patcher.model
        self.family, self.inpainting, self.masked, self.v_prediction = family, inpainting, masked, v_prediction
        self.positive, self.negative = small_conditioning(family, seed=1), small_conditioning(family, seed=2)
        # What `prompt_tokens` calls WORD and END.
        self.positive[0][1][TOKENS_KEY] = (token_set(*self.WORDS).long() + 2 * token_set(self.END))[None]
        self.hole = two_boxes() if hole is None else hole
        batch, _, *self.size = self.hole.shape
        self.noise = randn(batch, 4, *self.size, seed=3).float()
        self.latent = 5.0 * randn(batch, 4, *self.size, seed=4).float()
        self.masked_latent = 5.0 * randn(batch, 4, *self.size, seed=5).float()

    @property
    def scale(self) -> float:
        return self.model.latent_format.scale_factor

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor:
        return comfy.samplers.calculate_sigmas(self.model.model_sampling, scheduler, steps)

    def host_arguments(self) -> dict[str, Any]:
        sides = []
        for conditioning in (self.positive, self.negative):
            extra = {"concat_latent_image": self.masked_latent, "concat_mask": self.hole} if self.inpainting else {}
            sides.append([[context, {**options, **extra}] for context, options in conditioning])
        return {
            "positive": sides[0],
            "negative": sides[1],
            "latent_image": self.latent,
            "noise_mask": self.hole if self.masked else None,
            "disable_pbar": True,
            "seed": 0,
        }

    def host(
        self,
        sigmas: torch.Tensor,
        model: Any = None,
        sampler: str | comfy.samplers.Sampler = "euler",
        cfg: float | None = None,
        sampler_options: dict[str, Any] | None = None,
        callback: Any = None,
    ) -> torch.Tensor:
        """The host's own sampling, in inference mode as in a real run; the final latent in the model's scale."""
        chosen = sampler
        if isinstance(sampler, str):
            chosen = comfy.samplers.sampler_object(sampler)
            chosen.extra_options = {**chosen.extra_options, **(sampler_options or {})}
        with torch.inference_mode():
            latent = comfy.sample.sample_custom(
                self.patcher if model is None else model,
                self.noise.clone(),
                self.CFG if cfg is None else cfg,
                chosen,
                sigmas,
                callback=callback,
                **self.host_arguments(),
            )
        return latent.double() * self.scale

    def add_controlnet(self) -> None:
        """Puts a random ControlNet for the model's family, with a random picture, on both prompts."""
        config = {
            key: value
            for key, value in self.model.model_config.unet_config.items()
            if key not in ("out_channels", "in_channels", "transformer_depth_output", "disable_unet_model_creation")
        }
        # As the host loads one.
        with torch.inference_mode():
            net = comfy.cldm.cldm.ControlNet(
                **{**config, "in_channels": 4, "hint_channels": 3, "operations": comfy.ops.disable_weight_init}
            )
            generator = torch.Generator().manual_seed(11)
            for parameter in net.parameters():
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"), manual_cast_dtype=None)
        hint = torch.rand(1, 8 * self.size[0], 8 * self.size[1], 3, generator=generator)
        self.positive, self.negative = ControlNetApplyAdvanced().apply_controlnet(
            self.positive, self.negative, control, hint, 1.0, 0.0, 1.0
        )

    def host_by_guider(self, guider: comfy.samplers.CFGGuider, sigmas: torch.Tensor) -> torch.Tensor:
        """As `host`, with a guider whose conditioning is set."""
        with torch.inference_mode():
            latent = guider.sample(
                self.noise.clone(),
                self.latent,
                comfy.samplers.sampler_object("euler"),
                sigmas,
                denoise_mask=self.hole,
                disable_pbar=True,
                seed=0,
            )
        return latent.double() * self.scale

    def prompt(self, conditioning: list, words_alone: bool = False) -> Prompt:
        ((context, options),) = conditioning
        height, width = (8 * side for side in self.size)
        pooled = options["pooled_output"]
        y = self.model.encode_adm(pooled_output=pooled, width=width, height=height)
        if y is not None:
            y = made_of(y, pooled, width, height)
        return Prompt(context, y, token_set(*(self.WORDS if words_alone else self.TOKENS)))

    def literal(
        self,
        sigmas: torch.Tensor,
        cfg: float | None = None,
        guided_hole: torch.Tensor | None = None,
        **options: Any,
    ) -> Run:
        """The literal loop's run, computed anew."""
        return literal_sample(**self._literal_arguments(sigmas, cfg, guided_hole, **options))

    def literal_latent(
        self,
        sigmas: torch.Tensor,
        cfg: float | None = None,
        guided_hole: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The final latent of `literal`, float32: the kept one if there is one."""
        arguments = self._literal_arguments(sigmas, cfg, guided_hole, **options)
        return kept(("latent",), literal_sample, **arguments).latent

    def _literal_arguments(
        self, sigmas: torch.Tensor, cfg: float | None, guided_hole: torch.Tensor | None, **options: Any
    ) -> dict[str, Any]:
        return {
            "unet": exact_unet(self.family, self.inpainting),
            "table": self.model.model_sampling.sigmas,
            "sigmas": sigmas,
            "noise": self.noise,
            "latent": self.latent * self.scale,
            "positive": [self.prompt(self.positive)],
            "negative": [self.prompt(self.negative)],
            "cfg": self.CFG if cfg is None else cfg,
            "v_prediction": self.v_prediction,
            "concat": (self.hole, self.masked_latent * self.scale) if self.inpainting else None,
            "noise_mask": self.hole if self.masked else None,
            "hole": self.hole if guided_hole is None else guided_hole,
            **options,
        }

    def assert_same(self, host: torch.Tensor, literal: Run) -> None:
        exact = self.model.diffusion_model.dtype == torch.float64
        assert relative_error(host.double() * self.scale, literal.latent) < (1.5e-5 if exact else 1e-4)
