"""The gradient of a score of cross-attention by the latent, taken on the way through one call of the UNet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from comfy.model_management import OOM_EXCEPTION, soft_empty_cache

from .autograd import as_ordinary, full_precision, gradients_enabled, saving_copies
from .call_rows import PromptRows
from .protocol import UNetCall
from .sampling_run import SamplingRun
from .unet_attention import Place, TransformerPlace, add_patch, use_differentiable_attention

Grid = tuple[int, int]
"""Height and width in cells of a transformer block's attention."""


class Score(Protocol):
    """A score of one call of the UNet: hears of each block that is read, and is then asked for its value."""

    def read(
        self, place: TransformerPlace, grid: Grid, rows: PromptRows, n: torch.Tensor, context: torch.Tensor
    ) -> None:
        """A cross-attention is about to read `context` [B, tokens, channels] with `n` [B, pixels, channels]."""

    def value(self) -> torch.Tensor:
        """The score, of any shape; what is differentiated is its sum."""
        ...


class ScoreGradient:
    """Collects dS / dz of the calls that go through `call_unet`, for a run's latents z and scores S that are added up.

    `factors` are the levels that are read, in latent cells per grid cell; `score_of` makes the score of a call. The graph ends at
    the last block that is read: the backward pass runs there and then, before the expensive finer output blocks, which record
    nothing. Where the graph does not fit on the GPU it goes to main memory.
    """

    def __init__(
        self, run: SamplingRun, hole: torch.Tensor, factors: Collection[int], score_of: Callable[[], Score], who: str
    ) -> None:
        """`hole` [B, 1, h, w] has the size of the run's latents; `who`, the method's name, begins each message."""
        self._run = run
        self._hole = hole
        self._factors = factors
        self._score_of = score_of
        self._who = who
        self._graph_on_cpu = False
        self.total: torch.Tensor | None = None
        """dS / dz of the calls since it was last set to None, [B, C, h, w]; None where there was none."""

    def call_unet(self, call_next: Callable[[UNetCall], torch.Tensor], call: UNetCall) -> torch.Tensor:
        """Makes a call, whose rows are all of positive prompts, and returns its output, detached.

        Raises RuntimeError, in one sentence, where the gradient is not finite.
        """
        self._run.make_weights_ordinary(call.unet)
        try:
            output, gradient = self._recorded(call_next, call)
        except OOM_EXCEPTION:
            if self._graph_on_cpu:
                raise
            logging.info(f"{self._who}: the graph does not fit on the GPU and goes to main memory, which is slower.")
            self._graph_on_cpu = True
            soft_empty_cache()
            output, gradient = self._recorded(call_next, call)
        batch, _, height, width = self._hole.shape
        if self.total is None:
            self.total = gradient.new_zeros(batch, gradient.shape[1], height, width)
        for rows, part in zip(call.rows, gradient.split(batch), strict=True):
            target = rows.cut(self.total)
            target += part.to(target.device)
        return output

    def _recorded(
        self, call_next: Callable[[UNetCall], torch.Tensor], call: UNetCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        channels = self._run.model.latent_format.latent_channels
        recorded = _RecordedCall(call, len(self._hole), self._factors, channels, self._score_of(), self._who)
        copies = call.others_write or self._graph_on_cpu
        saving = saving_copies(call.unet, self._graph_on_cpu) if copies else nullcontext()
        return recorded.run(call_next, saving), recorded.gradient


class _RecordedCall:
    """One call of the UNet: its output as ever, and the gradient on the way."""

    def __init__(
        self, call: UNetCall, batch: int, factors: Collection[int], latent_channels: int, score: Score, who: str
    ) -> None:
        self._call = call
        self._batch = batch
        self._read = {t.place: t for t in call.places if t.factor in factors}
        self._last = list(self._read)[-1]
        self._latent_channels = latent_channels
        self._score = score
        self._who = who
        self._cells = 1
        self._latent = torch.empty(0)
        self.gradient = torch.empty(0)
        """After the call: dS / dz, [rows, C, h, w]."""

    def run(self, call_next: Callable[[UNetCall], torch.Tensor], saving: AbstractContextManager[Any]) -> torch.Tensor:
        """Makes the call; `saving` is the context in which the graph is recorded (see `autograd.saving_copies`)."""
        call = self._call
        with gradients_enabled(), saving:
            self._latent = full_precision(call.x[:, : self._latent_channels]).clone().requires_grad_()
            rest = as_ordinary(call.x[:, self._latent_channels :].clone())
            options = call.options.copy()
            add_patch(options, "attn2_patch", self._patch)
            use_differentiable_attention(options)
            output = call_next(
                replace(call.ordinary(), x=torch.cat((self._latent.to(call.x.dtype), rest), dim=1), options=options)
            )
        return output.detach()

    def _patch(
        self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        place: Place = (*extra_options["block"], extra_options["block_index"])
        read = self._read.get(place)
        if read is not None:
            height, width = extra_options["activations_shape"][-2:]
            self._cells = max(self._cells, height * width)
            for number, rows in enumerate(self._call.rows):
                here = slice(number * self._batch, (number + 1) * self._batch)
                # What other packs have appended to the context is no text.
                self._score.read(read, (height, width), rows, n[here], context[here, : self._call.text_tokens])
            if place == self._last:
                self.gradient = self._differentiated()
                torch.set_grad_enabled(False)
        return n, context, value

    def _differentiated(self) -> torch.Tensor:
        # Half precision would lose the small gradient of a mean over many pixels.
        scale = float(self._cells) if self._call.x.dtype == torch.float16 else 1.0
        (gradient,) = torch.autograd.grad(self._score.value().sum() * scale, self._latent)
        if not bool(gradient.isfinite().all()):
            dtype = str(self._call.x.dtype).removeprefix("torch.")
            remedy = (
                "start ComfyUI with --bf16-unet or --fp32-unet"
                if self._call.x.dtype in (torch.float16, torch.bfloat16)
                else "the prompt, the checkpoint or a LoRA holds NaN or infinite values, so encode or load it anew"
            )
            raise RuntimeError(
                f"{self._who}'s gradient is not finite in {dtype}: {remedy}, or take the {self._who} node out."
            )
        return gradient / scale
