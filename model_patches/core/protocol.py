"""What a method is: frozen settings on a MODEL, and a guest of each sampling run.

A node leaves its settings on a clone of a model (`sampling_run.with_method`). When a sampler starts, the run asks each of them
to begin; the `MethodRun` that comes back lives and dies with the run. `core` knows methods by this protocol alone: a new one is a
module of its own, and a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from comfy.model_patcher import ModelPatcher

from .autograd import as_ordinary
from .call_rows import Conds, PromptRows
from .joint_attention import JointCall, JointEdit
from .unet_attention import TransformerPlace

if TYPE_CHECKING:
    from .sampling_run import SamplingRun


@dataclass(frozen=True, eq=False, kw_only=True)
class Method:
    """Settings that every method has; a method adds its own, and says how it begins.

    strength: 0 is the model without the method, bit for bit; 1 the paper.
    start_percent, end_percent: where in sampling it acts; 0 is the first step, 1 the last.
    mask: [B, 1, H, W] in [0, 1], 1 = hole (`with_method` takes [H, W] and [B, H, W] as well); overrules the masks of latent and
        conditioning.
    """

    name: ClassVar[str]
    """As people know it, in messages."""
    order: ClassVar[int]
    """Methods edit a call from the lowest to the highest; the highest is the outermost in `evaluate` and `call_unet`."""
    records_graph: ClassVar[bool] = False
    """Takes a gradient through the model, whose weights the host must not evict in between."""

    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    mask: torch.Tensor | None = None

    @property
    def key(self) -> str:
        """One of each key is on a model. It is the name, unless there may be several of a method."""
        return self.name

    def check(self, model: ModelPatcher) -> None:
        """Raises ValueError, in one sentence, for a model that the method can't act on."""

    def models(self) -> Sequence[ModelPatcher]:
        """Further networks, which the host's memory manager then loads with the model; in a run: `SamplingRun.models`."""
        return ()

    def of_part(self, cut: Callable[[torch.Tensor], torch.Tensor]) -> Method:
        """The settings for a sampler that works on a part of the picture: `cut` takes planes [B, C, H, W] of it, float32."""
        return self if self.mask is None else replace(self, mask=cut(self.mask))

    def prepared(self, size: tuple[int, int]) -> Method:
        """The settings for latents of `size` (height, width): asked before the models of a run are loaded."""
        return self

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun | None:
        """Joins a run. `hole` [B, 1, h, w] in [0, 1] is how much of each latent cell is hole; it is never empty."""
        raise TypeError(f"{type(self).__name__} says nothing about how it begins.")


class MethodRun:
    """A method within one run of a sampler. What isn't overridden changes nothing."""

    def sampler(self, sampler: Any) -> Any:
        """The sampler to run instead of `sampler`, which must not be changed."""
        return sampler

    def noise(self, noise: torch.Tensor, look: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """The noise [B, C, h, w] to begin with instead of `noise`, which must not be changed.

        `look(noise)` evaluates the model once, as a run that begins with that noise would at its first noise level.
        """
        return noise

    def begin_evaluation(self) -> None:
        """The sampler is about to evaluate the model, once for all conditionings."""

    def evaluate(self, call_next: Callable[[Conds], list[torch.Tensor]], conds: Conds) -> list[torch.Tensor]:
        """Evaluates all conditionings at one noise level; for methods that need an order of them, or several calls."""
        return call_next(conds)

    def edit(self, call: UNetCall) -> AbstractContextManager[Any]:
        """Edits one call of the UNet, by patches in `call.options` or hooks on modules, for as long as the context is open.

        Where a graph is recorded it stays open until the graph has been used: blocks may run again in the backward pass.
        """
        return nullcontext()

    def edit_joint(self, call: JointCall) -> JointEdit | None:
        """How one call of a diffusion transformer, which has no UNet, is edited."""
        return None

    def call_unet(self, call_next: Callable[[UNetCall], torch.Tensor], call: UNetCall) -> torch.Tensor:
        """Makes the call, which all methods have edited; for methods that change its inputs, or run it under autograd."""
        return call_next(call)


@dataclass(frozen=True, eq=False, kw_only=True)
class UNetCall:
    """One call of a UNet by the host.

    x [rows, C, h, w] and context [rows, tokens, channels] are what the UNet is called with, and so are timesteps, y, control,
    options (`transformer_options`, the call's own copy) and keywords.
    """

    unet: Any
    places: Sequence[TransformerPlace]
    rows: tuple[PromptRows, ...]
    """What the rows are: an entry for each conditioning, each with as many rows as there are pictures."""
    sigma: float
    x: torch.Tensor
    timesteps: Any
    context: torch.Tensor
    y: torch.Tensor | None
    control: Any
    options: dict[str, Any]
    keywords: dict[str, Any]
    others_write: bool
    """A ControlNet or another pack's patch is there, which may write into tensors that autograd needs afterwards."""

    def ordinary(self) -> UNetCall:
        """The call with inputs that autograd may save, all but `x`: the host makes them in inference mode."""
        return replace(
            self,
            timesteps=as_ordinary(self.timesteps),
            context=as_ordinary(self.context),
            y=as_ordinary(self.y),
            control=as_ordinary(self.control),
            keywords=as_ordinary(self.keywords),
        )

    @property
    def text_tokens(self) -> int:
        """How many tokens of text there are; what patches append to the context later is none."""
        return self.context.shape[1]
