"""The host's `UNetModel` written out in torch functions: no attention function, module call or hook of the host.

    attention   A = Q K^T / sqrt(d) per head, softmax(A) V, to_out                   (HD-Painter, section 3.3)
    block       x + attention(norm1 x); x + attention(norm2 x, context); x + ff(norm3 x)

It runs in the dtype of the UNet's weights (`as_float64`). It covers what SD1.5, SD2 and SDXL are made of: residual
blocks without scale-shift norm, strided convolutions down, nearest-neighbour and convolution up, spatial transformers
with linear or 1x1 projections, sequential ADM.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from devtools.pack import ensure_host

from .literal_boundary import Boundary
from .literal_painta import Painta, Place

ensure_host()

from comfy.ldm.modules.attention import SpatialTransformer  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample  # noqa: E402
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding  # noqa: E402

RECORDED_FACTOR = 4
"""Latent to level downsampling of the cross-attentions that are recorded unless told otherwise: 1/32 of the image."""


@dataclass
class CrossScores:
    """Raw scores Q K^T / sqrt(d) [rows, heads, N, L] of one cross-attention; N = height * width of `grid`."""

    place: Place
    grid: tuple[int, int]
    scores: torch.Tensor


@dataclass
class _Forward:
    """What a transformer block has to know besides its input."""

    context: torch.Tensor
    painta: Painta | None
    boundary: Boundary | None
    recorded: list[CrossScores]
    recorded_factors: tuple[int, ...]
    factor: int = 1


def as_float64(unet: UNetModel) -> UNetModel:
    """A frozen float64 copy of a host UNet."""
    exact = copy.deepcopy(unet)
    exact.double().requires_grad_(False)
    exact.dtype = torch.float64
    return exact


def literal_unet(
    unet: UNetModel,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    painta: Painta | None = None,
    boundary: Boundary | None = None,
    record: bool = False,
    factors: tuple[int, ...] = (RECORDED_FACTOR,),
) -> torch.Tensor | tuple[torch.Tensor, list[CrossScores]]:
    """The UNet's output [B, 4, h, w] for x [B, channels, h, w], timesteps [B], context [B, L, C], ADM y [B, A].

    With `record`, also the raw cross-attention scores of every transformer block on the levels that are the latent
    downsampled by one of `factors`, in the order of evaluation. By default 1/32 of the image: the middle block is among
    them where it lies at 1/32 (SDXL), not where it lies at 1/64 (SD1.5, SD2).
    The table of timestep embeddings is the host's own, float32: a rounding that belongs to the model.
    """
    embedding = timestep_embedding(timesteps, unet.model_channels).to(x.dtype)
    embedding = _linear(unet.time_embed[2], F.silu(_linear(unet.time_embed[0], embedding)))
    if unet.num_classes is not None:
        sequence = unet.label_emb[0]
        embedding = embedding + _linear(sequence[2], F.silu(_linear(sequence[0], y)))

    forward = _Forward(context, painta, boundary, [], factors)
    skips = []
    h = x
    for index, block in enumerate(unet.input_blocks):
        h = _block(block, h, embedding, ("input", index), None, forward)
        skips.append(h)
    h = _block(unet.middle_block, h, embedding, ("middle", 0), None, forward)
    for index, block in enumerate(unet.output_blocks):
        h = torch.cat([h, skips.pop()], dim=1)
        upsampled_grid = skips[-1].shape[2:] if skips else None
        h = _block(block, h, embedding, ("output", index), upsampled_grid, forward)
    normalisation, _, convolution = unet.out
    h = _conv(convolution, F.silu(_group_norm(normalisation, h)))
    return (h, forward.recorded) if record else h


def _block(block, h, embedding, where, upsampled_grid, forward):
    for layer in block:
        if isinstance(layer, ResBlock):
            h = _res_block(layer, h, embedding)
        elif isinstance(layer, SpatialTransformer):
            h = _spatial_transformer(layer, h, where, forward)
        elif isinstance(layer, Downsample):
            h = _conv(layer.op, h)
            forward.factor *= 2
        elif isinstance(layer, Upsample):
            # To the size of the next skip: of 65 rows 33 are left after a downsampling, not 32.5.
            h = _conv(layer.conv, F.interpolate(h, size=upsampled_grid, mode="nearest"))
            forward.factor //= 2
        else:
            h = _conv(layer, h)
    return h


def _res_block(block, x, embedding):
    normalisation, _, convolution = block.in_layers
    h = _conv(convolution, F.silu(_group_norm(normalisation, x)))
    h = h + _linear(block.emb_layers[1], F.silu(embedding))[:, :, None, None]
    normalisation, _, _, convolution = block.out_layers
    h = _conv(convolution, F.silu(_group_norm(normalisation, h)))
    shortcut = x if isinstance(block.skip_connection, torch.nn.Identity) else _conv(block.skip_connection, x)
    return shortcut + h


def _spatial_transformer(transformer, x, where, forward):
    _, _, height, width = x.shape
    h = _group_norm(transformer.norm, x)
    if transformer.use_linear:
        h = _linear(transformer.proj_in, h.flatten(2).mT)
    else:
        h = _conv(transformer.proj_in, h).flatten(2).mT
    for index, block in enumerate(transformer.transformer_blocks):
        h = _transformer_block(block, h, (*where, index), (height, width), forward)
    if transformer.use_linear:
        h = _linear(transformer.proj_out, h).mT.unflatten(2, (height, width))
    else:
        h = _conv(transformer.proj_out, h.mT.unflatten(2, (height, width)))
    return x + h


def _transformer_block(block, x, place: Place, grid, forward: _Forward):
    """One BasicTransformerBlock on x [rows, N, channels]."""
    context, painta = forward.context, forward.painta

    n = _layer_norm(block.norm1, x)
    if forward.factor == 1:
        # PAIntA leaves this level alone.
        y = _self_attention(block.attn1, n)
    else:
        scores = _scores(block.attn1, n, n)
        y = _output(block.attn1, scores, n)
        if painta is not None and painta.applies(place, forward.factor):
            cross = _scores(block.attn2, _layer_norm(block.norm2, x + y), context)
            y = _output(block.attn1, painta.reweight(place, grid, scores, cross), n)
    x = x + y

    n = _layer_norm(block.norm2, x)
    scores = _scores(block.attn2, n, context)
    if forward.factor in forward.recorded_factors:
        forward.recorded.append(CrossScores(place, grid, scores))
    x = x + _output(block.attn2, scores, context, forward.boundary, grid)

    n = _layer_norm(block.norm3, x)
    values, gates = _linear(block.ff.net[0].proj, n).chunk(2, dim=-1)
    return x + _linear(block.ff.net[2], values * F.gelu(gates))


def _self_attention(attention, x):
    """to_out(softmax(A) V) with A from x [rows, N, channels] to itself.

    One head at a time, and computed again for the derivative: at 1/8 of a picture all matrices together take gigabytes.
    """
    q, k, v = (_split_heads(attention, _linear(to, x)) for to in (attention.to_q, attention.to_k, attention.to_v))

    def one_head(q, k, v):
        return (q @ k.mT / math.sqrt(attention.dim_head)).softmax(dim=-1) @ v

    heads = [
        checkpoint(one_head, *(part[:, head] for part in (q, k, v)), use_reentrant=False) for head in range(q.shape[1])
    ]
    return _linear(attention.to_out[0], torch.cat(heads, dim=-1))


def _scores(attention, queries_from, keys_from):
    """A = Q K^T / sqrt(d): [rows, N, .], [rows, M, .] -> [rows, heads, N, M]."""
    q = _split_heads(attention, _linear(attention.to_q, queries_from))
    k = _split_heads(attention, _linear(attention.to_k, keys_from))
    return q @ k.mT / math.sqrt(attention.dim_head)


def _output(attention, scores, values_from, boundary=None, grid=None):
    """to_out(softmax(A) V): [rows, heads, N, M], [rows, M, .] -> [rows, N, channels]."""
    v = _split_heads(attention, _linear(attention.to_v, values_from))
    probabilities = scores.softmax(dim=-1)
    if boundary is not None:
        probabilities = boundary.bounded(probabilities, grid)
    return _linear(attention.to_out[0], (probabilities @ v).transpose(1, 2).flatten(2))


def _split_heads(attention, x):
    """[rows, N, heads * d] -> [rows, heads, N, d]."""
    return x.unflatten(2, (attention.heads, attention.dim_head)).transpose(1, 2)


def _linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def _conv(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def _group_norm(layer, x):
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def _layer_norm(layer, x):
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
