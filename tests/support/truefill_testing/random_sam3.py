"""SAM 3.1 with one layer where the host has several, as a checkpoint with random weights."""

from __future__ import annotations

import re

import torch

from devtools.pack import ensure_host
from truefill_testing.random_tensors import random_tensors

ensure_host()

import comfy.ldm.sam3.detector  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.text_encoders.sam3_clip  # noqa: E402

_TEXT = "detector.backbone.language_backbone."
# Layers that the pack `small_sam3` leaves out.
_LEFT_OUT = re.compile(
    r"detector\.(backbone\.vision_backbone\.trunk\.blocks|transformer\.(en|de)coder\.layers)\.[1-9]"
    r"|.*text_model\.encoder\.layers\.[1-9]"
)
# With these a mask would be a grid of dots.
_FINE = re.compile(r"detector\.backbone\.vision_backbone\.convs\.[01]\.")
_HEAD = "detector.segmentation_head."
# Of the head's last normalisation.
_GROUP = 32


def random_sam3() -> dict[str, torch.Tensor]:
    """The tensors of a file, in half precision."""
    network = comfy.ldm.sam3.detector.SAM3Model(
        device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init, image_model="SAM31"
    )
    with torch.device("meta"):
        text = comfy.text_encoders.sam3_clip.SAM3ClipModelWrapper(device="meta", dtype=torch.float32)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes |= {f"{_TEXT}{name}": tuple(tensor.shape) for name, tensor in text.state_dict().items()}
    kept = {name: shape for name, shape in shapes.items() if not _LEFT_OUT.match(name)}
    state = random_tensors(kept, ("embed", "gaussian"))
    state |= {name: torch.zeros_like(tensor) for name, tensor in state.items() if _FINE.match(name)}
    _outline(state)
    return {name: tensor.half() for name, tensor in state.items()}


def _outline(state: dict[str, torch.Tensor]) -> None:
    """Every query's mask is where one feature is well above its mean over the picture: neither nothing nor everything."""
    for part in ("weight", "bias"):
        convolution = state[f"{_HEAD}pixel_decoder.conv_layers.1.{part}"]
        # A group of the same feature is normalised over the picture alone.
        convolution[:_GROUP] = convolution[:1].clone()
    state[f"{_HEAD}pixel_decoder.norms.1.weight"][:_GROUP] = 1.0
    state[f"{_HEAD}pixel_decoder.norms.1.bias"][:_GROUP] = 0.0
    for layer, bias in (("mask_predictor.mask_embed.layers.2", 1.0), ("instance_seg_head", -2.0)):
        state[f"{_HEAD}{layer}.weight"].zero_()
        state[f"{_HEAD}{layer}.bias"].zero_()[0] = bias
    state[f"{_HEAD}instance_seg_head.weight"][0, 0] = 1.0
