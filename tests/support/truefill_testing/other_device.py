"""A device that is no CPU, on a CPU: it has no float64, and its tensors don't mix with others.

What is on it are wrappers around ordinary tensors, which compute on the CPU and call their device `OTHER`. Within `other_device`
tensors can be made there and moved there and back. As on a GPU, a number (a tensor without dimensions) may come from the CPU,
and so may an index.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from devtools.pack import ensure_host

ensure_host()

import comfy.model_management as host_memory  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

OTHER = torch.device("meta")
"""The one name that PyTorch lets pass where there is no such hardware."""

_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
_MOVES = {_aten.copy_.default, _aten._to_copy.default}


class Placed(torch.Tensor):
    """A tensor on `OTHER`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=OTHER,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.inner!r})"

    # What PyTorch refuses of a tensor without memory.
    is_meta = False

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def item(self) -> Any:
        return self.inner.item()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __bool__(self) -> bool:
        return bool(self.inner)

    def __int__(self) -> int:
        return int(self.inner)

    def __float__(self) -> float:
        return float(self.inner)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            # In inference mode functions that are made of others arrive whole.
            made = func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}) if made is NotImplemented else made


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Within it there is `OTHER`, the host knows it, and modules can be moved there; after it the host has nothing loaded."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    generator, tensor, as_tensor = torch.Generator, torch.tensor, torch.as_tensor

    def made(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        # PyTorch fills it where nobody can step in.
        return tensor(data, **options) if device is None else tensor(data, **options).to(device)

    def made_of(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        return as_tensor(data, **options) if device is None else as_tensor(data, **options).to(device)

    free_memory, room = host_memory.get_free_memory, 2**36

    def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
        if device != OTHER:
            return free_memory(device, torch_free_too)
        return (room, room) if torch_free_too else room

    try:
        with (
            patch.object(host_memory, "get_free_memory", get_free_memory),
            # The host itself takes float64 where it is told nothing else.
            patch.object(host_memory, "is_device_mps", lambda device: device == OTHER),
            patch.object(torch, "Generator", lambda device="cpu": generator()),
            patch.object(torch, "tensor", made),
            patch.object(torch, "as_tensor", made_of),
            # Its tensors make trouble for wrappers.
            patch.object(torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode)),
            _Mode(),
        ):
            yield OTHER
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        host_memory.current_loaded_models.clear()


def placed(patcher: Any) -> Any:
    """A model of the host, loaded onto `OTHER`."""
    patcher.load_device = OTHER
    host_memory.load_models_gpu([patcher])
    assert all(isinstance(weight, Placed) for weight in patcher.model.parameters())
    return patcher


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is _aten._has_compatible_shallow_copy_type.default:
        # A module's weight is replaced by one there, not filled with its values.
        return False
    tensors = [of for of in tree_leaves((args, kwargs)) if isinstance(of, torch.Tensor)]
    placed = [of for of in tensors if isinstance(of, Placed)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    there = bool(placed) if asked is None else asked.type == OTHER.type
    if placed and func not in _MOVES:
        counted = args[:1] if func in _INDEXING else (args, kwargs)
        for of in tree_leaves(counted):
            if isinstance(of, torch.Tensor) and not isinstance(of, Placed) and of.dim():
                raise RuntimeError(f"{func}: expected all tensors on one device, found {OTHER} and {of.device}")
    if func is _aten.copy_.default:
        there = isinstance(args[0], Placed)
    given = {id(of.inner): of for of in placed}
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if asked.type == OTHER.type else asked}
    args, kwargs = tree_map(lambda of: of.inner if isinstance(of, Placed) else of, (args, kwargs))
    made = func(*args, **kwargs)
    if not there:
        return made

    def back(of: Any) -> Any:
        if not isinstance(of, torch.Tensor) or isinstance(of, Placed):
            return of
        if of.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{func}: {OTHER} has no {of.dtype}")
        return given.get(id(of)) if id(of) in given else Placed(of)

    return tree_map(back, made)
