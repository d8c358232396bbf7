"""Segment Anything files as transformers' SamModel, whatever their size: everything is read off keys and shapes.

The published files (`sam_vit_b_01ec64.pth` and its kin, `.pth` or safetensors) have the keys of the segment-anything package, the
hub's those of transformers. Both networks compute the same; only the names differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.utils
import torch

SUFFIXES = (".pth", ".pt", ".safetensors")
WHERE_TO_GET = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"

_PREFIXES = (
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    ("image_encoder.", "vision_encoder."),
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
)
_NORM = re.compile(r"((?:vision_encoder|mask_decoder\.transformer)\.layers\.\d+\.)norm(\d)\.")
_HEAD = re.compile(r"(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+)\.)layers\.(\d+)\.")
# What a file of another family holds, and what to say of it.
_OTHERS = (
    ("sam_mask_decoder.", "a SAM 2 file"),
    ("image_encoder.trunk.", "a SAM 2 file"),
    ("mask_decoder.hf_token.weight", "a SAM-HQ file"),
    ("model.diffusion_model.", "a diffusion checkpoint"),
)


def read_sam(path: str | Path) -> Any:
    """transformers' SamModel of a Segment Anything file, in float32 on the CPU.

    Raises ValueError, one sentence, for a file that can't be read, one of another model, and one that is incomplete. Nothing in a
    file is executed.
    """
    path = Path(path)
    try:
        state: Any = comfy.utils.load_torch_file(str(path), safe_load=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path.name} can't be read as weights ({type(error).__name__}): it is damaged, incomplete, or holds something else. "
            f"Download it again, or take {WHERE_TO_GET}."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(_not_sam(path.name, "no weights"))
    return sam_from_state(state, path.name)


def sam_from_state(state: Mapping[str, torch.Tensor], name: str) -> Any:
    """transformers' SamModel of a file's tensors. Raises ValueError that begins with the file's `name`."""
    from transformers import SamModel

    for key, what in _OTHERS:
        if any(found.startswith(key) for found in state):
            raise ValueError(_not_sam(name, what))
    state = renamed(state)
    try:
        config = sam_config(state)
    except KeyError:
        raise ValueError(_not_sam(name, "something else")) from None
    with torch.device("meta"):
        model = SamModel(config)
    missing, unexpected = model.load_state_dict(dict(state), strict=False, assign=True)
    if missing or unexpected:
        wrong = ", ".join([*missing, *unexpected][:3])
        raise ValueError(f"{name} is an incomplete or changed Segment Anything file: {wrong}. Take {WHERE_TO_GET}.")
    return model.eval().requires_grad_(False)


def renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors by transformers' names."""
    result = dict(state)
    if any(key.startswith("image_encoder.") for key in state):
        result = {_new_name(key, state): tensor for key, tensor in state.items()}
    # One matrix under two names, of which the hub's files keep one.
    names = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
    for name, other in (names, names[::-1]):
        if name in result:
            result.setdefault(other, result[name])
    return result


def _new_name(key: str, state: Mapping[str, torch.Tensor]) -> str:
    for old, new in _PREFIXES:
        if key.startswith(old):
            key = new + key.removeprefix(old)
            break
    if found := _HEAD.match(key):
        index, last = int(found[2]), _count(state, f"{found[1]}layers.") - 1
        layer = "proj_in" if index == 0 else "proj_out" if index == last else f"layers.{index - 1}"
        return f"{found[1]}{layer}.{key[found.end() :]}"
    return _NORM.sub(r"\1layer_norm\2.", key)


def sam_config(state: Mapping[str, torch.Tensor]) -> Any:
    """transformers' SamConfig of tensors by its names. Raises KeyError where one that tells a size is missing."""
    from transformers import SamConfig

    projection, positions = state["vision_encoder.patch_embed.projection.weight"], state["vision_encoder.pos_embed"]
    width, patch, grid = projection.shape[0], projection.shape[-1], positions.shape[1]
    blocks = _count(state, "vision_encoder.layers.")
    rows = [state[f"vision_encoder.layers.{block}.attn.rel_pos_h"].shape[0] for block in range(blocks)]
    head = state["vision_encoder.layers.0.attn.rel_pos_h"].shape[1]
    everywhere = [block for block in range(blocks) if rows[block] == 2 * grid - 1]
    windows = [(count + 1) // 2 for count in rows if count != 2 * grid - 1]
    channels = state["vision_encoder.neck.conv1.weight"].shape[0]
    decoder = "mask_decoder.transformer.layers.0."
    return SamConfig(
        vision_config={
            "hidden_size": width,
            "output_channels": channels,
            "num_hidden_layers": blocks,
            "num_attention_heads": width // head,
            "image_size": grid * patch,
            "patch_size": patch,
            "window_size": windows[0] if windows else 0,
            "global_attn_indexes": everywhere,
            "mlp_dim": state["vision_encoder.layers.0.mlp.lin1.weight"].shape[0],
            "num_pos_feats": state["prompt_encoder.shared_embedding.positional_embedding"].shape[1],
            # transformers' own 1e-10 makes denormal numbers where a model is built before its weights are there.
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": channels,
            "image_size": grid * patch,
            "patch_size": patch,
            "mask_input_channels": state["prompt_encoder.mask_embed.conv2.weight"].shape[0],
        },
        mask_decoder_config={
            "hidden_size": channels,
            "mlp_dim": state[f"{decoder}mlp.lin1.weight"].shape[0],
            "num_hidden_layers": _count(state, "mask_decoder.transformer.layers."),
            "attention_downsample_rate": channels
            // state[f"{decoder}cross_attn_token_to_image.q_proj.weight"].shape[0],
            "num_multimask_outputs": state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
            "iou_head_depth": _count(state, "mask_decoder.iou_prediction_head.layers.") + 2,
            "iou_head_hidden_dim": state["mask_decoder.iou_prediction_head.proj_in.weight"].shape[0],
        },
    )


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def _not_sam(name: str, what: str) -> str:
    return (
        f"{name} is {what}, but a Segment Anything file (ViT-B, L or H) is needed, such as sam_vit_b_01ec64.pth in models/sams: "
        f"{WHERE_TO_GET}."
    )
