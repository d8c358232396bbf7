"""Known latents in small models: the host's real sampling beside the literal form, for the tests of the blend."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.literal_sampling import alpha_bar, nearest_timestep, training_betas
from truefill_testing.literal_unet import as_float64
from truefill_testing.literal_upscale import Network, Unet, literal_upscale
from truefill_testing.oracle import kept
from truefill_testing.scene import randn, relative_error
from truefill_testing.small_models import small_conditioning, small_model, small_upscaler, upscaler_conditioning

import comfy.model_sampling  # isort: skip
import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip
from comfy.k_diffusion import sampling as k_diffusion  # isort: skip

with_known = pack_module("model_patches.hd_painter.known_blending").with_known
with_method = pack_module("model_patches.core.sampling_run").with_method
RASG = pack_module("model_patches.hd_painter.rasg").RASG

TOLERANCE = 1e-5
ROUNDING = 5e-5
"""Where more of the host's own rounding adds up: many steps, one step from all the noise, eta 1, uni_pc's own noise."""
CFG = 7.5
SEED = 17
NOISE_LEVEL = 20
KINDS = ("x4", "sd15")
kinds = pytest.mark.parametrize("kind", KINDS)
SIZES = {"x4": (13, 9), "sd15": (9, 14)}
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc")


@cache
def patcher_of(kind: str, dtype: torch.dtype):
    return small_upscaler(dtype) if kind == "x4" else small_model("sd15", inpainting=False, dtype=dtype)


@cache
def exact_unet(kind: str) -> torch.nn.Module:
    return as_float64(patcher_of(kind, torch.float32).model.diffusion_model)


def soft_masks(batch: int, size: tuple[int, int], factor: int = 4) -> torch.Tensor:
    """Masks [B, factor h, factor w]: of each picture another part known, another part hole, the rest grey."""
    height, width = size
    masks = randn(batch, height * factor, width * factor, seed=11).sigmoid().float()
    for picture, mask in enumerate(masks):
        if picture % 2:
            mask[: 6 * factor, : 3 * factor] = 0.0
            mask[height * factor // 2 :, 4 * factor :] = 1.0
        else:
            mask[:, 6 * factor :] = 0.0
            mask[: 5 * factor, : 4 * factor] = 1.0
    return masks


def area_mean(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[B, n h, n w] -> [B, 1, h, w], float64."""
    height, width = size
    blocks = masks.double().unflatten(1, (height, -1)).unflatten(3, (width, -1))
    return blocks.mean(dim=(2, 4))[:, None]


