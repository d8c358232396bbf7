"""Files of weights, from which nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.utils
import torch

SUFFIXES = (".pth", ".pt", ".safetensors")


def read_tensors(path: Path, where_to_get: str, nested: bool = False) -> Mapping[str, torch.Tensor]:
    """A file's tensors by their names; where it may be `nested`, those of its parts under "part.name".

    Raises ValueError, one sentence, for a file that has none or can't be read.
    """
    try:
        state: Any = comfy.utils.load_torch_file(str(path), safe_load=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path.name} can't be read as weights ({type(error).__name__}): it is damaged, incomplete, or holds something else. "
            f"Download it again, or take {where_to_get}."
        ) from error
    if nested and isinstance(state, Mapping):
        state = _flat(state)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path.name} holds other things than weights: take {where_to_get}.")
    return state


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in state.items():
        parts = _flat(value).items() if isinstance(value, Mapping) else ()
        flat.update({f"{name}.{part}": inner for part, inner in parts} if parts else {name: value})
    return flat


def differing(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of a file's tensors that are missing, too many or of other sizes."""
    names = expected.keys() | given.keys()
    both = expected.keys() & given.keys()
    return sorted(name for name in names if name not in both or expected[name].shape != given[name].shape)
