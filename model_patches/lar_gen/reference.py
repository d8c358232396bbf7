"""Refine: the decoder's self-attention reads, besides the picture, what a reference branch sees of a subject.

LAR-Gen, section 3.3, and the released code. At each noise level the subject's latent, noised afresh to that level for the
positive and for the negative prompts, goes through a branch; in each self-attention of the branch's decoder its input
n' = norm1(x) is stored, and the UNet's self-attention of the same block takes queries from its own n, and keys and values from
[n ; n'], with its own weights.

The branch is a trained reference network (`branch.Branch`), or the UNet itself, untrained for it: what LAR-Gen's training
starts from. The UNet itself reads the same text as the rows that it is for, and an inpainting one is told that nothing of the
subject is hole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher

from ..core.autograd import as_ordinary
from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun
from ..core.unet_attention import (
    Place,
    TransformerPlace,
    add_patch,
    attention,
    require_unet,
    transformer_places,
)
from .branch import Branch
from .region import pixel_weights

Features = dict[Place, torch.Tensor]
"""What a branch has stored, [rows, tokens, channels] by transformer block."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Refine(Method):
    """Settings. `strength` mixes the attention without the subject (0) and with it (1, as released).

    latents: [S, 4, h, w] of the subject, as a VAE gives them.
    is_one: they are views of one subject, which are read together; else one subject for all pictures or one for each.
    reuse: a branch's features are used for so many noise levels; more than 1 is an approximation.
    branch: a trained reference network; None is the UNet itself.
    details: CLIP's last states of the subject, [S, tokens, width], which a trained one reads.
    mask: [B, 1, H, W], 1 = where the subject is read; everywhere without one, as released.
    """

    name: ClassVar = "Refine"
    order: ClassVar = 150

    latents: torch.Tensor
    is_one: bool
    reuse: int = 1
    branch: Branch | None = None
    details: torch.Tensor | None = None

    def models(self) -> Sequence[ModelPatcher]:
        return () if self.branch is None else (self.branch.model,)

    def check(self, model: object) -> None:
        unet = require_unet(model, self.name)
        if unet.in_channels not in (4, 9):
            raise ValueError(
                f"{self.name} works with plain and inpainting checkpoints, whose UNet has 4 or 9 input channels; this one has "
                f"{unet.in_channels}."
            )
        if (given := self.latents.shape[1]) != unet.out_channels:
            raise ValueError(
                f"{self.name} was given a subject's latent of {given} channels, and this MODEL's have {unet.out_channels}: "
                "encode the subject with the checkpoint's own VAE."
            )
        if self.branch is not None:
            self._check_branch(self.branch, unet)

    def _check_branch(self, branch: Branch, unet: Any) -> None:
        own = branch.model.model.diffusion_model
        plans = [{t.place: t.module.norm1.weight.shape for t in _read_places(of)} for of in (own, unet)]
        widths = {t.cross.to_k.weight.shape[1] for t in transformer_places(own)}
        if plans[0] != plans[1] or widths != {branch.weight.shape[0]}:
            raise ValueError(
                f"{self.name}'s reference network and this MODEL have other blocks: load weights and a checkpoint of one family."
            )
        if own.num_classes is not None and branch.pooled is None:
            raise ValueError(
                f"{self.name}'s reference network is SDXL's, and has to be told what an empty prompt is: load it by Load "
                "LAR-Gen, whose CLIP says so."
            )

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        if not self.is_one and len(self.latents) not in (1, run.batch):
            raise ValueError(
                f"{self.name} was given {len(self.latents)} subjects for {run.batch} pictures: give one for all, or one for each."
            )
        return RefineRun(self, run, None if self.mask is None else hole)


