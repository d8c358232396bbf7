"""Reweighting Attention Score Guidance: the noise of a stochastic sampler, replaced by a gradient of equal size.

HD-Painter, section 3.4. The score S of a noisy latent says how well the prompt's cross-attention at 1/32 of the picture
agrees with the hole (equations 8 and 9, with the signs and the shift of the released code); its normalised gradient
takes the place of the noise in DDIM's step (equation 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...imaging.masks import hole_cells
from ..core.autograd import as_ordinary, full_precision, gradients_enabled
from ..core.call_rows import Chunk
from ..core.unet_attention import Place, TransformerPlace, add_patch, use_differentiable_attention

FACTOR = 4
"""Latent cells per grid cell where attention is read: 1/32 of the picture."""

SHIFT = 1.0
"""Subtracted from the attention scores before they are compared with the hole (released code, not in the paper)."""


@dataclass(frozen=True, eq=False)
class RASG:
    """Settings of RASG. `eta` is DDIM's; `strength` the share of the noise that is replaced; percentages are of sampling;
    `sigma` is "ddim" or "released" (see `stochastic.released_over_ddim`); `mask` [B, 1, H, W]."""

    eta: float = 0.01
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    sigma: str = "ddim"
    mask: torch.Tensor | None = None


def attention_score(scores: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """S = - sum over tokens of the mean over pixels of BCE(sigmoid(a - 1), hole), summed over the batch (equation 9).

    `scores` is [B, pixels, tokens], the mean of raw attention scores over layers and heads; `hole` bool [B, pixels].
    """
    target = hole[..., None].expand_as(scores).to(scores.dtype)
    loss = F.binary_cross_entropy_with_logits(scores - SHIFT, target, reduction="none")
    return -loss.mean(dim=1).sum()


def normalized(gradient: torch.Tensor) -> torch.Tensor:
    """`gradient` [B, C, H, W] divided by the standard deviation of each picture's; a zero gradient stays zero."""
    deviation = gradient.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    return gradient / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


class RASGCall:
    """RASG within one call of the UNet on conditional rows: eps as ever, and the gradient of S on the way."""

    def __init__(
        self, places: Sequence[TransformerPlace], chunks: Sequence[Chunk], hole: torch.Tensor, latent_channels: int
    ):
        self._cross = {t.place: t.cross for t in places if t.factor == FACTOR}
        self._last = list(self._cross)[-1]
        self._chunks = chunks
        self._hole = hole
        self._latent_channels = latent_channels
        self._scores: dict[int, torch.Tensor] = {}
        self._latent = torch.empty(0)
        self._dtype = torch.float32
        self.gradient = torch.empty(0)
        """After the call: dS / dz, [rows, C, h, w]."""

    def run(
        self,
        unet: Any,
        x: torch.Tensor,
        arguments: Sequence[Any],
        keywords: dict[str, Any],
        transformer_options: dict[str, Any],
        saving: AbstractContextManager[Any],
    ) -> torch.Tensor:
        """Runs `unet(x, timesteps, context, y, control, transformer_options, **keywords)` and returns its output, detached.

        The graph ends at the last block at 1/32: the backward pass runs there and then, before the expensive fine output
        blocks, which record nothing. `saving` is the context in which the graph is recorded (see `autograd.saving_copies`).
        Raises RuntimeError where the gradient is not finite.
        """
        self._dtype = x.dtype
        with gradients_enabled(), saving:
            self._latent = full_precision(x[:, : self._latent_channels]).clone().requires_grad_()
            rest = as_ordinary(x[:, self._latent_channels :].clone())
            inputs = torch.cat((self._latent.to(x.dtype), rest), dim=1)
            self._install(transformer_options)
            output = unet(inputs, *as_ordinary(list(arguments)), transformer_options, **as_ordinary(keywords))
        return output.detach()

    def _install(self, transformer_options: dict[str, Any]) -> None:
        add_patch(transformer_options, "attn2_patch", self._read_scores)
        use_differentiable_attention(transformer_options)

    def _read_scores(
        self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        place: Place = (*extra_options["block"], extra_options["block_index"])
        cross = self._cross.get(place)
        if cross is None:
            return n, context, value
        batch = self._hole.shape[0]
        for number, chunk in enumerate(self._chunks):
            rows = slice(number * batch, (number + 1) * batch)
            tokens = chunk.tokens.words_and_ends[0].nonzero()[:, 0].to(context.device)
            query = full_precision(cross.to_q(n[rows]))
            key = full_precision(cross.to_k(context[rows][:, tokens]))
            # The mean over heads of q_h . k_h / sqrt(d) is the product over all channels at once.
            scores = query @ key.transpose(1, 2) * (cross.dim_head**-0.5 / cross.heads)
            self._scores[number] = self._scores[number] + scores if number in self._scores else scores
        if place == self._last:
            self.gradient = self._gradient(tuple(extra_options["activations_shape"][-2:]))
            torch.set_grad_enabled(False)
        return n, context, value

    def _gradient(self, grid: tuple[int, int]) -> torch.Tensor:
        score = self._latent.new_zeros(())
        for number, chunk in enumerate(self._chunks):
            hole = hole_cells(chunk.cut(self._hole), grid).flatten(1).to(self._latent.device)
            score = score + attention_score(self._scores[number] / len(self._cross), hole)
        # Half precision would lose the small gradient of a mean over many pixels.
        scale = float(grid[0] * grid[1]) if self._dtype == torch.float16 else 1.0
        (gradient,) = torch.autograd.grad(score * scale, self._latent)
        if not bool(gradient.isfinite().all()):
            raise RuntimeError(
                f"RASG's gradient is not finite in {str(self._dtype).removeprefix('torch.')}: start ComfyUI with --bf16-unet or "
                "--fp32-unet, or take the RASG node out."
            )
        return gradient / scale
