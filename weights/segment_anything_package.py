"""Segment Anything files as the segment-anything package's network, with the interface of transformers' SamModel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from .segment_anything import configurations


class PackageSam(torch.nn.Module):
    """The package's three parts; `config` is a SamConfig. In single precision alone: the package mixes it with half."""

    def __init__(self, config: Any) -> None:
        from segment_anything import modeling

        super().__init__()
        self.config = config
        vision, prompt, decoder = config.vision_config, config.prompt_encoder_config, config.mask_decoder_config
        grid = vision.image_size // vision.patch_size
        self.image_encoder = modeling.ImageEncoderViT(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.mlp_dim / vision.hidden_size,
            out_chans=vision.output_channels,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),  # type: ignore[reportArgumentType]
            use_rel_pos=True,
            window_size=vision.window_size,
            global_attn_indexes=tuple(vision.global_attn_indexes),
        )
        self.prompt_encoder = modeling.PromptEncoder(
            embed_dim=prompt.hidden_size,
            image_embedding_size=(grid, grid),
            input_image_size=(vision.image_size, vision.image_size),
            mask_in_chans=prompt.mask_input_channels,
        )
        self.mask_decoder = modeling.MaskDecoder(
            transformer_dim=decoder.hidden_size,
            transformer=modeling.TwoWayTransformer(
                depth=decoder.num_hidden_layers,
                embedding_dim=decoder.hidden_size,
                mlp_dim=decoder.mlp_dim,
                num_heads=decoder.num_attention_heads,
            ),
            num_multimask_outputs=decoder.num_multimask_outputs,
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.mask_decoder.mask_tokens.weight.dtype

    def get_image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        """The embedding [1, C, side / 16, side / 16] of normalised pixels [1, 3, side, side]."""
        return self.image_encoder(pixels)

    def forward(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor | None,
        input_labels: torch.Tensor | None,
        input_boxes: torch.Tensor | None,
        input_masks: torch.Tensor | None,
        multimask_output: bool,
    ) -> SimpleNamespace:
        """The answers for one thing: `pred_masks` [1, 1, answers, h, w] (logits), `iou_scores` [1, 1, answers]."""
        points = None if input_points is None or input_labels is None else (input_points[0], input_labels[0])
        box = None if input_boxes is None else input_boxes[0]
        sparse, dense = self.prompt_encoder(points=points, boxes=box, masks=input_masks)
        logits, scores = self.mask_decoder(
            image_embeddings=image_embeddings,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )
        return SimpleNamespace(pred_masks=logits[None], iou_scores=scores[None])


def network(state: Mapping[str, torch.Tensor]) -> tuple[PackageSam, Mapping[str, torch.Tensor]]:
    """An empty network (on the meta device) for a published file's tensors, and the tensors.

    Raises KeyError where a tensor that tells a size is missing.
    """
    from transformers import SamConfig

    _, configs = configurations(state)
    with torch.device("meta"):
        return PackageSam(SamConfig(**configs)), state


def recognised(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file's tensors are a Segment Anything network by the package's names."""
    return "image_encoder.pos_embed" in state and "mask_decoder.hf_token.weight" not in state
