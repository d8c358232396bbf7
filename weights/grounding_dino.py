"""Grounding DINO files as transformers' network, and its tokenizer: everything about a file is read off keys and shapes.

The published files (`groundingdino_swint_ogc.pth`, `groundingdino_swinb_cogcoor.pth`) have the keys of the groundingdino package,
the hub's those that transformers saves. Both networks compute the same; only the names differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

VOCABULARY = Path(__file__).parent / "bert"
"""A folder with the vocabulary of BERT base, uncased."""

_SWIN = "model.backbone.conv_encoder.model."
# In this order; each rule is applied to a whole key.
_NEW_NAMES = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"^backbone\.0\.patch_embed\.proj\.", f"{_SWIN}embeddings.patch_embeddings.projection."),
        (r"^backbone\.0\.patch_embed\.norm\.", f"{_SWIN}embeddings.norm."),
        (r"^backbone\.0\.norm1\.", f"{_SWIN}hidden_states_norms.stage2."),
        (r"^backbone\.0\.norm2\.", f"{_SWIN}hidden_states_norms.stage3."),
        (r"^backbone\.0\.norm3\.", f"{_SWIN}hidden_states_norms.stage4."),
        (
            r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.norm1\.",
            _SWIN + r"encoder.layers.\1.blocks.\2.layernorm_before.",
        ),
        (
            r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.norm2\.",
            _SWIN + r"encoder.layers.\1.blocks.\2.layernorm_after.",
        ),
        (
            r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.",
            _SWIN + r"encoder.layers.\1.blocks.\2.intermediate.dense.",
        ),
        (
            r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.",
            _SWIN + r"encoder.layers.\1.blocks.\2.output.dense.",
        ),
        (
            r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.attn\.proj\.",
            _SWIN + r"encoder.layers.\1.blocks.\2.attention.output.dense.",
        ),
        (r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.attn\.", _SWIN + r"encoder.layers.\1.blocks.\2.attention.self."),
        (r"^backbone\.0\.", f"{_SWIN}encoder."),
        (r"^bert\.", "model.text_backbone."),
        (r"^feat_map\.", "model.text_projection."),
        (r"^input_proj\.", "model.input_proj_vision."),
        (r"^transformer\.level_embed$", "model.level_embed"),
        (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
        (r"^transformer\.enc_output", "model.enc_output"),
        (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
        (r"^transformer\.encoder\.fusion_layers\.(\d+)\.", r"model.encoder.layers.\1.fusion_layer."),
        (
            r"^transformer\.encoder\.text_layers\.(\d+)\.norm1\.",
            r"model.encoder.layers.\1.text_enhancer_layer.layer_norm_before.",
        ),
        (
            r"^transformer\.encoder\.text_layers\.(\d+)\.norm2\.",
            r"model.encoder.layers.\1.text_enhancer_layer.layer_norm_after.",
        ),
        (r"^transformer\.encoder\.text_layers\.(\d+)\.", r"model.encoder.layers.\1.text_enhancer_layer."),
        (
            r"^transformer\.encoder\.layers\.(\d+)\.norm1\.",
            r"model.encoder.layers.\1.deformable_layer.self_attn_layer_norm.",
        ),
        (
            r"^transformer\.encoder\.layers\.(\d+)\.norm2\.",
            r"model.encoder.layers.\1.deformable_layer.final_layer_norm.",
        ),
        (r"^transformer\.encoder\.layers\.(\d+)\.", r"model.encoder.layers.\1.deformable_layer."),
        (r"^transformer\.decoder\.norm\.", "model.decoder.layer_norm."),
        (r"^transformer\.decoder\.ref_point_head\.", "model.decoder.reference_points_head."),
        (r"^transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"model.decoder.layers.\1.encoder_attn."),
        (r"^transformer\.decoder\.layers\.(\d+)\.norm1\.", r"model.decoder.layers.\1.encoder_attn_layer_norm."),
        (r"^transformer\.decoder\.layers\.(\d+)\.ca_text\.", r"model.decoder.layers.\1.encoder_attn_text."),
        (
            r"^transformer\.decoder\.layers\.(\d+)\.catext_norm\.",
            r"model.decoder.layers.\1.encoder_attn_text_layer_norm.",
        ),
        (r"^transformer\.decoder\.layers\.(\d+)\.norm2\.", r"model.decoder.layers.\1.self_attn_layer_norm."),
        (r"^transformer\.decoder\.layers\.(\d+)\.norm3\.", r"model.decoder.layers.\1.final_layer_norm."),
        (r"^transformer\.decoder\.", "model.decoder."),
        (r"(?<=_layer\.)linear(\d)\.", r"fc\1."),
        (r"^(model\.decoder\.layers\.\d+\.)linear(\d)\.", r"\1fc\2."),
        (r"(?<=fusion_layer\.)gamma_v$", "vision_param"),
        (r"(?<=fusion_layer\.)gamma_l$", "text_param"),
        (r"(?<=fusion_layer\.)layer_norm_v\.", "layer_norm_vision."),
        (r"(?<=fusion_layer\.)layer_norm_l\.", "layer_norm_text."),
        (r"(?<=fusion_layer\.attn\.)(|values_|out_)v_proj\.", r"\1vision_proj."),
        (r"(?<=fusion_layer\.attn\.)(|values_|out_)l_proj\.", r"\1text_proj."),
    )
)
# Queries, keys and values in one tensor.
_JOINED = re.compile(r"^(.*\.)(?:qkv\.|in_proj_)(weight|bias)$")
# In the published files, and of no use to the network or made anew by it.
UNUSED = re.compile(r"^(label_enc\.|bert\.embeddings\.position_ids$|bert\.pooler\.|.*\.relative_position_index$)")
# Made anew by transformers, of which some versions keep them in files; or of no use.
_COMPUTED = re.compile(
    r"(relative_position_index|position_ids|\.swin\.layernorm\.\w+|\.text_backbone\.pooler\.dense\.\w+)$"
)


def network(state: Mapping[str, torch.Tensor]) -> tuple[Any, list[str]]:
    """transformers' GroundingDinoForObjectDetection of a file's tensors, and the names of those that are missing, too many or of
    other sizes.

    Raises KeyError where a tensor that tells a size is missing.
    """
    from transformers import GroundingDinoForObjectDetection

    library: Any = GroundingDinoForObjectDetection
    state = hub_names(state)
    # The one way that renames for every version of transformers.
    model, info = library.from_pretrained(
        None, config=_config(state), state_dict=dict(state), output_loading_info=True, ignore_mismatched_sizes=True
    )
    # Their names alone in transformers 4, with both sizes in 5.
    resized = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *resized})
    return model, [key for key in wrong if not _COMPUTED.search(key)]


def tokenizer() -> Any:
    """The tokenizer of Grounding DINO's text."""
    import transformers

    library: Any = transformers
    # Its slow sibling makes [UNK] of every word in transformers 5.
    return library.BertTokenizerFast.from_pretrained(VOCABULARY)


