"""Gradients through a model that the host has loaded and runs in inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


def staying(model: ModelPatcher) -> ModelPatcher:
    """A clone whose weights the host doesn't evict between a forward and its backward pass.

    Raises ValueError where the host evicts weights by itself (its dynamic VRAM) and can't load this model in another way.
    """
    if model.is_dynamic() and model.cached_patcher_init is None:
        raise ValueError(
            "The MODEL's loader does not say how to load it again, which a gradient needs where ComfyUI moves weights by itself: "
            "take one of ComfyUI's own loaders, or start ComfyUI with --disable-dynamic-vram."
        )
    return model.clone(disable_dynamic=True)


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Records a graph although the host samples inside `torch.inference_mode()`.

    Within it, tensors made in inference mode must go through `as_ordinary` before autograd may save them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def as_ordinary(value: Any) -> Any:
    """Copies the inference tensors in `value` (a tensor, or dicts, lists and tuples of them) into ordinary ones."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: as_ordinary(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(as_ordinary(item) for item in value)
    return value


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or in its own type where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def saving_copies(module: torch.nn.Module, on_cpu: bool) -> saved_tensors_hooks:
    """Records a graph with copies of what the backward pass needs, so that code in between may write into the originals.

    `on_cpu` keeps the copies in main memory. The weights of `module`, into which nobody writes, are saved as they are.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor
        copy = tensor.detach().to("cpu", copy=True) if on_cpu else tensor.detach().clone()
        return tensor.device, copy

    def unpack(saved: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        device, copy = saved
        return copy.to(device)

    return saved_tensors_hooks(pack, unpack)


def make_weights_ordinary(module: torch.nn.Module) -> None:
    """Lets autograd save the weights of `module`, which the host has loaded in inference mode.

    Autograd refuses inference tensors, and that is a property of the tensor, not of its memory: each weight is replaced
    by an ordinary tensor over the same memory, so nothing is copied, values and addresses stay as they were, and results are
    bit-identical. None of them requires a gradient. Quantised weights are left: the host unpacks them at each use. Call it
    outside inference mode.
    """
    for child in module.modules():
        for name, weight in child._parameters.items():
            if type(weight) is torch.nn.Parameter and weight.is_inference():
                child._parameters[name] = torch.nn.Parameter(_same_memory(weight), requires_grad=False)
        for name, buffer in child._buffers.items():
            if type(buffer) is torch.Tensor and buffer.is_inference():
                child._buffers[name] = _same_memory(buffer)


def _same_memory(tensor: torch.Tensor) -> torch.Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


@contextmanager
def recomputed(unet: torch.nn.Module, copies: bool) -> Iterator[None]:
    """Activation checkpointing: within it the blocks of a UNet keep their inputs alone and run again in the backward pass.

    The backward pass has to happen within it, too. `copies` keeps copies of the inputs, where code between the blocks may write
    into them.
    """
    device = next((weight.device for weight in unet.parameters() if weight.is_cuda), None)
    if device is not None:
        # The first attention of a process makes PyTorch put cuDNN's first on some GPUs (H100), whatever order the host has set
        # for that call: a block that had it would run again with another kernel, whose results don't fit.
        some = torch.zeros(1, 1, 8, 64, dtype=torch.float16, device=device)
        scaled_dot_product_attention(some, some, some)
    blocks = [module for module in unet.modules() if isinstance(module, (ResBlock, SpatialTransformer))]
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = functools.partial(_run_again, block.forward, copies)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _run_again(forward: Callable[..., torch.Tensor], copies: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            # The UNet writes into it which block is at work.
            return value.copy()
        return value.clone() if copies and isinstance(value, torch.Tensor) else value

    args, kwargs = tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
