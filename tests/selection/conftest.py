"""Networks for several of these tests: Grounding DINO with all the published tensors, and small ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Sam2Config,
    Sam2Model,
    SwinConfig,
)

from devtools.pack import pack_module
from truefill_testing.random_dino import PUBLISHED, random_dino


@pytest.fixture(scope="session")
def dino_state() -> dict[str, torch.Tensor]:
    """Every tensor of Swin-T's published file that the network takes: 174 million random values."""
    return random_dino()


@pytest.fixture(scope="session")
def dino_network(dino_state: dict[str, torch.Tensor]) -> Any:
    """The network of all tensors of the published file."""
    # As published: with a prefix, with what training left, and with the window's indices.
    indices = {
        key: torch.zeros(shape, dtype=torch.long)
        for key, shape in PUBLISHED["shapes"].items()
        if key.endswith("relative_position_index")
    }
    rest = {"label_enc.weight": torch.zeros(3, 2), "bert.embeddings.position_ids": torch.zeros(1, 2)}
    state = {f"module.{key}": tensor for key, tensor in {**dino_state, **indices, **rest}.items()}
    return pack_module("weights.detectors").detector_from_state(state, "groundingdino_swint_ogc.pth")


@pytest.fixture(scope="session")
def small_detector() -> Any:
    """A detector with every part of the published network and 900 queries too, but narrow: it looks at large pictures at once."""
    narrow = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=12, depths=[1] * 4, num_heads=[2] * 4, window_size=7, out_indices=[2, 3, 4]
        ),
        text_config=BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        d_model=32,
        encoder_layers=1,
        # transformers 5 ties no heads of a single layer, and fails.
        decoder_layers=2,
        num_queries=900,
        **narrow,
    )
    network = _random(GroundingDinoForObjectDetection(config))
    return pack_module("selection.detectors").Detector.of(network, pack_module("weights.grounding_dino").tokenizer())


@pytest.fixture(scope="session")
def small_sam2() -> Any:
    """A segmenter with every part of SAM 2, for pictures of 128 pixels."""
    widths, side = [16, 32, 64, 128], 128
    trunk = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": widths[0],
        "num_attention_heads": 1,
        "image_size": [side, side],
        "window_positional_embedding_background_size": [2, 2],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
    }
    grids = [[side // stride] * 2 for stride in (4, 8, 16)]
    config = Sam2Config(
        vision_config={
            "backbone_config": trunk,
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": grids,
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": side, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 32},
    )
    return pack_module("selection.segmenters").Segmenter.of(_random(Sam2Model(config)))


def _random(network: torch.nn.Module) -> torch.nn.Module:
    """The network with weights that let every input matter: those of a new one make all answers alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.eval().requires_grad_(False).parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return network