class Scene:
    """A small model with its two prompts, noise, an empty latent, and what is known of the result."""

    def __init__(self, kind: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> None:
        self.kind, self.batch, self.size = kind, batch, SIZES[kind]
        self.patcher = patcher_of(kind, dtype)
        self.model = self.patcher.model
        self.scale = self.model.latent_format.scale_factor
        self.shape = (batch, 4, *self.size)
        self.noise = randn(*self.shape, seed=3).float()
        self.known = (randn(*self.shape, seed=4) / self.scale).float()
        self.latent = torch.zeros(self.shape)
        self.mask = soft_masks(batch, self.size)
        if kind == "x4":
            self.image = randn(batch, *self.size, 3, seed=5).sigmoid().float()
            self.positive, self.negative = upscaler_conditioning(self.image, NOISE_LEVEL, seed=1)
        else:
            self.positive, self.negative = small_conditioning(kind, seed=1), small_conditioning(kind, seed=2)

    def sigmas(self, scheduler: str = "simple", steps: int = 6) -> torch.Tensor:
        return comfy.samplers.calculate_sigmas(self.model.model_sampling, scheduler, steps)

    def patched(self, model: Any = None, **changes: Any):
        arguments = {"latent": self.known, "mask": self.mask, **changes}
        return with_known(self.patcher if model is None else model, **arguments)

    def blended_prediction(self, model: Any = None):
        """A model whose prediction is M X0pred + (1 - M) X0, so that every sampler's noise goes with that."""
        cells = area_mean(self.mask, self.size)

        def blend(arguments: dict[str, Any]) -> torch.Tensor:
            return (cells * arguments["denoised"] + (1.0 - cells) * self.known.double() * self.scale).float()

        model = (self.patcher if model is None else model).clone()
        model.set_model_sampler_post_cfg_function(blend)
        return model

    def host(
        self,
        model: Any,
        sampler: str = "euler",
        sigmas: torch.Tensor | None = None,
        callback: Callable[..., None] | None = None,
        noise_mask: torch.Tensor | None = None,
        **sampler_options: Any,
    ) -> torch.Tensor:
        """The host's own sampling, in inference mode as in a real run; the final latent in the model's scale."""
        chosen = comfy.samplers.sampler_object(sampler)
        chosen.extra_options = {**chosen.extra_options, **sampler_options}
        with torch.inference_mode():
            latent = comfy.sample.sample_custom(
                model,
                self.noise.clone(),
                CFG,
                chosen,
                (self.sigmas() if sigmas is None else sigmas).clone(),  # uni_pc writes into it
                self.positive,
                self.negative,
                self.latent,
                noise_mask=noise_mask,
                callback=callback,
                disable_pbar=True,
                seed=SEED,
            )
        return latent.double() * self.scale

    @property
    def unet(self) -> Network:
        """The model in float64, with what the host would give it."""
        ((positive, _),), ((negative, _),) = self.positive, self.negative
        image = self.noised_image() if self.kind == "x4" else None
        return Network(exact_unet(self.kind), (positive, negative), image, NOISE_LEVEL)

    def noised_image(self) -> torch.Tensor:
        """The low-resolution picture in [-1, 1] with the noise of its level; the host seeds that with its seed - 10."""
        alpha = (1.0 - training_betas(start=0.0001, end=0.02)).cumprod(dim=0)[NOISE_LEVEL]
        image = 2.0 * self.image.double().movedim(-1, 1) - 1.0
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(SEED - 10))
        return alpha.sqrt() * image + (1.0 - alpha).sqrt() * noise

    def literal(
        self,
        sigmas: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        unet: Unet | None = None,
        cfg: float = CFG,
        v_prediction: bool | None = None,
        parts: tuple[str, ...] = ("x0",),
        **options: Any,
    ) -> Any:
        """The oracle's run; `mask` [B or 1, 1, h, w], `known` in the model's scale.

        With `unet` it is computed anew, else it may be a kept one, of which only `parts` are there (see `oracle.kept`).
        """
        levels = [float(sigma) for sigma in (self.sigmas() if sigmas is None else sigmas)]
        table = self.model.model_sampling.sigmas
        alphas = [alpha_bar(level) for level in levels]
        # From the very end of the noise the host starts as the paper does, from anywhere else with noised latents.
        start = self.noise.double()
        if levels[0] < float(table[-1]) * (1 - 1e-5):
            start = alphas[0] ** 0.5 * self.latent.double() * self.scale + (1.0 - alphas[0]) ** 0.5 * start
        upscale = literal_upscale if unet is not None else partial(kept, parts, literal_upscale)
        return upscale(
            self.unet if unet is None else unet,
            [nearest_timestep(level, table) for level in levels[:-1]],
            alphas,
            start,
            self.known.double() * self.scale if known is None else known,
            area_mean(self.mask, self.size) if mask is None else mask,
            cfg,
            v_prediction=self.kind == "x4" if v_prediction is None else v_prediction,
            **options,
        )

    def default_noises(self, count: int) -> list[torch.Tensor]:
        """What the host's default noise sampler draws for the seed."""
        draw = k_diffusion.default_noise_sampler(self.noise, seed=SEED)
        return [draw(None, None) for _ in range(count)]


class Previews:
    """A callback that keeps the x0 of every step."""

    def __init__(self) -> None:
        self.x0: list[torch.Tensor] = []

    def __call__(self, step: int, x0: torch.Tensor, x: torch.Tensor, total_steps: int) -> None:
        assert step == len(self.x0)
        self.x0.append(x0.clone())


def assert_same(
    ours: torch.Tensor,
    literal: torch.Tensor,
    known_where: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Within `tolerance` of the literal latents' deviation, and of the known ones' where those are (bool [B, 1, h, w])."""
    assert relative_error(ours, literal) < tolerance
    if known_where is not None:
        where = known_where.expand_as(literal)
        assert relative_error(ours[where], literal[where]) < tolerance


def masked(scene: Scene) -> torch.Tensor:
    return area_mean(scene.mask, scene.size) == 0


@cache
def literal_of(kind: str, batch: int = 2) -> Any:
    return Scene(kind, batch).literal()


@cache
def plain_of(kind: str, sampler: str) -> torch.Tensor:
    """The host's own sampling, float32 weights."""
    scene = Scene(kind, dtype=torch.float32)
    return scene.host(scene.patcher, sampler)


def forget_scenes() -> None:
    """Let go of what was kept for several tests."""
    for cached in (patcher_of, exact_unet, literal_of, plain_of):
        cached.cache_clear()
