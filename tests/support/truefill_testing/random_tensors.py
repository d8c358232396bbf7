"""Random weights and a picture that are the same on every machine, for answers that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch


def random_tensors(
    shapes: Mapping[str, Sequence[int]], tables: Sequence[str], shared: Callable[[str], str] = str
) -> dict[str, torch.Tensor]:
    """Tensors of these names and shapes that let every input of a network matter.

    A name with one of the words of `tables` is a table of values and gets a deviation of 1; other matrices keep the size of what
    they are given. Names for which `shared` is the same have the same tensor.
    """
    random = np.random.RandomState(0)
    made: dict[str, torch.Tensor] = {}
    state = {}
    for name, shape in shapes.items():
        if shared(name) not in made:
            values = random.standard_normal(tuple(shape))
            if len(shape) > 1 and not any(word in name for word in tables):
                values /= np.prod(shape[1:]) ** 0.5
            elif len(shape) == 1:
                scale = "gamma" in name or ("norm" in name.lower() and name.endswith("weight"))
                values = 0.1 * values + (1.0 if scale else 0.0)
            made[shared(name)] = torch.from_numpy(values.astype(np.float32))
        state[name] = made[shared(name)]
    return state


def squares(height: int, width: int) -> torch.Tensor:
    """Ramps that start again and again, [H, W, 3] in [0, 1]."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([(x * 3 + y) % 256, (255 - 2 * x) % 256, (y * 4) % 256], axis=-1).astype(np.uint8)
    return torch.from_numpy(picture).float() / 255