class RefineRun(MethodRun):
    """Refine in one run. `region` [B, 1, h, w] is where the subject is read; None is everywhere."""

    def __init__(self, settings: Refine, run: SamplingRun, region: torch.Tensor | None) -> None:
        self._settings = settings
        self._run = run
        self._region = region
        self._levels = 0
        """How many noise levels there have been, the present one included."""
        self._sigma: float | None = None
        self._known: dict[tuple[bool, int, torch.device], _Known] = {}
        """By role, and by number among the prompts of that role in a call."""

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        """Runs the branch, and lets the call's self-attentions read what it has stored."""
        if self._sigma != call.sigma:
            self._sigma, self._levels = call.sigma, self._levels + 1
        # Ordinary tensors, not inference ones: RASG's backward pass goes through them.
        with torch.inference_mode(False), torch.no_grad():
            stored = self._stored(call)
        _Reading(call, stored, self._settings.strength, self._region).install()
        return nullcontext()

    def _stored(self, call: UNetCall) -> Features:
        """What the call's rows read: [rows, tokens, channels] by block. All that isn't known is found in one pass."""
        batch, level = self._run.batch, self._levels
        keys, asked = [], {}
        for number, rows in enumerate(call.rows):
            here = slice(number * batch, (number + 1) * batch)
            text = _Text(call.context[here], None if call.y is None else call.y[here]).without_repeats()
            before = sum(other.conditional == rows.conditional for other in call.rows[:number])
            key = (rows.conditional, before, call.x.device)
            keys.append(key)
            known = self._known.get(key)
            if known is None or level >= known.level + self._settings.reuse or not known.text.equals(text):
                asked[key] = text
        if asked:
            passes = [self._pass(call, conditional, text) for (conditional, *_), text in asked.items()]
            found = self._look(call, passes)
            for (key, text), features in zip(asked.items(), found, strict=True):
                self._known[key] = _Known(level, text, features)
        of_groups = [self._known[key].features for key in keys]
        return {
            place: torch.cat([features[place].expand(batch, -1, -1) for features in of_groups])
            for place in of_groups[0]
        }

    def _look(self, call: UNetCall, passes: Sequence[_Pass]) -> list[Features]:
        """The features of each, [groups, tokens, channels]."""
        x, context = (torch.cat(parts) for parts in zip(*((of.x, of.text.context) for of in passes), strict=True))
        ys = [of.text.y for of in passes if of.text.y is not None]
        unet = call.unet if self._settings.branch is None else self._branch_model().diffusion_model
        # All rows of a call have one timestep.
        timesteps = as_ordinary(call.timesteps)[:1].expand(len(x))
        features = decoder_inputs(unet, x, timesteps, context, torch.cat(ys) if ys else None)
        parts = {place: of.split([len(one.x) for one in passes]) for place, of in features.items()}
        return [
            {place: of[number].reshape(one.groups, -1, of[number].shape[2]) for place, of in parts.items()}
            for number, one in enumerate(passes)
        ]

    def _pass(self, call: UNetCall, conditional: bool, text: _Text) -> _Pass:
        """What the branch is asked for the rows of a prompt."""
        latents = self._run.model.process_latent_in(as_ordinary(self._settings.latents))
        noise = reference_noise(self._run.seed, call.sigma, conditional, latents.shape)
        latents, noise = (of.to(call.x.device, torch.float32) for of in (latents, noise))
        if self._settings.branch is not None:
            return self._pass_of_branch(call, self._settings.branch, self._noised(call, latents, noise), text)
        views, texts = len(latents), len(text.context)
        if self._settings.is_one:
            groups, text = texts, text.repeated(views)
            latents, noise = (of.repeat(texts, 1, 1, 1) for of in (latents, noise))
        else:
            groups = max(views, texts)
            text = text.expanded(groups)
            latents, noise = (of.expand(groups, -1, -1, -1) for of in (latents, noise))
        x = self._noised(call, latents, noise)
        if call.unet.in_channels == 9:
            x = torch.cat((x, torch.zeros_like(x[:, :1]), latents), dim=1)
        return _Pass(x.to(call.x.dtype), text, groups)

    def _pass_of_branch(self, call: UNetCall, branch: Branch, x: torch.Tensor, text: _Text) -> _Pass:
        details = self._settings.details
        assert details is not None
        dtype = self._branch_model().get_dtype_inference()
        weight, bias, details = (as_ordinary(of).to(x) for of in (branch.weight, branch.bias, details))
        y = None
        if text.y is not None and branch.pooled is not None:
            # The sizes are those of the picture; they are the same for all of a batch.
            pooled = as_ordinary(branch.pooled).to(text.y)
            y = torch.cat((pooled, text.y[:1, pooled.shape[1] :]), dim=1).expand(len(x), -1).to(dtype)
        context = F.linear(details, weight, bias).to(dtype)
        return _Pass(x.to(dtype), _Text(context, y), 1 if self._settings.is_one else len(x))

    def _branch_model(self) -> Any:
        (patcher,) = self._run.models(self._settings)
        return patcher.model

    def _noised(self, call: UNetCall, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        sampling = self._run.model.model_sampling
        sigma = torch.full((len(latents),), call.sigma, device=latents.device, dtype=torch.float32)
        return sampling.calculate_input(sigma, sampling.noise_scaling(sigma, noise, latents))


def _read_places(unet: Any) -> list[TransformerPlace]:
    """The transformer blocks of a UNet's decoder that have a self-attention."""
    return [t for t in transformer_places(unet) if t.place[0] == "output" and not t.module.disable_self_attn]


def decoder_inputs(
    unet: Any,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    y: torch.Tensor | None,
    options: Mapping[str, Any] | None = None,
) -> Features:
    """A pass of a UNet up to the last self-attention of its decoder: their inputs n'. `options` are the host's for a call."""
    places = {t.place for t in _read_places(unet)}
    found: Features = {}

    def store(
        n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        place: Place = (*extra_options["block"], extra_options["block_index"])
        if place in places:
            found[place] = n
            if len(found) == len(places):
                raise _AllStored
        return n, context, value

    with suppress(_AllStored):
        unet(x, timesteps, context, y, None, {**(options or {}), "patches": {"attn1_patch": [store]}})
    return found


class _AllStored(Exception):
    """Ends a pass of a branch: what follows is read by nobody."""


def reference_noise(seed: int, sigma: float, conditional: bool, shape: Sequence[int]) -> torch.Tensor:
    """The branch's noise at a noise level; for the positive prompts and for the negative ones a different one.

    It depends on nothing else, so that how the host batches prompts, and how often it asks, changes nothing.
    """
    what = f"{seed} {sigma!r} {'positive' if conditional else 'negative'}"
    number = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number))


