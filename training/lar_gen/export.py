"""What was trained of LAR-Gen, by the names of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...weights.demo_model import UNET_PREFIX
from ...weights.demo_subject import BRANCH_PREFIX, DETAIL_PREFIX, RESAMPLER_PREFIX, VISION_PREFIX
from ..loop import averaged_weights
from .stages import REFINE, trained_main, trained_vision

_BLOCKS = {"input": "input_blocks.{}", "middle": "middle_block", "output": "output_blocks.{}"}


def block_name(name: str) -> str:
    """What the host's UNet calls the cross-attention of a place, as `place_name` has it."""
    kind, index, depth = name.split("_")
    return f"{_BLOCKS[kind].format(index)}.1.transformer_blocks.{depth}.attn2"


def subject_state(runs: Path) -> dict[str, torch.Tensor]:
    """The tensors of the demo model's subject file, from the stages in `runs`; without the third of them, no reference network.

    Raises FileNotFoundError where one of the first two is missing.
    """
    main = trained_main(runs)
    found = _below(UNET_PREFIX, main.unet.state_dict())
    for name, weight in main.projections.state_dict().items():
        place, kind, rest = name.split(".")
        found[f"{UNET_PREFIX}{block_name(place)}.to_{kind}_ip.{rest}"] = weight
    found |= _below(RESAMPLER_PREFIX, main.resampler.state_dict())
    found |= _below(VISION_PREFIX, trained_vision(runs).model.state_dict())
    if (runs / REFINE / "checkpoint.pt").is_file():
        found |= _below(DETAIL_PREFIX, averaged_weights(runs / REFINE, "detail"))
        for name, tensor in averaged_weights(runs / REFINE, "cross").items():
            place, _, rest = name.partition(".")
            found[f"{BRANCH_PREFIX}{block_name(place)}.{rest}"] = tensor
    return found


def _below(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}