def hub_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors by the names of the hub's files."""
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if "transformer.level_embed" not in state:
        return state
    return {
        _new_name(part): tensor
        for key, whole in state.items()
        if not UNUSED.match(key)
        for part, tensor in _parts(key, whole)
    }


def _parts(key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a file keeps as one, and their keys."""
    if not (found := _JOINED.match(key)):
        yield key, tensor
        return
    for part, values in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
        yield f"{found[1]}{part}.{found[2]}", values


def _new_name(key: str) -> str:
    for pattern, replacement in _NEW_NAMES:
        key = pattern.sub(replacement, key)
    return key


def _config(state: Mapping[str, torch.Tensor]) -> Any:
    """transformers' GroundingDinoConfig; raises KeyError where a tensor that tells a size is missing."""
    from transformers import BertConfig, GroundingDinoConfig, SwinConfig

    swin: Any = SwinConfig
    bert: Any = BertConfig
    width = state[f"{_SWIN}embeddings.patch_embeddings.projection.weight"].shape[0]
    blocks = re.compile(re.escape(f"{_SWIN}encoder.layers.") + r"(\d+)\.blocks\.(\d+)\.")
    found = {(int(match[1]), int(match[2])) for key in state if (match := blocks.match(key))}
    stages = range(1 + max(stage for stage, _ in found)) if found else range(0)
    tables = [state[f"{_SWIN}encoder.layers.{n}.blocks.0.attention.self.relative_position_bias_table"] for n in stages]
    # A window of w pixels has (2 w - 1)^2 distances between two of them.
    window = (round(tables[0].shape[0] ** 0.5) + 1) // 2
    return GroundingDinoConfig(
        backbone_config=swin(
            window_size=window,
            image_size=384 if window == 12 else 224,
            embed_dim=width,
            depths=[sum(stage == n for stage, _ in found) for n in stages],
            num_heads=[table.shape[1] for table in tables],
            out_indices=[2, 3, 4],
        ),
        text_config=bert(num_hidden_layers=_layers(state, "model.text_backbone.encoder.layer.")),
        encoder_layers=_layers(state, "model.encoder.layers."),
        decoder_layers=_layers(state, "model.decoder.layers."),
        num_queries=state["model.query_position_embeddings.weight"].shape[0],
        d_model=state["model.text_projection.weight"].shape[0],
    )


def _layers(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many layers have keys with such a start; raises KeyError for none."""
    found = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    if not found:
        raise KeyError(prefix)
    return len(found)
