"""A control branch on a MODEL: PainterNet's, PowerPaint's or BrushNet's.

In each call of the UNet the branch sees the call's own noisy latent, the picture with black in the hole, and where to keep it;
what it says of them goes into the UNet (`network.injected`). Its text is the local prompt: the one it was given, or else the
UNet's.

A gradient through the UNet (RASG, PILOT) takes what the branch says as it is, and does not go through the branch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher

from ...imaging.masks import as_mask_batch, hole_of, resize_mask
from ...imaging.pictures import check_pictures, common_count, resampled
from ..core.autograd import as_ordinary
from ..core.call_rows import PromptRows, repeat_to_batch
from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun, method_keys, with_method
from ..core.unet_attention import require_unet, transformer_places
from .network import BranchNetwork, Features, injected, layer_points, width_of

LATENT_CHANNELS = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Text:
    """A prompt for a branch: its embedding [B, tokens, channels], and SDXL's pooled one [B, channels]."""

    context: torch.Tensor
    pooled: torch.Tensor | None

    @staticmethod
    def of(conditioning: Sequence[Any] | None, name: str) -> Text | None:
        """Of a CONDITIONING. Raises ValueError, which calls it `name`, where it is several."""
        if conditioning is None:
            return None
        if len(conditioning) != 1:
            raise ValueError(
                f"Apply Branch's {name} is {len(conditioning)} prompts in one (Conditioning Combine, or areas), and a branch "
                "reads one: connect the prompt of what is in the hole."
            )
        ((context, options),) = conditioning
        return Text(context=context, pooled=options.get("pooled_output"))


@dataclass(frozen=True, eq=False, kw_only=True)
class Branch(Method):
    """Settings; `strength` is the preservation scale w. What is in the hole, `mask`, is hidden from the branch.

    number: which of several branches on a model it is.
    network: the branch (`network.branch_model`).
    kind: whose it is, for messages.
    vae, picture: what encodes [B, H, W, 3 or 4] in [0, 1], the picture it is to preserve.
    latents: of the picture without the hole, as the VAE gives them, for the run's size (`prepared`).
    positive, negative: what it reads in the place of the UNet's prompts.
    layer_scale, attention_scale: factors of w for its layer points and its attention control points.
    """

    name: ClassVar = "Apply Branch"
    # After Refine, whose look at the subject goes through the UNet itself.
    order: ClassVar = 160

    number: int = 0
    network: ModelPatcher
    kind: str
    vae: Any
    picture: torch.Tensor
    latents: torch.Tensor | None = None
    positive: Text | None = None
    negative: Text | None = None
    layer_scale: float = 1.0
    attention_scale: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.name} {self.number}"

    def models(self) -> Sequence[ModelPatcher]:
        return (self.network,)

    def check(self, model: object) -> None:
        unet = require_unet(model, self.name)
        branch: BranchNetwork = self.network.model
        pair = [[width_of(layer) for layer in layer_points(of)] for of in (branch.unet, unet)]
        if pair[0] != pair[1]:
            families = [_family(of) for of in (branch.unet, unet)]
            raise ValueError(
                f"{self.name} was given {families[0]} branch ({self.kind}, {len(pair[0])} layers) and {families[1]} MODEL "
                f"({len(pair[1])} layers): load a branch and a checkpoint of one family."
            )
        widths = [{t.cross.to_k.weight.shape[1] for t in transformer_places(of)} for of in (branch.unet, unet)]
        given = [widths[1] if side is None else {side.context.shape[-1]} for side in (self.positive, self.negative)]
        if widths[0] and (other := set.union(*given) - widths[0]):
            raise ValueError(
                f"{self.name}'s branch ({self.kind}) reads prompts of width {widths[0].pop()}, and this one's is {other.pop()}: "
                "encode its prompt with the CLIP that belongs to it."
            )

    def of_part(self, cut: Callable[[torch.Tensor], torch.Tensor]) -> Branch:
        assert self.mask is not None
        picture = cut(self.picture.movedim(-1, 1)).movedim(1, -1)
        return replace(self, mask=cut(self.mask), picture=picture, latents=None)

    def prepared(self, size: tuple[int, int]) -> Branch:
        if self.latents is not None and tuple(self.latents.shape[-2:]) == size:
            return self
        assert self.mask is not None
        return replace(self, latents=masked_latents(self.vae, self.picture, self.mask, size))

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun | None:
        if not (self.layer_scale or self.attention_scale):
            return None
        assert self.latents is not None and self.mask is not None
        size = (self.latents.shape[-2], self.latents.shape[-1])
        with torch.inference_mode(False):
            latents = as_ordinary(run.model.process_latent_in(self.latents))
            keep = keep_channel(self.mask, size, self.vae.spacial_compression_encode()).to(latents)
            return BranchRun(self, run, torch.cat([repeat_to_batch(of, run.batch) for of in (latents, keep)], dim=1))