@dataclass(frozen=True, eq=False)
class _Text:
    """What the branch's rows read: context [rows, tokens, channels], and SDXL's y [rows, channels]."""

    context: torch.Tensor
    y: torch.Tensor | None

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Text:
        return _Text(change(as_ordinary(self.context)), None if self.y is None else change(as_ordinary(self.y)))

    def without_repeats(self) -> _Text:
        """One row, where all rows are equal, as they are in a batch with one prompt."""
        same = all(torch.equal(of, of[:1].expand_as(of)) for of in (self.context, self.y) if of is not None)
        return self._each(lambda of: of[:1] if same else of)

    def repeated(self, times: int) -> _Text:
        """Each row so many times, one after the other."""
        return self._each(lambda of: of.repeat_interleave(times, dim=0))

    def expanded(self, count: int) -> _Text:
        return self._each(lambda of: of.expand(count, *of.shape[1:]))

    def equals(self, other: _Text) -> bool:
        return _equal(self.context, other.context) and _equal(self.y, other.y)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


@dataclass(frozen=True, eq=False)
class _Pass:
    """What a branch is asked at once, and how many groups of tokens come of it: one for all pictures, or one for each."""

    x: torch.Tensor
    text: _Text
    groups: int


@dataclass(frozen=True, eq=False)
class _Known:
    """The features of a role's last pass: at which of the run's noise levels, and for which text."""

    level: int
    text: _Text
    features: Features


class _Reading:
    """The patches by which the self-attentions of a call read stored features."""

    def __init__(self, call: UNetCall, stored: Features, strength: float, region: torch.Tensor | None) -> None:
        self._call = call
        self._stored = stored
        self._strength = strength
        self._region = region
        self._begin: dict[Place, int] = {}
        """Where in the keys the stored ones begin; other packs' may lie before and behind."""

    def install(self) -> None:
        options = self._call.options
        add_patch(options, "attn1_patch", self._append)
        if self._strength == 1.0 and self._region is None:
            return
        replace = dict(options.get("patches_replace", {}))
        attn1 = dict(replace.get("attn1", {}))
        for place in self._stored:
            attn1[place] = self._mixed(place, attn1.get(place, attn1.get(place[:2])) or attention)
        replace["attn1"] = attn1
        options["patches_replace"] = replace

    def _append(
        self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        place: Place = (*extra_options["block"], extra_options["block_index"])
        stored = self._stored.get(place)
        if stored is None:
            return n, context, value
        if len(context) != len(stored):
            raise ValueError(
                f"Refine expected {len(stored)} rows in self-attention and found {len(context)}: another node cuts the picture "
                "into tiles; take it or Refine out."
            )
        self._begin[place] = context.shape[1]
        return n, torch.cat((context, stored.to(context)), dim=1), torch.cat((value, stored.to(value)), dim=1)

    def _mixed(self, place: Place, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def mixed(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any], **kwargs: Any
        ) -> torch.Tensor:
            begin, count = self._begin[place], self._stored[place].shape[1]
            alone = (torch.cat((of[:, :begin], of[:, begin + count :]), dim=1) for of in (k, v))
            without = attend(q, *alone, extra_options, **kwargs)
            read = attend(q, k, v, extra_options, **kwargs)
            return without + self._weights(extra_options, q) * (read - without)

        return mixed

    def _weights(self, extra_options: dict[str, Any], like: torch.Tensor) -> torch.Tensor | float:
        """How much each pixel of the rows reads the subject, [rows, pixels, 1]."""
        if self._region is None:
            return self._strength
        height, width = extra_options["activations_shape"][-2:]
        weights = self._strength * pixel_weights(self._region, self._call.rows, (height, width))
        if weights.shape[1] != like.shape[1]:
            raise ValueError(
                f"Refine expected {weights.shape[1]} pixels in self-attention and found {like.shape[1]}: another node merges or "
                "cuts them; take it or the mask of Refine out."
            )
        return weights.to(like)
