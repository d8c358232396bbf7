"""Grounding DINO files as the groundingdino package's network, with the interface of transformers'.

Written for groundingdino-py 0.4.0, which looks for BERT on the internet while it is built: what it needs of it is in the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from .files import differing
from .grounding_dino import UNUSED, tokenizer


class PackageDino(torch.nn.Module):
    """The package's network, which is given tokens instead of a caption; `config` has its `num_queries`."""

    def __init__(self, swin: str) -> None:
        super().__init__()
        models, config = (
            importlib.import_module(f"groundingdino.{name}") for name in ("models", f"config.GroundingDINO_{swin}")
        )
        self.config = SimpleNamespace(num_queries=config.num_queries)
        # Both are for training alone.
        settings = {**vars(config), "use_checkpoint": False, "use_transformer_ckpt": False}
        with _without_download():
            self.network: Any = models.build_model(SimpleNamespace(**settings))

    def forward(self, pixel_values: torch.Tensor, **words: torch.Tensor) -> SimpleNamespace:
        """`logits` [1, queries, 256] and `pred_boxes` [1, queries, 4].

        `pixel_values` are normalised pixels [1, 3, H, W], `words` what the tokenizer made of the text.
        """
        from transformers import BatchEncoding

        self.network.tokenizer = lambda *_, **__: BatchEncoding(dict(words))
        output = self.network(pixel_values, captions=[""])
        return SimpleNamespace(logits=output["pred_logits"], pred_boxes=output["pred_boxes"])


def network(state: Mapping[str, torch.Tensor]) -> tuple[PackageDino, list[str]]:
    """The network of a published file's tensors, and the names of those that are missing, too many or of other sizes.

    Raises KeyError for other tensors.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    width = state["backbone.0.patch_embed.proj.weight"].shape[0]
    model = PackageDino({96: "SwinT_OGC", 128: "SwinB_cfg"}[width])
    needed, given = (
        {key: tensor for key, tensor in tensors.items() if not UNUSED.match(key)}
        for tensors in (model.network.state_dict(), state)
    )
    if not (wrong := differing(needed, given)):
        model.network.load_state_dict(given, strict=False)
    return model, wrong


@contextmanager
def _without_download() -> Iterator[None]:
    """Has the package build BERT empty, and take our tokenizer."""
    from transformers import BertConfig, BertModel

    library = importlib.import_module("groundingdino.util.get_tokenlizer")
    replaced = {
        "get_tokenlizer": lambda _: tokenizer(),
        "get_pretrained_language_model": lambda _: BertModel(BertConfig()),
    }
    before = {name: getattr(library, name) for name in replaced}
    for name, function in replaced.items():
        setattr(library, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(library, name, function)
