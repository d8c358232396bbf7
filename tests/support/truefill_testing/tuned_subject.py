"""A picture to tune a small model on, and what a tuning without Adam learns of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from devtools.pack import load_pack, pack_module

from .scene import randn
from .small_models import small_conditioning

load_pack()
_tuning = pack_module("training.subject_lora.tuning")


def subject_example(family: str, size: tuple[int, int]) -> Any:
    """A random latent [1, 4, *size], all of which counts, with one prompt."""
    latent, masks = 5.0 * randn(1, 4, *size, seed=30).float(), torch.ones(1, 1, *size)
    return _tuning.Example(latent=latent, masks=masks, concat=[], prompts=[small_conditioning(family, seed=3)])


def learned(patcher: Any, report: Callable[[int, float], None] = lambda step, loss: None) -> torch.Tensor:
    """The weights of a LoRA after one step on a small SD1.5 model, which were 0: its gradient."""
    tuner = _tuning.Tuner(patcher, _tuning.Tuning(steps=1, accumulate=2, rank=3, seed=5))
    # Adam would divide each gradient by its own size.
    tuner.optimizer = torch.optim.SGD([weight for of in tuner.adapters.values() for weight in of.parameters()], lr=1.0)
    with torch.inference_mode():
        tuner.run([subject_example("sd15", (16, 13))], [], report)
    return torch.cat([of.up.detach().cpu().flatten() for of in tuner.adapters.values()])
