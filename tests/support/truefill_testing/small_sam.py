"""A small Segment Anything network in the segment-anything package's own classes, with random weights."""

from __future__ import annotations

from functools import partial

import torch
from segment_anything import modeling

SIDE = 128


def small_sam(seed: int = 0) -> modeling.Sam:
    """Every part of the published networks, for pictures of SIDE pixels."""
    width, channels = 32, 32
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=4,
            embed_dim=width,
            img_size=SIDE,
            mlp_ratio=3,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=2,
            patch_size=16,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=(1, 3),
            window_size=3,
            out_chans=channels,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=channels, image_embedding_size=(SIDE // 16,) * 2, input_image_size=(SIDE, SIDE), mask_in_chans=8
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=48, num_heads=8),
            transformer_dim=channels,
            iou_head_depth=4,
            iou_head_hidden_dim=24,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sam.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator) * 1.5 / fan_in**0.5
            parameter.copy_(parameter.mean() + noise if parameter.ndim > 1 else parameter + 0.3 * noise)
    return sam.eval()
