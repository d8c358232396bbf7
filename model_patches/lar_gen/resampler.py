"""The resampler of IP-Adapter-Plus and LAR-Gen: a picture's 257 CLIP states become a few tokens of the text's width."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

HEAD_WIDTH = 64


class Resampler(nn.Module):
    """Learned queries read image features, layer by layer, and are projected to the width of the UNet's text.

    Its parameters have the names of the published files (`latents`, `proj_in`, `layers.0.0.to_q` ...).
    """

    def __init__(
        self, *, features: int, width: int, output: int, queries: int, depth: int, hidden: int, inner: int
    ) -> None:
        """`features` is CLIP's width, `inner` that of attention (heads times 64), `hidden` the feed-forward's."""
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, queries, width))
        self.proj_in = nn.Linear(features, width)
        self.proj_out = nn.Linear(width, output)
        self.norm_out = nn.LayerNorm(output)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Attention(width, inner), _feed_forward(width, hidden)]) for _ in range(depth)
        )

    @staticmethod
    def from_tensors(tensors: Mapping[str, torch.Tensor]) -> Resampler:
        """The resampler of a file's tensors, in float32. Raises KeyError where one is missing, ValueError where sizes differ."""
        latents, proj_out = tensors["latents"], tensors["proj_out.weight"]
        to_q, hidden = tensors["layers.0.0.to_q.weight"], tensors["layers.0.1.1.weight"]
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
        made = Resampler(
            features=tensors["proj_in.weight"].shape[1],
            width=latents.shape[2],
            output=proj_out.shape[0],
            queries=latents.shape[1],
            depth=depth,
            hidden=hidden.shape[0],
            inner=to_q.shape[0],
        )
        if missing := sorted(made.state_dict().keys() - tensors.keys()):
            raise KeyError(missing[0])
        try:
            made.load_state_dict({name: tensors[name].float() for name in made.state_dict()})
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return made.eval().requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, n, features] -> tokens [B, queries, output]."""
        x = self.proj_in(features)
        tokens = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer  # type: ignore[misc]  # a ModuleList is iterable, torch's stubs type it loosely
            tokens = tokens + attention(x, tokens)
            tokens = tokens + feed_forward(tokens)
        return self.norm_out(self.proj_out(tokens))


class _Attention(nn.Module):
    """Tokens attend to the features and to themselves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        features, tokens = self.norm1(features), self.norm2(tokens)
        key, value = self.to_kv(torch.cat((features, tokens), dim=1)).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2) for part in (self.to_q(tokens), key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0 / math.sqrt(HEAD_WIDTH))
        return self.to_out(attended.transpose(1, 2).flatten(2))


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
    )
