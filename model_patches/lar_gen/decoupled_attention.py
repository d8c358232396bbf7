"""Assign: decoupled cross-attention, by which a UNet reads a subject's tokens besides the text's.

LAR-Gen, section 3.2 (as IP-Adapter's, arXiv 2308.06721):

    out = Attn(q, K, V) + beta Attn(q, K_ip, V_ip)

K_ip and V_ip are linear in the subject's tokens, with weights of their own in each block. The tokens stay the same in all steps,
so that keys and values are computed once in a run. The rows of negative prompts read the tokens of an all-zero picture, with
the same beta (released code).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..core.autograd import as_ordinary
from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun
from ..core.unet_attention import Place, attention, require_unet, transformer_places
from .region import pixel_weights

Projections = Mapping[Place, tuple[torch.Tensor, torch.Tensor]]
"""The weights to_k_ip and to_v_ip of each transformer block, [inner, width] each."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Assign(Method):
    """Settings. `strength` is beta: 0.3 (paper) to 0.45 (released example) with text, 1 with an empty prompt.

    subject: tokens [S, n, width] of one picture (S = 1) or of one for each picture of the batch.
    nothing: tokens [1, n, width] of an all-zero picture, for the rows of negative prompts.
    projections: see `Projections`.
    mask: [B, 1, H, W], 1 = where the subject is read; everywhere without one, as released.
    """

    name: ClassVar = "Assign"
    order: ClassVar = 120

    subject: torch.Tensor
    nothing: torch.Tensor
    projections: Projections

    def check(self, model: object) -> None:
        places = {t.place: t.cross for t in transformer_places(require_unet(model, self.name))}
        text, own = ({of.shape[1] for of in weights} for weights in (_keys_of(places), self._keys()))
        if text != own:
            raise ValueError(
                f"{self.name} was given weights for a text of width {_listed(own)}, and this MODEL's has {_listed(text)}: 768 is "
                "SD1.5, 1024 SD2 and 2048 SDXL. Load weights and a checkpoint of one family."
            )
        if places.keys() != self.projections.keys() or any(
            self.projections[place][0].shape != cross.to_k.weight.shape for place, cross in places.items()
        ):
            raise ValueError(
                f"{self.name}'s weights have {len(self.projections)} blocks and this MODEL has {len(places)}, or they differ in "
                "width: load weights and a checkpoint of one family."
            )

    def _keys(self) -> list[torch.Tensor]:
        return [key for key, _ in self.projections.values()]

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        if len(self.subject) not in (1, run.batch):
            raise ValueError(
                f"{self.name} was given {len(self.subject)} subjects for {run.batch} pictures: give one for all, or one for each."
            )
        return AssignRun(self, run.batch, None if self.mask is None else hole)


def _keys_of(places: Mapping[Place, Any]) -> list[torch.Tensor]:
    return [cross.to_k.weight for cross in places.values()]


def _listed(widths: set[int]) -> str:
    return " and ".join(str(width) for width in sorted(widths))


class AssignRun(MethodRun):
    """Assign in one run. `region` [B, 1, h, w] is where the subject is read; None is everywhere."""

    def __init__(self, settings: Assign, batch: int, region: torch.Tensor | None) -> None:
        self._settings = settings
        self._batch = batch
        self._region = region
        self._known: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        """Adds the subject to every cross-attention, around a replacement of it that is there."""
        replace = dict(call.options.get("patches_replace", {}))
        attn2 = dict(replace.get("attn2", {}))
        for t in call.places:
            earlier = attn2.get(t.place, attn2.get(t.place[:2])) or attention
            attn2[t.place] = self._with_subject(call, t.place, earlier)
        replace["attn2"] = attn2
        call.options["patches_replace"] = replace
        return nullcontext()

    def _with_subject(
        self, call: UNetCall, place: Place, attend: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        def attended(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any], **kwargs: Any
        ) -> torch.Tensor:
            out = attend(q, k, v, extra_options, **kwargs)
            of_both = [self._keys_and_values(place, rows.conditional, q) for rows in call.rows]
            keys, values = (torch.cat(parts) for parts in zip(*of_both, strict=True))
            read = attention(q, keys, values, extra_options)
            return out + self._settings.strength * self._weights(call, extra_options, q) * read

        return attended

    def _keys_and_values(
        self, place: Place, conditional: bool, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one prompt's rows: [B, n, inner] each."""
        key = (place, conditional, like.device, like.dtype)
        if key not in self._known:
            # Ordinary tensors, not inference ones: RASG's backward pass goes through them.
            with torch.inference_mode(False), torch.no_grad():
                tokens = as_ordinary(self._settings.subject if conditional else self._settings.nothing).to(like)
                made = [F.linear(tokens, as_ordinary(of).to(like)) for of in self._settings.projections[place]]
                self._known[key] = (made[0].expand(self._batch, -1, -1), made[1].expand(self._batch, -1, -1))
        return self._known[key]

    def _weights(self, call: UNetCall, extra_options: dict[str, Any], like: torch.Tensor) -> torch.Tensor | float:
        """How much each pixel of the rows reads the subject, [rows, pixels, 1]."""
        if self._region is None:
            return 1.0
        height, width = extra_options["activations_shape"][-2:]
        return pixel_weights(self._region, call.rows, (height, width)).to(like)
