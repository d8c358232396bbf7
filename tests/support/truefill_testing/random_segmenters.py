"""Promptable segmenters with random weights: a small Segment Anything and SAM-HQ in the classes of the segment-anything package,
and SAM 2's smallest published network as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything import SamPredictor, modeling
from torch import nn

from devtools.pack import pack_module
from truefill_testing.random_tensors import random_tensors

Prompt = pack_module("selection.segmenters").Prompt

SIDE = 128
PROMPTS = {
    "a point": Prompt([(20.0, 31.0)]),
    "points": Prompt([(20.0, 31.0), (40.0, 12.0)], [(3.0, 50.0)]),
    "box": Prompt(box=(5.0, 8.0, 41.0, 39.0)),
    "box and points": Prompt([(20.0, 31.0)], [(6.0, 9.0)], (5.0, 8.0, 41.0, 39.0)),
}


def smooth_picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Soft colours, [H, W, 3] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0].movedim(0, -1)


def predicted(sam: modeling.Sam, image: torch.Tensor, prompt: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers of the package's own predictor: logits [answers, H, W] and scores [answers]."""
    predictor = SamPredictor(sam)
    height, width = image.shape[:2]
    new = predictor.transform.get_preprocess_shape(height, width, SIDE)
    pixels = 255 * image.movedim(-1, 0)[None]
    if new != (height, width):
        pixels = F.interpolate(pixels, size=new, mode="bilinear", antialias=True)
    predictor.set_torch_image(pixels, (height, width))
    points = [*prompt.include, *prompt.exclude]
    labels = [1] * len(prompt.include) + [0] * len(prompt.exclude)
    coords = predictor.transform.apply_coords_torch(torch.tensor([points]), (height, width)) if points else None
    box = prompt.box and predictor.transform.apply_boxes_torch(torch.tensor([prompt.box]), (height, width))
    masks, scores, _ = predictor.predict_torch(
        coords, torch.tensor([labels]) if points else None, box, prompt.rough, True, return_logits=True
    )
    return masks[0], scores[0]


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
    return _shuffled(sam, seed)


def _shuffled(network: nn.Module, seed: int) -> nn.Module:
    """Weights that let every input matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator) * 1.5 / fan_in**0.5
            parameter.copy_(parameter.mean() + noise if parameter.ndim > 1 else parameter + 0.3 * noise)
    return network.eval()


class HQDecoder(modeling.MaskDecoder):
    """The mask decoder of "Segment Anything in High Quality" (section 3.2), literally, with the released names.

    A fifth output token and its own layers draw one more mask, from the decoder's features and those of the encoder's first
    block with attention over the whole picture and of its end; it is added to the best of the three.
    """

    early: torch.Tensor
    """The first such block's output, [1, h, w, C]."""

    def __init__(self, width: int, channels: int, **arguments: object) -> None:
        super().__init__(transformer_dim=channels, **arguments)
        norm = modeling.common.LayerNorm2d

        def enlarge(first: int, then: int, last: int) -> nn.Sequential:
            return nn.Sequential(
                nn.ConvTranspose2d(first, then, 2, 2), norm(then), nn.GELU(), nn.ConvTranspose2d(then, last, 2, 2)
            )

        self.hf_token = nn.Embedding(1, channels)
        self.hf_mlp = modeling.mask_decoder.MLP(channels, channels, channels // 8, 3)
        self.compress_vit_feat = enlarge(width, channels, channels // 8)
        self.embedding_encoder = enlarge(channels, channels // 4, channels // 8)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(channels // 8, channels // 4, 3, 1, 1),
            norm(channels // 4),
            nn.GELU(),
            nn.Conv2d(channels // 4, channels // 8, 3, 1, 1),
        )

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best mask of one prompt, improved, [1, 1, h, w], and its score."""
        fine = self.embedding_encoder(image_embeddings) + self.compress_vit_feat(self.early.permute(0, 3, 1, 2))
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight])[None]
        tokens, source = self.transformer(
            image_embeddings + dense_prompt_embeddings, image_pe, torch.cat([tokens, sparse_prompt_embeddings], dim=1)
        )
        drawn = self.output_upscaling(source.transpose(1, 2).view(image_embeddings.shape))
        scores = self.iou_prediction_head(tokens[:, 0])[0, 1:]
        best = 1 + int(scores.argmax())
        mask = torch.einsum("c,chw->hw", self.output_hypernetworks_mlps[best](tokens[0, 1 + best]), drawn[0])
        better = self.embedding_maskfeature(drawn)[0] + fine[0]
        mask = mask + torch.einsum("c,chw->hw", self.hf_mlp(tokens[0, 1 + self.num_mask_tokens]), better)
        return mask[None, None], scores.max()[None, None]


def small_sam_hq(seed: int = 0) -> modeling.Sam:
    """The same as SAM-HQ."""
    sam = small_sam(seed)
    encoder, plain = sam.image_encoder, sam.mask_decoder
    decoder = HQDecoder(
        width=encoder.patch_embed.proj.out_channels,
        channels=plain.transformer_dim,
        num_multimask_outputs=plain.num_multimask_outputs,
        transformer=plain.transformer,
        iou_head_depth=4,
        iou_head_hidden_dim=24,
    )
    sam.mask_decoder = _shuffled(decoder, seed + 1)
    first = next(block for block in encoder.blocks if block.window_size == 0)
    first.register_forward_hook(lambda module, arguments, output: setattr(decoder, "early", output))
    return sam.eval()


def sam2_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Random weights of SAM 2."""
    tables = ("_token.", "_tokens.", "pos_embed", "no_mem", "point_embed", "not_a_point", "no_mask", "gaussian")
    return random_tensors(shapes, tables)
