"""DreamMix's disentangled inpainting (section 3.2): the first steps fill the hole in a crop, the last ones in the whole picture.

A small hole gets all of the model's detail while the object is laid out (local content generation), and the whole picture's light
and tone while it is finished (global context harmonization). At the switch the predicted clean crop is decoded, put into the
picture, encoded with it, and noised to where the schedule is. Both stages are ordinary runs of the host, so that every sampler,
scheduler, guider and patch works in them; a sampler that remembers its last steps begins anew.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F
from comfy.sample import prepare_noise

from ...imaging.fill import GRAY, Fill, fill_pictures
from ...imaging.harmonize import ONLY_BLEND, harmonize_pictures
from ...imaging.masks import resize_mask
from ...imaging.pictures import check_pictures, common_count
from ...imaging.region import Region, crop, stitch
from ...imaging.region_plan import LOCAL_SHARE, Box, RegionSettings
from ...imaging.seam import square_ramp
from ..core.sampling_run import of_part
from .stage_conditioning import Part, conditionings_of

Background = Literal["intermediate", "original"]

_LOCAL = RegionSettings.local(1024, LOCAL_SHARE, 64)


@dataclass(frozen=True, kw_only=True)
class TwoStages:
    """How the two stages share the work.

    local_share: the paper's lambda, from 0 (the whole picture alone) to 1 (the crop alone): the share of the steps that see the
        crop.
    region: which part of the picture the crop is, and at what size.
    feather: width in pixels of the ramp outside of the hole in which new and old are mixed (`imaging.seam`).
    background: what is put around the hole at each step of the second stage: the picture at the switch (paper), or the original
        (released code).
    fill: what is under the hole when its crop is first encoded.
    raw_pooled: the second stage sees the pooled output from before attributes were taken out of it (released code).
    """

    local_share: float = 0.7
    region: RegionSettings = _LOCAL
    feather: int = 32
    background: Background = "intermediate"
    fill: Fill = "blurred"
    raw_pooled: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What is sampled with: a GUIDER, the VAE of its model, a SAMPLER, all SIGMAS [steps + 1], and the seed of the noise."""

    guider: Any
    vae: Any
    sampler: Any
    sigmas: torch.Tensor
    seed: int