def with_branch(model: ModelPatcher, settings: Branch) -> ModelPatcher:
    """A clone of `model` on which the branch is besides those that are there; `settings.number` is chosen here.

    Raises ValueError, in one sentence, for what does not fit each other.
    """
    assert settings.mask is not None
    check_pictures(settings.picture, "'image'")
    mask = as_mask_batch(settings.mask)
    common_count(image=len(settings.picture), mask=len(mask))
    taken = method_keys(model)
    number = next(n for n in itertools.count(1) if replace(settings, number=n).key not in taken)
    height, width = settings.picture.shape[1:3]
    settings = replace(settings, number=number, mask=resize_mask(mask, (height, width)))
    if settings.strength:
        cell = settings.vae.spacial_compression_encode()
        settings = settings.prepared((height // cell, width // cell))
    return with_method(model, settings)


def _family(unet: UNetModel) -> str:
    if unet.model_channels != 320:
        return "another"
    return "an SD1.5" if unet.num_classes is None else "an SDXL"


def masked_latents(vae: Any, picture: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The latents [B, 4, *size] of a picture [B, H, W, 3 or 4] in [0, 1], black where `mask` [B, 1, H, W] is hole.

    Raises ValueError for a VAE of another kind.
    """
    cell = vae.spacial_compression_encode()
    hole = hole_of(fitted(mask, size, cell)).to(picture.device)
    shown = torch.where(hole, 0.0, fitted(picture[..., :3].movedim(-1, 1), size, cell))
    latents: torch.Tensor = vae.encode(shown.movedim(1, -1))
    if latents.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"{Branch.name} was given a VAE whose latents have {latents.shape[1]} channels, and a branch's have "
            f"{LATENT_CHANNELS}: connect the checkpoint's own VAE."
        )
    return latents


def keep_channel(mask: torch.Tensor, size: tuple[int, int], cell: int) -> torch.Tensor:
    """A branch's mask channel for latents of `size`, [B, 1, *size]: 1 where the nearest pixel is known, 0 where it is hole."""
    return 1.0 - torch.nn.functional.interpolate(hole_of(fitted(mask, size, cell)).float(), size=size, mode="nearest")


def fitted(planes: torch.Tensor, size: tuple[int, int], cell: int) -> torch.Tensor:
    """A picture [B, 3, H, W] or its mask [B, 1, H, W], as many pixels large as a latent of `size` takes.

    One of less than a cell more is cut about its middle, as the host's VAE cuts it; others are resized.
    """
    height, width = (side * cell for side in size)
    more = (planes.shape[-2] - height, planes.shape[-1] - width)
    if all(0 <= of < cell for of in more):
        top, left = (of // 2 for of in more)
        return planes[..., top : top + height, left : left + width]
    if planes.shape[1] == 1:
        return resize_mask(planes, (height, width))
    return resampled(planes, (height, width), "bicubic").clamp(0.0, 1.0)


class BranchRun(MethodRun):
    """A branch in one run. `known` [B, 5, h, w] is what it sees besides the noisy latent."""

    def __init__(self, settings: Branch, run: SamplingRun, known: torch.Tensor) -> None:
        self._settings = settings
        self._run = run
        self._known = known

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        settings = self._settings
        # Ordinary tensors, not inference ones: RASG's backward pass goes through them.
        with torch.inference_mode(False), torch.no_grad():
            features = self._look(call)
        layer_scale, attention_scale = (
            settings.strength * of for of in (settings.layer_scale, settings.attention_scale)
        )
        return injected(call.unet, features, layer_scale, attention_scale, call.options)

    def _look(self, call: UNetCall) -> Features:
        (patcher,) = self._run.models(self._settings)
        network: BranchNetwork = patcher.model
        seen = [self._seen(call, number, network) for number in range(len(call.rows))]
        # Without a prompt, or with one for both sides, a branch sees the same twice.
        firsts = [next(index for index, one in enumerate(seen) if one.equals(other)) for other in seen]
        asked = [seen[index] for index in sorted(set(firsts))]
        contexts = [of.context for of in asked if of.context is not None]
        ys = [of.y for of in asked if of.y is not None]
        found = network(
            torch.cat([of.x for of in asked]),
            as_ordinary(call.timesteps)[:1].expand(len(asked) * self._run.batch),
            _joined(contexts) if contexts else None,
            torch.cat(ys) if ys else None,
        )
        if len(asked) == len(seen):
            return found
        places = [sorted(set(firsts)).index(index) for index in firsts]

        def of_rows(feature: torch.Tensor) -> torch.Tensor:
            parts = feature.split(self._run.batch)
            return torch.cat([parts[place] for place in places])

        attentions = {place: of_rows(feature) for place, feature in found.attentions.items()}
        return Features([of_rows(feature) for feature in found.layers], attentions)

    def _seen(self, call: UNetCall, number: int, network: BranchNetwork) -> _Seen:
        """What the branch is shown for one of the call's prompts."""
        rows, batch = call.rows[number], self._run.batch
        here = slice(number * batch, (number + 1) * batch)
        x = as_ordinary(call.x[here, :LATENT_CHANNELS])
        x = torch.cat((x, rows.cut(self._known).to(x)), dim=1)
        own = self._own(rows)
        context = y = None
        if network.reads_text:
            context = as_ordinary(call.context[here])
            if own is not None:
                context = repeat_to_batch(as_ordinary(own.context), batch).to(context)
        if call.y is not None and network.reads_pooled:
            y = as_ordinary(call.y[here])
            if own is not None and own.pooled is not None:
                pooled = repeat_to_batch(as_ordinary(own.pooled), batch).to(y)
                y = torch.cat((pooled, y[:, pooled.shape[1] :]), dim=1)
        return _Seen(x, context, y)

    def _own(self, rows: PromptRows) -> Text | None:
        return self._settings.positive if rows.conditional else self._settings.negative


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a branch is shown for a prompt: its input [B, 9, h, w], the text it reads [B, tokens, channels], and SDXL's y."""

    x: torch.Tensor
    context: torch.Tensor | None
    y: torch.Tensor | None

    def equals(self, other: _Seen) -> bool:
        pairs = ((self.x, other.x), (self.context, other.context), (self.y, other.y))
        return all(
            one is two or (one is not None and two is not None and one.shape == two.shape and torch.equal(one, two))
            for one, two in pairs
        )


def _joined(contexts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Texts of different lengths are repeated to a common one, which changes no attention; so does the host."""
    length = math.lcm(*(of.shape[1] for of in contexts))
    return torch.cat([of.repeat(1, length // of.shape[1], 1) for of in contexts])
