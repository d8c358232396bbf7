"""A trained reference network for Refine: a UNet of its own, which reads CLIP's states of the subject in the place of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.sd
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True, eq=False, kw_only=True)
class Branch:
    """Settings.

    model: a MODEL whose UNet has 4 input channels; its output layers are never run.
    weight, bias: [text width, CLIP's width] and [text width], which make the branch's text of CLIP's last states ("patch
        projector").
    pooled: [1, P], SDXL's pooled text of the empty prompt, which the branch is told of instead of the prompt's; None where the
        family has none.
    """

    model: ModelPatcher
    weight: torch.Tensor
    bias: torch.Tensor
    pooled: torch.Tensor | None = None


def branch_from_tensors(
    tensors: Mapping[str, torch.Tensor],
    detail: Mapping[str, torch.Tensor],
    pooled: torch.Tensor | None,
    name: str,
) -> Branch:
    """The branch of a file's tensors, by the names of the host's UNet, and of its detail projection, "weight" and "bias".

    Raises ValueError, in one sentence that begins with the file's `name`.
    """
    if not {"weight", "bias"} <= detail.keys():
        raise ValueError(
            f"{name} has a reference network without a detail projection (patch_projector): it is incomplete or changed; "
            "download it again."
        )
    model = comfy.sd.load_diffusion_model_state_dict({**_output_layers(tensors), **tensors})
    unet = None if model is None else model.model.diffusion_model
    if model is None or not isinstance(unet, UNetModel) or unet.in_channels != 4:
        raise ValueError(
            f"{name} has a reference network that is no UNet of SD1.5, SD2 or SDXL with 4 input channels: it is incomplete or "
            "changed; download it again."
        )
    return Branch(model=model, weight=detail["weight"], bias=detail["bias"], pooled=pooled)


def _output_layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layers that a reference network does not have, and the host misses: zeros, which are never read."""
    first = tensors.get("input_blocks.0.0.weight")
    if first is None:
        return {}
    channels = first.shape[0]
    shapes = {
        "out.0.weight": (channels,),
        "out.0.bias": (channels,),
        "out.2.weight": (4, channels, 3, 3),
        "out.2.bias": (4,),
    }
    return {name: first.new_zeros(shape) for name, shape in shapes.items()}
