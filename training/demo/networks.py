"""The demo model's networks with fresh weights, for training; `weights.demo_model` makes the host's objects of trained ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ops
import torch
from comfy.clip_model import CLIPLayer, CLIPTextModel_
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ...weights.demo_model import CONTEXT_DIM, TEXT_CONFIG, unet_config
from .vocabulary import Vocabulary

# Layers that start at zero in the published architecture: a new network passes its input on.
_ZERO_AT_START = ("out_layers.3", "proj_out", "out.2")


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of [B, N, heads * C] with a mask that broadcasts to [B, heads, N, M], true where it may look.

    On a CPU the derivative of torch's fused attention takes several times as long as this for maps of 16x16.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return _attend(q, k, v, mask)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The same of [B, heads, N, C]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _plain_override(
    host_attention: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: Any = None,
    skip_reshape: bool = False,
    **_: Any,
) -> torch.Tensor:
    return _attend(q, k, v) if skip_reshape else plain_attention(q, k, v, heads)


def attention_options(device: torch.device) -> dict[str, Any]:
    """The host's options for a call of a network that is trained: on a CPU `plain_attention` takes the place of the host's."""
    return {"optimized_attention_override": _plain_override} if device.type == "cpu" else {}


def predict_noise(unet: UNetModel, x: torch.Tensor, times: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The UNet's prediction [B, 4, H, W] for its input [B, 4 or 9, H, W], time steps [B] and context [B, 77, 192]."""
    return unet(x, times, context, transformer_options=attention_options(x.device))


def initialise(module: nn.Module, seed: int) -> None:
    """Fill a host network, which leaves its weights as they lay in memory, as torch would; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    for name, child in module.named_modules():
        if isinstance(child, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            if child.weight is not None:
                nn.init.ones_(child.weight)
            bias = getattr(child, "bias", None)
            if isinstance(bias, torch.Tensor):
                nn.init.zeros_(bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02, generator=generator)
        elif isinstance(child, nn.Linear | nn.Conv2d):
            if name.endswith(_ZERO_AT_START):
                nn.init.zeros_(child.weight)
            else:
                nn.init.kaiming_uniform_(child.weight, a=5**0.5, generator=generator)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def new_unet(in_channels: int, seed: int) -> UNetModel:
    """A UNet with fresh weights, in float32 on the CPU."""
    unet = UNetModel(**unet_config(in_channels), operations=comfy.ops.disable_weight_init)
    initialise(unet, seed)
    return unet.requires_grad_(True)


def inpainting_unet(text2image: Mapping[str, torch.Tensor]) -> UNetModel:
    """A 9-channel UNet from the state dict of a 4-channel one; the new inputs (mask, masked picture) start at zero."""
    unet = new_unet(9, seed=0)
    state = dict(text2image)
    first = "input_blocks.0.0.weight"
    weight = torch.zeros_like(unet.state_dict()[first])
    weight[:, :4] = state[first]
    state[first] = weight
    unet.load_state_dict(state)
    return unet.requires_grad_(True)


class TextEncoder(nn.Module):
    """The host's CLIP text model over the world's words only: the embeddings of all other tokens are one shared row."""

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        super().__init__()
        self.text_model = CLIPTextModel_(TEXT_CONFIG, torch.float32, "cpu", comfy.ops.disable_weight_init)
        self.text_model.embeddings.token_embedding = nn.Embedding(len(vocabulary.token_ids) + 1, CONTEXT_DIM)
        initialise(self, seed)
        self.requires_grad_(True)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The context [B, 77, 192] for a vocabulary's rows [B, 77] (int64).

        The host's own forward adds in place, which autograd does not allow.
        """
        embeddings, encoder = self.text_model.embeddings, self.text_model.encoder
        x = embeddings.token_embedding(rows) + embeddings.position_embedding.weight
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for layer in encoder.layers:
            assert isinstance(layer, CLIPLayer)
            x = x + layer.self_attn(layer.layer_norm1(x), causal, plain_attention)
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.text_model.final_layer_norm(x)
