"""The segmenter benchmark measures networks of the published sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from segment_anything import sam_model_registry

from devtools.pack import ROOT, pack_module

bench = pack_module("evaluation.bench_segment")
detectors = pack_module("weights.detectors")
segmenters = pack_module("weights.segmenters")


def published(name: str) -> dict[str, torch.Tensor]:
    """Tensors of zeros in the names and shapes of a published file, which take next to no memory."""
    shapes = json.loads((ROOT / "tests" / "data" / f"{name}.json").read_text())["shapes"]
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def shapes(network: Any) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_a_vit_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        state, ours = sam_model_registry[name]().state_dict(), bench.network(name)
    theirs, _ = pack_module("weights.segment_anything").network(state)
    assert shapes(ours) == shapes(theirs)
    for setting in ("global_attn_indexes", "num_attention_heads", "window_size", "mlp_dim"):
        assert getattr(ours.config.vision_config, setting) == getattr(theirs.config.vision_config, setting)


def test_sam_2_has_the_published_size() -> None:
    theirs, _ = pack_module("weights.segment_anything_2").network(published("sam2_1_hiera_tiny"))
    with torch.device("meta"):
        ours = bench.network("sam2_tiny")
    assert shapes(ours) == shapes(theirs)
    for setting in ("global_attention_blocks", "num_attention_heads_per_stage", "window_size_per_stage"):
        found, expected = (getattr(one.config.vision_config.backbone_config, setting) for one in (ours, theirs))
        assert list(found) == list(expected)


def test_the_detector_has_the_published_size() -> None:
    theirs, _ = pack_module("weights.grounding_dino").network(published("groundingdino_swint"))
    assert shapes(bench.network("dino_swin_t")) == shapes(theirs)


def test_a_click_is_timed() -> None:
    row = bench.row("sam2_tiny", 48, 64, 2)
    assert row["network"] == "sam2_tiny" and row["picture"] == "64x48"
    assert row["first, s"] > 0 and row["next, s"] > 0 and row["asked for, MiB"] > 0
