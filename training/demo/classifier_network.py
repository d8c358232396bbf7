"""A small network that names the shape, colour and pattern of the object in the middle of a crop."""

from __future__ import annotations

import torch
from torch import nn

from ..world.attributes import COLOURS, PATTERNS, SHAPES

HEADS = (len(SHAPES) + 1, len(COLOURS), len(PATTERNS))
"""Classes for shape (the last one: nothing there), colour and pattern."""

_WIDTHS = (32, 64, 96, 128)
WIDTH = _WIDTHS[-1]
"""Channels of the features."""


def _stage(width_in: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, 3, stride=2, padding=1),
        nn.GroupNorm(8, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(8, width),
        nn.ReLU(),
    ]


def conv_features() -> nn.Sequential:
    """Convolutions from crops [B, 3, H, W] in [-1, 1] to features [B, WIDTH, H / 16, W / 16]."""
    return nn.Sequential(*(layer for pair in zip((3, *_WIDTHS), _WIDTHS, strict=False) for layer in _stage(*pair)))


def pooled(maps: torch.Tensor) -> torch.Tensor:
    """Mean and peak of maps [B, C, H, W], [B, 2 C]: how much of the crop looks so, and whether anything does."""
    return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)


class Classifier(nn.Module):
    """Logits for shape [B, 9], colour [B, 8] and pattern [B, 4] from crops [B, 3, 64, 64] in [0, 1]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = conv_features()
            self.heads = nn.ModuleList([nn.Linear(2 * WIDTH, classes) for classes in HEADS])

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = pooled(self.features(2.0 * crops - 1.0))
        return tuple(head(features) for head in self.heads)
