"""Inpainting-specialised super-resolution (HD-Painter, section 3.5): makes the hole of a large picture from a small one.

With Stable Diffusion's x4 upscaler this is the paper's method: sampling from noise under the small picture, with the known
part's clean latents blended in at every step. Any other model refines the enlarged picture in the same way (img2img), and an
upscale model such as ESRGAN enlarges it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import node_helpers
import torch
import torch.nn.functional as F

from ...imaging.harmonize import POISSON, Harmony
from ...imaging.masks import resize_mask
from ...imaging.pictures import check_pictures, common_count
from ...imaging.region import Region, stitch
from ...imaging.region_plan import Box
from ...imaging.super_resolution import Workplace, find_workplace, widened
from ..core.diffusion import Diffusion, Sampling
from .known_blending import with_known
from .tiled_sampling import with_tiles

MAX_NOISE_LEVEL = 350
"""The most noise on the small picture that the x4 upscaler knows."""
_X4_FACTOR = 4
_UPSCALE_MARGIN = 48
"""Pixels of the small picture that an upscale model sees around what is wanted of it.

Real-ESRGAN can look 350 pixels far; what the rest of that would change is in `dev.py bench photos --parts large`.
"""
_GIGABYTE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class UpscaleSampling(Sampling):
    """How a diffusion model makes the detail.

    noise_level: noise on the small picture for the x4 upscaler, from 0 to 350.
    denoise: for any other model, the share of the steps that is run.
    """

    sampler_name: str = "ddim"
    noise_level: int = 20
    denoise: float = 0.35


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Pixels of the large picture: side and overlap of the tiles, and how far around the hole is made anew."""

    tile: int = 512
    overlap: int = 128
    expand: int = 19


_SAMPLING, _LAYOUT = UpscaleSampling(), Layout()


def upscale_hole(
    pictures: torch.Tensor,
    low: torch.Tensor,
    mask: torch.Tensor,
    diffusion: Diffusion | None,
    upscale_model: Any = None,
    sampling: UpscaleSampling = _SAMPLING,
    layout: Layout = _LAYOUT,
    harmony: Harmony = POISSON,
    announce: Callable[[str], None] = logging.info,
) -> torch.Tensor:
    """Fills the hole of large pictures with what smaller, inpainted pictures of the same show there.

    `pictures` are [B, H, W, 3 or 4] in [0, 1], `low` [B, h, w, 3 or 4] of any size, `mask` is as for `as_mask_batch`, of any
    size; each count is 1 or the largest. `diffusion` makes the detail; `upscale_model` enlarges `low` for a model
    that isn't the x4 upscaler, or by itself. `announce` is told what will be computed and how much memory that takes.

    Returns [B, H, W, C]: the pictures bit for bit where the hole, widened by `layout.expand` pixels, is not. Each picture
    has noise of its own. Raises ValueError for counts and models that don't go together, and for pictures that are none.
    """
    check_pictures(pictures, "'image'")
    check_pictures(low, "'inpainted'")
    holes = widened(resize_mask(mask, pictures.shape[1:3])[:, 0].to(pictures.device), layout.expand)
    count = common_count(image=len(pictures), inpainted=len(low), mask=len(holes))
    engine = _engine(diffusion, upscale_model, sampling)
    jobs = []
    for index in range(count):
        hole = holes[index % len(holes)][None]
        place = find_workplace(hole[0], engine.factor, layout.tile, layout.overlap)
        jobs.append((pictures[index % len(pictures)][None], low[index % len(low)][None], hole, place))
    places = [place for *_, place in jobs if place is not None]
    if places:
        announce(engine.forecast(places))
    progress = comfy.utils.ProgressBar(max(1, len(places) * engine.steps))
    results = []
    for index, (picture, small, hole, place) in enumerate(jobs):
        if place is None:
            results.append(picture)
            continue
        made = engine.make(picture, small, place, index, progress)
        region = Region(picture, hole, place.pixel_plan((picture.shape[1], picture.shape[2])))
        results.append(stitch(region, made, harmony))
    return torch.cat(results)


