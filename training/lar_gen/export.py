"""What was trained of LAR-Gen, by the names of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...weights.demo_model import UNET_PREFIX
from ...weights.demo_subject import BRANCH_PREFIX, DETAIL_PREFIX, RESAMPLER_PREFIX, VISION_PREFIX
from ..loop import averaged_weights
from .assign import block_name
from .stages import REFINE, trained_main, trained_vision


def subject_state(runs: Path) -> dict[str, torch.Tensor]:
    """The tensors of the demo model's subject file, from the first two stages in `runs`.

    Raises FileNotFoundError where one of them is missing.
    """
    main = trained_main(runs)
    found = _below(UNET_PREFIX, main.unet.state_dict())
    for name, weight in main.projections.state_dict().items():
        place, kind, rest = name.split(".")
        found[f"{UNET_PREFIX}{block_name(place)}.to_{kind}_ip.{rest}"] = weight
    found |= _below(RESAMPLER_PREFIX, main.resampler.state_dict())
    found |= _below(VISION_PREFIX, trained_vision(runs).model.state_dict())
    return found


def reference_state(runs: Path) -> dict[str, torch.Tensor]:
    """The tensors of its reference file, from the third stage. Raises FileNotFoundError where that is missing."""
    found = _below(DETAIL_PREFIX, averaged_weights(runs / REFINE, "detail"))
    for name, tensor in averaged_weights(runs / REFINE, "cross").items():
        place, _, rest = name.partition(".")
        found[f"{BRANCH_PREFIX}{block_name(place)}.{rest}"] = tensor
    return found


def _below(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}
