"""Grounding DINO with Swin-T: all its tensors, random weights for them, and what the groundingdino package answers."""

from __future__ import annotations

import json
import re

import torch

from devtools.pack import ROOT
from truefill_testing.random_tensors import random_tensors

PUBLISHED = json.loads((ROOT / "tests" / "data" / "groundingdino_swint.json").read_text())
"""`shapes`: of every tensor of groundingdino_swint_ogc.pth. `text` and, for `random_dino` and `squares` of 256x320, `queries`,
`boxes` and `logits` (of the text's tokens): answers of the groundingdino package, 0.4.0."""

_BOX_HEAD = re.compile(r"^(?:transformer\.decoder\.)?bbox_embed\.\d+\.")
# transformers 5 ties no heads of a single layer of the decoder, and fails.
_DEEPER = re.compile(
    r"(encoder\.(layer|layers|text_layers|fusion_layers)|blocks)\.[1-9]\d*\.|(decoder\.layers|bbox_embed)\.([2-9]|\d\d)\."
)


def random_dino() -> dict[str, torch.Tensor]:
    """The tensors of a file; the six heads for boxes are one, as in the published network."""
    shapes = {key: shape for key, shape in PUBLISHED["shapes"].items() if not key.endswith("relative_position_index")}
    tables = ("level_embed", "tgt_embed", "embeddings.", "bias_table")
    return random_tensors(shapes, tables, lambda name: _BOX_HEAD.sub("bbox_embed.", name))


def shallow_dino() -> dict[str, torch.Tensor]:
    """A file in half precision of one layer of each kind, and two of the decoder: for tests of what is done with its answers."""
    return {key: tensor.half() for key, tensor in random_dino().items() if not _DEEPER.search(key)}
