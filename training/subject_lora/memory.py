"""How much memory a step of the tuning holds, found without computing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.ops
import torch
from comfy.model_base import BaseModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...model_patches.core.autograd import gradients_enabled, recomputed
from ...model_patches.core.operations import in_memory
from .adapters import attached, fresh_adapters


class LiveTensors(TorchDispatchMode):
    """While it is entered, counts the bytes of tensors that are made and not yet freed; `most` is their peak.

    What is in `there` lies in memory anyway, and so do its views.
    """

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}
        for tensor in there:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._watch(storage, storage.nbytes())
        return made

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        if id(storage) in self._known:
            return
        self._known[id(storage)] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, id(storage)).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


class _FlashAttention(torch.autograd.Function):
    """Holds what a GPU's attention holds: its inputs and its answer, and no N x N matrix. It computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, made)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(
    _: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    return _FlashAttention.apply(q, k, v)


def step_memory(
    model: BaseModel, height: int, width: int, context: tuple[int, int], rank: int, outputs: bool, recompute: bool
) -> int:
    """Bytes that the forward and backward pass of one picture hold at their peak beside the weights and what is trained.

    model: with a UNet. height, width: of the latent. context: tokens of the prompt and their width. rank, outputs, recompute: of
    the `Tuning`. The network is built once more without memory (on PyTorch's meta device) and walked through; kernels' own
    workspaces and what an allocator wastes come on top.
    """
    config = model.model_config.unet_config
    dtype = model.get_dtype_inference()
    operations = in_memory(comfy.ops.disable_weight_init if model.manual_cast_dtype is None else comfy.ops.manual_cast)
    with gradients_enabled():
        unet = type(model.diffusion_model)(**{**config, "device": "meta"}, operations=operations).requires_grad_(False)
        adapters = {name: of.to("meta") for name, of in fresh_adapters(unet, rank, outputs, seed=0).items()}
        latent = torch.empty(1, config["in_channels"], height, width, dtype=dtype, device="meta")
        time, read = torch.empty(1, device="meta"), torch.empty(1, *context, dtype=dtype, device="meta")
        y = None
        if unet.num_classes is not None:
            y = torch.empty(1, config["adm_in_channels"], dtype=dtype, device="meta")
        again: AbstractContextManager[None] = recomputed(unet, False) if recompute else nullcontext()
        trained = [weight for of in adapters.values() for weight in of.parameters()]
        there = [*unet.parameters(), *unet.buffers(), *trained, latent, time, read]
        with attached(unet, adapters), again, LiveTensors(there) as live:
            options = {"optimized_attention_override": _attention}
            unet(latent, time, context=read, y=y, transformer_options=options).float().square().mean().backward()
    return live.most
