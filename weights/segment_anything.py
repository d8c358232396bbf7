"""Segment Anything files (and SAM-HQ's) as transformers' networks, whatever their size: everything is read off keys and shapes.

The published files (`sam_vit_b_01ec64.pth`, `sam_hq_vit_b.pth` and their kin) have the keys of the segment-anything package, the
hub's those of transformers. Both networks compute the same; only the names differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_VISION = (
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    ("image_encoder.", "vision_encoder."),
)
_PROMPT_AND_DECODER = (
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.shared_embedding.positional_embedding",
    ),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    ("mask_decoder.transformer.norm_final_attn.", "mask_decoder.transformer.layer_norm_final_attn."),
    ("mask_decoder.hf_token.", "mask_decoder.hq_token."),
    ("mask_decoder.hf_mlp.", "mask_decoder.hq_mask_mlp."),
    ("mask_decoder.compress_vit_feat.0.", "mask_decoder.compress_vit_conv1."),
    ("mask_decoder.compress_vit_feat.1.", "mask_decoder.compress_vit_norm."),
    ("mask_decoder.compress_vit_feat.3.", "mask_decoder.compress_vit_conv2."),
    ("mask_decoder.embedding_encoder.0.", "mask_decoder.encoder_conv1."),
    ("mask_decoder.embedding_encoder.1.", "mask_decoder.encoder_norm."),
    ("mask_decoder.embedding_encoder.3.", "mask_decoder.encoder_conv2."),
    ("mask_decoder.embedding_maskfeature.0.", "mask_decoder.mask_conv1."),
    ("mask_decoder.embedding_maskfeature.1.", "mask_decoder.mask_norm."),
    ("mask_decoder.embedding_maskfeature.3.", "mask_decoder.mask_conv2."),
)
_NORM = re.compile(r"((?:vision_encoder|mask_decoder\.transformer)\.layers\.\d+\.)norm(\d)\.")
_HEAD = re.compile(
    r"(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+|hq_mask_mlp|pred_obj_score_head)\.)layers\.(\d+)\."
)


def recognised(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file's tensors are a Segment Anything or SAM-HQ network with a ViT, by either names."""
    return any(key in state for key in ("image_encoder.pos_embed", "vision_encoder.pos_embed"))


