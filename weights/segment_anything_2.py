"""SAM 2 files as transformers' Sam2Model, the network for pictures: what remembers the frames of a video is left out.

The published files (`sam2.1_hiera_large.pt`, the safetensors made of them) have the keys of the sam2 package, the hub's those of
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from .segment_anything import count, replaced, with_both_positions, with_new_parts

SIDE = 1024
"""Of the square that every picture is stretched to."""

_KEPT = ("vision_encoder.", "prompt_encoder.", "mask_decoder.", "shared_image_embedding.", "no_memory_embedding")
_NEW_NAMES = (
    ("image_encoder.trunk.patch_embed.proj.", "vision_encoder.backbone.patch_embed.projection."),
    ("image_encoder.trunk.", "vision_encoder.backbone."),
    ("image_encoder.neck.", "vision_encoder.neck."),
    ("sam_prompt_encoder.", "prompt_encoder."),
    ("sam_mask_decoder.", "mask_decoder."),
    ("no_mem_embed", "no_memory_embedding"),
)
_IN_NAMES = (
    (re.compile(r"^(vision_encoder\.neck\.convs\.\d+\.)conv\."), r"\1"),
    (re.compile(r"^(vision_encoder\.backbone\.blocks\.\d+\.)norm(\d)\."), r"\1layer_norm\2."),
    (re.compile(r"\.mlp\.layers\.0\."), ".mlp.proj_in."),
    (re.compile(r"\.mlp\.layers\.1\."), ".mlp.proj_out."),
    (re.compile(r"\.out_proj\."), ".o_proj."),
)
_POINTS = "prompt_encoder.point_embed."


class UnknownSize(ValueError):
    """A network of SAM 2's kind in a size that was not published; the message says what it is."""


@dataclass(frozen=True)
class _Size:
    """What the tensors' shapes do not tell of a published size."""

    heads: int
    windows: tuple[int, int, int, int]
    everywhere: tuple[int, ...]


# By the width of the first stage and the number of blocks: tiny, small, base plus, large.
_SIZES = {
    (96, 12): _Size(1, (8, 4, 14, 7), (5, 7, 9)),
    (96, 16): _Size(1, (8, 4, 14, 7), (7, 10, 13)),
    (112, 24): _Size(2, (8, 4, 14, 7), (12, 16, 20)),
    (144, 48): _Size(2, (8, 4, 16, 8), (23, 33, 43)),
}


def recognised(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file's tensors are a SAM 2 network, by either names."""
    return any(f"{prefix}pos_embed_window" in state for prefix in ("image_encoder.trunk.", "vision_encoder.backbone."))


def network(state: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """An empty Sam2Model (on the meta device) for a file's tensors, and the tensors by its names.

    Raises KeyError where a tensor that tells a size is missing, UnknownSize where no published size has them, ImportError where
    transformers is too old.
    """
    if tuple(int(part) for part in version("transformers").split(".")[:2]) < (4, 57):
        # 4.56.0 has the network, but its logits are off by up to a sixth of the largest from those of the sam2 package.
        raise ImportError("Sam2Model of transformers 4.57 or later is needed")
    from transformers import Sam2Config, Sam2Model

    state = _renamed(state)
    channels = state["vision_encoder.neck.convs.0.weight"].shape[0]
    first = "mask_decoder.transformer.layers.0."
    with torch.device("meta"):
        model = Sam2Model(
            Sam2Config(
                vision_config=_vision_config(state),
                prompt_encoder_config={
                    "hidden_size": channels,
                    "image_size": SIDE,
                    "mask_input_channels": state["prompt_encoder.mask_embed.conv2.weight"].shape[0],
                },
                mask_decoder_config={
                    "hidden_size": channels,
                    "mlp_dim": state[f"{first}mlp.proj_in.weight"].shape[0],
                    "num_hidden_layers": count(state, "mask_decoder.transformer.layers."),
                    "num_multimask_outputs": state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
                    "iou_head_depth": count(state, "mask_decoder.iou_prediction_head.layers.") + 2,
                    "iou_head_hidden_dim": state["mask_decoder.iou_prediction_head.proj_in.weight"].shape[0],
                },
            )
        )
    return model, state


def _vision_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    trunk = "vision_encoder.backbone."
    blocks = count(state, f"{trunk}blocks.")
    widths = [state[f"{trunk}blocks.{block}.layer_norm2.weight"].shape[0] for block in range(blocks)]
    stages = list(dict.fromkeys(widths))
    size = _SIZES.get((widths[0], blocks))
    if size is None:
        raise UnknownSize(f"a SAM 2 network of an unknown size ({blocks} blocks, {widths[0]} wide)")
    return {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": widths[0],
            "num_attention_heads": size.heads,
            "window_positional_embedding_background_size": list(state[f"{trunk}pos_embed"].shape[-2:]),
            "blocks_per_stage": [widths.count(width) for width in stages],
            "embed_dim_per_stage": stages,
            "num_attention_heads_per_stage": [size.heads * width // widths[0] for width in stages],
            "window_size_per_stage": list(size.windows),
            "global_attention_blocks": list(size.everywhere),
        },
        "backbone_channel_list": stages[::-1],
        "fpn_hidden_size": state["vision_encoder.neck.convs.0.weight"].shape[0],
    }


def _renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    published = any(key.startswith("image_encoder.") for key in state)
    if published:
        state = with_new_parts({replaced(key, _NEW_NAMES): tensor for key, tensor in state.items()})
    result = {key: tensor for key, tensor in state.items() if key.startswith(_KEPT)}
    if published:
        result = {_in_block(key): tensor for key, tensor in result.items()}
        parts = [f"{_POINTS}{part}.weight" for part in range(count(result, _POINTS))]
        result[f"{_POINTS}weight"] = torch.cat([result.pop(part) for part in parts])
    return with_both_positions(result)


def _in_block(key: str) -> str:
    for pattern, replacement in _IN_NAMES:
        key = pattern.sub(replacement, key)
    return key
