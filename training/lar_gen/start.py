"""What a stage begins with where no run of those before it is there: what the demo model has learned of subjects, as it ships."""

from __future__ import annotations

import torch

from ...weights.demo_model import FOLDER, read_file
from ...weights.demo_subject import FILE


def subject_ships() -> bool:
    """Whether the demo model comes with what it has learned of subjects."""
    return (FOLDER / FILE).is_file()


def shipped_part(prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of what it has learned of subjects whose names begin so, without that beginning, in float32."""
    state = read_file(FILE)
    return {name.removeprefix(prefix): tensor.float() for name, tensor in state.items() if name.startswith(prefix)}
