"""What was trained of PainterNet, as its file has it."""

from __future__ import annotations

from pathlib import Path

import comfy.ops
import torch

from ...model_patches.painternet.network import BranchNetwork, weights_of
from ...weights.painternet import branch_state, in_eight_bits
from ..loop import averaged_weights
from .branch import KINDS, demo_plan


def trained_branch(stage: Path) -> BranchNetwork:
    """A stage's branch with its averaged weights. Raises FileNotFoundError where it has no checkpoint."""
    points = KINDS[stage.name].attention_points
    network = BranchNetwork(demo_plan(), points, comfy.ops.disable_weight_init, dtype=torch.float32)
    network.load_state_dict(averaged_weights(stage, "branch"))
    return network


def branch_tensors(stage: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of the demo branch's file, and how wide its heads are."""
    plan = demo_plan()
    assert plan.head_channels is not None
    return in_eight_bits(branch_state(weights_of(trained_branch(stage), plan, stage.name))), plan.head_channels