def network(state: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """An empty SamModel or SamHQModel (on the meta device) for a file's tensors, and the tensors by its names.

    Raises KeyError where a tensor that tells a size is missing.
    """
    from transformers import SamConfig, SamModel

    state, configs = configurations(state)
    with torch.device("meta"):
        if "mask_decoder.hq_token.weight" not in state:
            return SamModel(SamConfig(**configs)), state
        # Younger than the oldest transformers that ComfyUI takes.
        from transformers import SamHQConfig, SamHQModel

        configs["mask_decoder_config"]["vit_dim"] = state["mask_decoder.compress_vit_conv1.weight"].shape[0]
        model = SamHQModel(SamHQConfig(**configs))
    _read_after_attention(model.mask_decoder)
    return model, state


def configurations(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A file's tensors by transformers' names, and a SamConfig's parts; raises KeyError as `network` does."""
    state = _renamed(state)
    return state, {
        "vision_config": _vision_config(state),
        "prompt_encoder_config": _prompt_config(state),
        "mask_decoder_config": _decoder_config(state),
    }


def _read_after_attention(decoder: Any) -> None:
    """Lets a SamHQMaskDecoder draw its masks from what its transformer made of the picture, as SAM-HQ does.

    transformers (5.23) draws them from what went into the transformer, and turns that around its diagonal.
    """
    made: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, arguments: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        made[:] = [output[1]]

    def give(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        # [B, prompts, h * w, C]
        return (made.pop().transpose(2, 3).reshape(arguments[0].shape),)

    decoder.transformer.register_forward_hook(keep)
    decoder.upscale_conv1.register_forward_pre_hook(give)


def with_both_positions(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds the name that is missing of the one matrix that transformers' networks have under two names."""
    names = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
    for name, other in (names, names[::-1]):
        if name in state:
            state.setdefault(other, state[name])
    return state


def count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many parts have names that begin so: the length of a list of layers."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def replaced(key: str, table: Sequence[tuple[str, str]]) -> str:
    """A key with its beginning replaced by the first rule of a table that fits."""
    for old, new in table:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def with_new_parts(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompt encoder, mask decoder and layer norms by transformers' names, from the packages'."""
    moved = {replaced(key, _PROMPT_AND_DECODER): tensor for key, tensor in state.items()}
    return {_in_layers(key, moved): tensor for key, tensor in moved.items()}


def _in_layers(key: str, state: Mapping[str, torch.Tensor]) -> str:
    if found := _HEAD.match(key):
        index, last = int(found[2]), count(state, f"{found[1]}layers.") - 1
        layer = "proj_in" if index == 0 else "proj_out" if index == last else f"layers.{index - 1}"
        return f"{found[1]}{layer}.{key[found.end() :]}"
    return _NORM.sub(r"\1layer_norm\2.", key)


def _renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = dict(state)
    if any(key.startswith("image_encoder.") for key in state):
        result = with_new_parts({replaced(key, _VISION): tensor for key, tensor in state.items()})
    return with_both_positions(result)


def _side_and_patch(state: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    patch = state["vision_encoder.patch_embed.projection.weight"].shape[-1]
    return state["vision_encoder.pos_embed"].shape[1] * patch, patch


def _vision_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    side, patch = _side_and_patch(state)
    width, grid = state["vision_encoder.patch_embed.projection.weight"].shape[0], side // patch
    blocks = count(state, "vision_encoder.layers.")
    rows = [state[f"vision_encoder.layers.{block}.attn.rel_pos_h"].shape[0] for block in range(blocks)]
    head = state["vision_encoder.layers.0.attn.rel_pos_h"].shape[1]
    windows = [(row + 1) // 2 for row in rows if row != 2 * grid - 1]
    return {
        "hidden_size": width,
        "output_channels": state["vision_encoder.neck.conv1.weight"].shape[0],
        "num_hidden_layers": blocks,
        "num_attention_heads": width // head,
        "image_size": side,
        "patch_size": patch,
        "window_size": windows[0] if windows else 0,
        "global_attn_indexes": [block for block in range(blocks) if rows[block] == 2 * grid - 1],
        "mlp_dim": state["vision_encoder.layers.0.mlp.lin1.weight"].shape[0],
        "num_pos_feats": state["prompt_encoder.shared_embedding.positional_embedding"].shape[1],
        # transformers' own 1e-10 makes denormal numbers where a model is built before its weights are there.
        "initializer_range": 0.02,
    }


def _prompt_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    side, patch = _side_and_patch(state)
    return {
        "hidden_size": state["vision_encoder.neck.conv1.weight"].shape[0],
        "image_size": side,
        "patch_size": patch,
        "mask_input_channels": state["prompt_encoder.mask_embed.conv2.weight"].shape[0],
    }


def _decoder_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    channels = state["vision_encoder.neck.conv1.weight"].shape[0]
    first = "mask_decoder.transformer.layers.0."
    return {
        "hidden_size": channels,
        "mlp_dim": state[f"{first}mlp.lin1.weight"].shape[0],
        "num_hidden_layers": count(state, "mask_decoder.transformer.layers."),
        "attention_downsample_rate": channels // state[f"{first}cross_attn_token_to_image.q_proj.weight"].shape[0],
        "num_multimask_outputs": state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        "iou_head_depth": count(state, "mask_decoder.iou_prediction_head.layers.") + 2,
        "iou_head_hidden_dim": state["mask_decoder.iou_prediction_head.proj_in.weight"].shape[0],
        # The segment-anything package's; transformers' own is 1e-6.
        "layer_norm_eps": 1e-5,
    }