class _Enlarging:
    """Enlarges the small picture, by an upscale model or bicubic."""

    factor = 1
    steps = 1

    def __init__(self, upscale_model: Any) -> None:
        self._upscale_model = upscale_model

    def forecast(self, places: list[Workplace]) -> str:
        height, width = places[0].pixel_size
        return f"TrueFill Upscale: {width}x{height} pixels around the hole, by the upscale model alone."

    def make(
        self, picture: torch.Tensor, low: torch.Tensor, place: Workplace, index: int, progress: Any
    ) -> torch.Tensor:
        """The box of `place`, from the small picture [1, h, w, C] alone: [1, H, W, 3]."""
        made = self.enlarged(low, place, (picture.shape[1], picture.shape[2]))
        progress.update(self.steps)
        return made

    def enlarged(self, low: torch.Tensor, place: Workplace, picture_size: tuple[int, int]) -> torch.Tensor:
        """The box of `place` in a picture of `picture_size` (height, width) pixels, of which `low` [1, h, w, C] shows all."""
        low = low[..., :3]
        if self._upscale_model is None:
            return place.pixels_of(low, picture_size)
        from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

        part = place.seen((low.shape[1], low.shape[2]), picture_size, _UPSCALE_MARGIN)
        low = low[:, part.box.top : part.box.bottom, part.box.left : part.box.right]
        (large,) = ImageUpscaleWithModel.execute(self._upscale_model, low).args
        return place.pixels_of(large, picture_size, part.enlarged(large.shape[1] // low.shape[1]))


class _Diffusing:
    """What the two ways of sampling share."""

    def __init__(self, diffusion: Diffusion, sampling: UpscaleSampling) -> None:
        self._diffusion, self._sampling = diffusion, sampling
        self.factor: int = diffusion.vae.spacial_compression_encode()
        self.steps = sampling.steps

    def forecast(self, places: list[Workplace]) -> str:
        largest = max(places, key=lambda place: place.tiles[0].height * place.tiles[0].width)
        tile, (height, width) = largest.tiles[0], largest.pixel_size
        tiles = sum(len(place.tiles) for place in places)
        unet, vae = self.memory(tile.height, tile.width)
        return (
            f"TrueFill Upscale: {width}x{height} pixels around the hole, {tiles} tiles of {tile.width * self.factor}x"
            f"{tile.height * self.factor}, {self._sampling.steps} steps; by the host's estimate {unet / _GIGABYTE:.1f} GB "
            f"to sample and {vae / _GIGABYTE:.1f} GB to decode, weights included."
        )

    def memory(self, height: int, width: int) -> tuple[float, float]:
        """Bytes that sampling and decoding a tile of so many cells take, with the weights, by the host's estimates."""
        model, vae = self._diffusion.model, self._diffusion.vae
        unet = model.model.memory_required([2, model.model.latent_format.latent_channels, height, width])
        decode = vae.memory_used_decode((1, vae.latent_channels, height, width), vae.vae_dtype)
        return unet + model.model_size(), decode + vae.patcher.model_size()

    def encode(self, place: Workplace, box: torch.Tensor) -> torch.Tensor:
        """The latent [1, C, h, w] of a box's pixels [1, H, W, C]; zeros where there is no tile."""
        parts = [
            self._diffusion.vae.encode(box[:, rows, columns, :3]) for rows, columns in map(place.pixels, place.tiles)
        ]
        empty = parts[0].new_zeros(1, *place.size, parts[0].shape[1])
        return place.join([part.movedim(1, -1) for part in parts], empty).movedim(-1, 1)

    def decode(self, place: Workplace, latent: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        """The pixels [1, H, W, 3] of a box's latent; `otherwise` where there is no tile."""
        parts = [
            self._diffusion.vae.decode(latent[..., tile.top : tile.bottom, tile.left : tile.right])
            for tile in place.tiles
        ]
        return place.join(parts, otherwise[..., :3])

    def sample(
        self,
        place: Workplace,
        known: torch.Tensor,
        latent: torch.Tensor,
        conds: tuple[Any, Any],
        denoise: float,
        index: int,
        progress: Any,
    ) -> torch.Tensor:
        """The box's latent, from noise on `latent`, with `known` blended in at every step."""
        model, sampling = self._diffusion.model, self._sampling
        if place.tiles != (Box(0, 0, place.size[1], place.size[0]),):
            model = with_tiles(model, place.tiles, place.size, place.overlap, known)
        model = with_known(model, known, place.hole[:, 0])
        seed = (sampling.seed + index) % (1 << 64)
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        done = progress.current

        def report(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            progress.update_absolute(done + self.steps * (step + 1) // total, preview=preview)

        return comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, seed),
            sampling.steps,
            sampling.cfg,
            sampling.sampler_name,
            sampling.scheduler,
            *conds,
            latent,
            denoise=denoise,
            callback=report,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )


class X4(_Diffusing):
    """Stable Diffusion's x4 upscaler: from noise, under the small picture."""

    def make(
        self, picture: torch.Tensor, low: torch.Tensor, place: Workplace, index: int, progress: Any
    ) -> torch.Tensor:
        """The box of `place`, [1, H, W, 3]."""
        box = place.cut(picture)
        known = self.encode(place, box)
        values = {
            "concat_image": place.cells_of(low[..., :3], (picture.shape[1], picture.shape[2])).movedim(-1, 1) * 2.0
            - 1.0,
            "noise_augmentation": self._sampling.noise_level / MAX_NOISE_LEVEL,
        }
        conds = [
            node_helpers.conditioning_set_values(cond, values)
            for cond in (self._diffusion.positive, self._diffusion.negative)
        ]
        latent = self.sample(place, known, torch.zeros_like(known), (conds[0], conds[1]), 1.0, index, progress)
        return self.decode(place, latent, box)


class _Refining(_Diffusing):
    """Any other model: img2img on the enlarged picture."""

    def __init__(self, diffusion: Diffusion, upscale_model: Any, sampling: UpscaleSampling) -> None:
        super().__init__(diffusion, sampling)
        self._enlarging = _Enlarging(upscale_model)

    def make(
        self, picture: torch.Tensor, low: torch.Tensor, place: Workplace, index: int, progress: Any
    ) -> torch.Tensor:
        """The box of `place`, [1, H, W, 3]."""
        box = place.cut(picture)[..., :3]
        large = self._enlarging.enlarged(low, place, (picture.shape[1], picture.shape[2]))
        start = torch.lerp(box, large.to(box), place.pixel_hole().to(box))
        known = self.encode(place, box)
        latent = self.encode(place, start)
        made = self.sample(place, known, latent, self._conds(place, box), self._sampling.denoise, index, progress)
        return self.decode(place, made, box)

    def _conds(self, place: Workplace, box: torch.Tensor) -> tuple[Any, Any]:
        """The prompts; an inpainting model also gets the hole and what is around it, as in the host's own nodes."""
        conds = (self._diffusion.positive, self._diffusion.negative)
        if not self._diffusion.model.model.concat_keys:
            return conds
        hole = (place.hole > 0.5).float()
        pixels = F.interpolate(hole, size=place.pixel_size, mode="nearest").movedim(1, -1).to(box)
        values = {"concat_latent_image": self.encode(place, torch.lerp(box, torch.full_like(box, 0.5), pixels))}
        values["concat_mask"] = hole[:, 0]
        positive, negative = (node_helpers.conditioning_set_values(cond, values) for cond in conds)
        return positive, negative


def _engine(diffusion: Diffusion | None, upscale_model: Any, sampling: UpscaleSampling) -> _Enlarging | X4 | _Refining:
    if diffusion is None:
        if upscale_model is None:
            raise ValueError(
                "Upscale needs something that makes detail: connect Stable Diffusion's x4 upscaler (model, positive, negative, "
                "vae), another model for img2img, or an upscale model such as ESRGAN."
            )
        return _Enlarging(upscale_model)
    vae, inner = diffusion.vae, diffusion.model.model
    factor = vae.spacial_compression_encode()
    is_x4 = isinstance(inner, comfy.model_base.SD_X4Upscaler)
    if is_x4 != (factor == _X4_FACTOR) or vae.latent_channels != inner.latent_format.latent_channels:
        raise ValueError(
            f"The VAE makes {vae.latent_channels} channels of cells of {factor} pixels, which is not what this model was "
            f"trained on: take the VAE that comes with {'the x4 upscaler' if is_x4 else 'the model'}, from the same "
            "checkpoint."
        )
    if not is_x4:
        return _Refining(diffusion, upscale_model, sampling)
    if upscale_model is not None:
        raise ValueError(
            "The x4 upscaler enlarges by itself and has no use for an upscale model: disconnect the one or the other."
        )
    return X4(diffusion, sampling)