def sample_in_two_stages(
    pictures: torch.Tensor,
    mask: torch.Tensor,
    run: Run,
    settings: TwoStages,
    announce: Callable[[str], None] = logging.info,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills the holes of `pictures` [B, H, W, 3 or 4] in [0, 1].

    `mask` is as for `as_mask_batch`, of any size; all that is gray is hole. Each count is 1 or the larger one. Sizes that the VAE
    cannot take are continued at the right and the bottom.

    Returns the pictures, the originals bit for bit where neither a hole nor its ramp is, and what they were at the switch
    (the originals where there is no local stage, the result where there is no other). Without any hole nothing is sampled.
    Raises ValueError for counts, sigmas, and for a VAE and a model, that don't go together.
    """
    check_pictures(pictures, "'image'")
    hole = (resize_mask(mask, pictures.shape[1:3]).to(pictures.device) > 0).float()
    count = common_count(image=len(pictures), mask=len(hole))
    pictures, hole = pictures.expand(count, -1, -1, -1), hole.expand(count, -1, -1, -1)
    steps = len(run.sigmas) - 1
    if steps < 1:
        raise ValueError("The sigmas have no step: connect a scheduler, with a denoise above 0.")
    _check_vae(run)
    if not bool(hole.any()):
        announce("DreamMix: the mask has no hole, so the picture stays as it is.")
        return pictures.clone(), pictures.clone()

    switch = _switch(run.sigmas, settings.local_share)
    stages = _Stages(run, steps)
    weight = square_ramp(hole, settings.feather)[:, 0]
    at_switch = pictures.clone()
    if switch > 0:
        crops, crop_hole, region = crop(pictures, hole, settings.region)
        announce(_forecast(region, switch, steps))
        filled = fill_pictures(crops, (crop_hole > 0).float(), settings.fill)
        seen = _Seen(picture=crops, start=filled, hole=(crop_hole > 0).float(), background=None)
        part = Part(region.plan.picture_size, region.plan.boxes, region.plan.size)
        last, predicted = stages.sample(seen, part, 0, switch, raw_pooled=False)
        made = stages.decode(last if switch == steps else predicted)
        at_switch = stitch(Region(pictures, weight, region.plan), made)
        if switch == steps:
            return at_switch, at_switch
    start = at_switch if switch else fill_pictures(pictures, hole, settings.fill)
    seen = _Seen(
        picture=_continued(at_switch, stages.cell),
        start=_continued(start, stages.cell),
        hole=_continued(hole[:, 0, :, :, None], stages.cell)[..., 0],
        background=_continued(pictures, stages.cell) if settings.background == "original" else None,
    )
    height, width = pictures.shape[1:3]
    whole = Box(0, 0, seen.start.shape[2], seen.start.shape[1])
    part = Part((height, width), (whole,), (whole.height, whole.width))
    last, _ = stages.sample(seen, part, switch, steps, settings.raw_pooled and switch > 0)
    made = stages.decode(last)[:, :height, :width].to(pictures)
    return harmonize_pictures(made, pictures, weight, ONLY_BLEND), at_switch


def restart(
    pictures: torch.Tensor, mask: torch.Tensor | None, vae: Any, sigmas: torch.Tensor, share: float
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the host's samplers need to go on from pictures [B, H, W, 3 or 4] when `share` of the steps are done.

    Returns a LATENT of the pictures, with a noise mask whose cells are hole where any of their pixels is, and the SIGMAS that are
    left. Raises ValueError where no step is left, and for pictures that are none.
    """
    check_pictures(pictures, "'image'")
    left = sigmas[_switch(sigmas, share) :]
    if len(left) < 2:
        raise ValueError(
            f"No step is left of {max(len(sigmas) - 1, 0)} when a share of {share:g} is done: lower it, or give more sigmas."
        )
    cell: int = vae.spacial_compression_encode()
    latent = {"samples": vae.encode(_continued(pictures[..., :3], cell))}
    if mask is not None:
        hole = (resize_mask(mask, pictures.shape[1:3]) > 0).float()
        latent["noise_mask"] = F.max_pool2d(_continued(hole.movedim(1, -1), cell).movedim(-1, 1), cell)
    return latent, left


def _switch(sigmas: torch.Tensor, share: float) -> int:
    """The step that is the first one after a share of them."""
    return round(share * max(len(sigmas) - 1, 0))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """The pictures of a stage, [B, H, W, C]: `picture` is what an inpainting model gets to see but for the hole, [B, H, W],
    `start` what the noise is put on, and `background` what is around the hole at each step where that is not `start`."""

    picture: torch.Tensor
    start: torch.Tensor
    hole: torch.Tensor
    background: torch.Tensor | None


class _Stages:
    """Runs of the host's sampler, each on its own picture, with one progress bar."""

    def __init__(self, run: Run, steps: int) -> None:
        self._run = run
        self.cell: int = run.vae.spacial_compression_encode()
        patcher = run.guider.model_patcher
        self._previewer = latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)
        self._bar, self._steps = comfy.utils.ProgressBar(steps), steps

    def sample(
        self, seen: _Seen, part: Part, first: int, end: int, raw_pooled: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The steps from `first` to before `end`: the latent after them and the last predicted clean one, the VAE's both."""
        run, cell = self._run, self.cell
        latent = run.vae.encode(seen.start[..., :3])
        mask = F.max_pool2d(seen.hole[:, None], cell)
        if seen.background is not None:
            known = run.vae.encode(seen.background[..., :3])
            latent = torch.where(
                mask.reshape(len(mask), 1, *[1] * (latent.ndim - 4), *mask.shape[-2:]).to(latent) > 0, latent, known
            )
        guider = self._guider(seen, part, raw_pooled)
        # The noise of a second stage would else be the first one's over again where both have one size.
        seed = (run.seed + (first > 0)) % (1 << 64)
        found: dict[str, torch.Tensor] = {}

        def report(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
            found["x0"] = x0
            preview = self._previewer.decode_latent_to_preview_image("JPEG", x0) if self._previewer else None
            self._bar.update_absolute(first + step + 1, self._steps, preview)

        last = guider.sample(
            prepare_noise(latent, seed),
            latent,
            run.sampler,
            run.sigmas[first : end + 1],
            denoise_mask=mask,
            callback=report,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        if "x0" not in found:
            raise ValueError(
                "This sampler does not tell what it predicts, which DreamMix needs at the switch: take another one, or set "
                "local_share to 0 or 1."
            )
        return last, guider.model_patcher.model.process_latent_out(found["x0"].to(last))

    def _guider(self, seen: _Seen, part: Part, raw_pooled: bool) -> Any:
        run = self._run
        guider = copy.copy(run.guider)
        if not part.is_whole:
            guider.model_patcher = of_part(guider.model_patcher, part.of)
            guider.model_options = guider.model_patcher.model_options
        concat = {}
        has_own = any("concat_latent_image" in entry for of in guider.original_conds.values() for entry in of)
        if has_own or guider.model_patcher.model.concat_keys:
            masked = torch.where(seen.hole[..., None] > 0, GRAY, seen.picture[..., :3])
            concat = {"concat_latent_image": run.vae.encode(masked), "concat_mask": seen.hole[:, None]}
        guider.original_conds = conditionings_of(guider.original_conds, part, self.cell, concat, raw_pooled)
        return guider

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The pictures [B, H, W, 3] of a latent."""
        made = self._run.vae.decode(latent)
        return made.reshape(-1, *made.shape[-3:])


def _check_vae(run: Run) -> None:
    latents = run.guider.model_patcher.model.latent_format
    has = (run.vae.latent_channels, run.vae.spacial_compression_encode())
    needs = (latents.latent_channels, latents.spacial_downscale_ratio)
    if has != needs:
        raise ValueError(
            f"The VAE makes {has[0]} channels of cells of {has[1]} pixels, and the model takes {needs[0]} of {needs[1]}: connect "
            "the VAE that comes with the model."
        )


def _continued(pictures: torch.Tensor, cell: int) -> torch.Tensor:
    """Pictures [B, H, W, C] to a multiple of `cell`, by their last row and column."""
    height, width = pictures.shape[1:3]
    missing = (0, -width % cell, 0, -height % cell)
    return F.pad(pictures.movedim(-1, 1), missing, mode="replicate").movedim(1, -1) if any(missing) else pictures


def _forecast(region: Region, switch: int, steps: int) -> str:
    (height, width), (rows, columns) = region.plan.size, region.plan.box_size
    return (
        f"DreamMix: {switch} of {steps} steps on {columns}x{rows} pixels around the hole, shown as {width}x{height}; the others "
        f"on {region.plan.picture_size[1]}x{region.plan.picture_size[0]}."
    )
