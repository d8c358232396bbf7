"""A small network that names the shape, colour and pattern of the object in the middle of a crop."""

from __future__ import annotations

import torch
from torch import nn

from ..world.attributes import COLOURS, PATTERNS, SHAPES

HEADS = (len(SHAPES) + 1, len(COLOURS), len(PATTERNS))
"""Classes for shape (the last one: nothing there), colour and pattern."""

_WIDTHS = (32, 64, 96, 128)


def _stage(width_in: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, 3, stride=2, padding=1),
        nn.GroupNorm(8, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(8, width),
        nn.ReLU(),
    ]


class Classifier(nn.Module):
    """Logits for shape [B, 9], colour [B, 8] and pattern [B, 4] from crops [B, 3, 64, 64] in [0, 1]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [layer for pair in zip((3, *_WIDTHS), _WIDTHS, strict=False) for layer in _stage(*pair)]
            self.features = nn.Sequential(*layers)
            # Mean and peak: how much of the crop looks so, and whether anything does.
            self.heads = nn.ModuleList([nn.Linear(2 * _WIDTHS[-1], classes) for classes in HEADS])

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.features(2.0 * crops - 1.0)
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return tuple(head(pooled) for head in self.heads)
