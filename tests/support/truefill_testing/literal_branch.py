"""PainterNet written out in float64, from state dicts: the branch by its file's names, and the base UNet that it feeds.

    input         [z_t ; z_masked ; m],  m = 1 where the picture is kept, 0 in the hole           9 channels
    layer point   h_i <- h_i + w Z_lay,i(lay_i)         lay_i: what the branch's layer i hands on        2
    attention     n_j <- n_j + w Z_attn,j(attn_j)       attn_j: to_out(softmax(A_j) V_j) of the branch   2
                  with n = norm2(x), in x + attn2(n, context) of the base's transformer block j
    A_j           Q_j K_j^T / sqrt(d_j) per head                                                          3
    L_ATAL        mean over j of || mean over S of A_j[:, token] - m_j ||^2     A_j after the softmax     4
    L             L_diff + beta L_ATAL                                                                    5

The numbers on the right are the paper's. There a layer is what BrushNet's files make of it: the first convolution, every
residual block (with the transformers after it), every convolution down or up, and the middle. The branch's own skips are
its raw outputs, without Z. What is added to a layer of the base on the way down is in the skip too, but for the first
convolution's: the released code of BrushNet stores that one before it adds.

The hole m_j of the loss is 1 in the hole, unlike the mask that the branch is given. The table of timestep embeddings is
made in float32: a rounding that belongs to the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F

State = Mapping[str, torch.Tensor]
Heads = Mapping[int, int] | Callable[[int], int]
"""Channels of a transformer -> its number of heads."""

PIXELS = 8
"""Of a latent's cell, in height and in width."""
_RESIDUAL = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
"""The parts of a residual block in a file of the branch, in the order in which they are used."""
_HOST_RESIDUAL = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
"""The same in the host's UNet."""


def branch_input(noisy: torch.Tensor, masked_latent: torch.Tensor, hole_pixels: torch.Tensor) -> torch.Tensor:
    """[B, 9, h, w] from z_t and z_masked [B, 4, h, w] and the hole [B, 1, 8h, 8w], 1 = to be filled."""
    rows, _, height, width = noisy.shape
    assert hole_pixels.shape == (rows, 1, PIXELS * height, PIXELS * width)
    kept = torch.zeros(rows, 1, height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            # The nearest pixel as torch has it, floor(i * 8), which is the cell's first.
            kept[:, :, i, j] = 1.0 - hole_pixels[:, :, PIXELS * i, PIXELS * j].double()
    return torch.cat([noisy.double(), masked_latent.double(), kept], dim=1)


def branch_outputs(
    state: State,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    y: torch.Tensor | None,
    heads: Heads,
    maps: list[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Z_lay(lay_i) [B, channels, h_i, w_i], down, middle, up, and Z_attn(attn_j) [B, cells, channels], as a pass meets them.

    x [B, 9, h, w], timesteps [B], context [B, L, C], y [B, A] for a branch with `add_embedding`. A file without attention
    points has none of the latter. Its cross-attentions' A_j [B, heads, cells, L], softmaxed, go to the end of `maps`.
    """
    state, x, context = _float64(state), x.double(), context.double()
    heads_of = heads if callable(heads) else heads.__getitem__
    embedding = _embedding(state, timesteps, ("time_embedding.linear_1", "time_embedding.linear_2"))
    if "add_embedding.linear_1.weight" in state:
        assert y is not None
        embedding = embedding + _two_linears(state, y.double(), ("add_embedding.linear_1", "add_embedding.linear_2"))
    crossed: list[torch.Tensor] = []

    def layer(block: str, number: int, h: torch.Tensor) -> torch.Tensor:
        """A residual block, and the transformers after it if there are any."""
        h = _residual(state, f"{block}.resnets.{number}", _RESIDUAL, h, embedding)
        attention = f"{block}.attentions.{number}"
        if f"{attention}.norm.weight" in state:
            h = _transformers(state, attention, h, context, heads_of(h.shape[1]), crossed, maps=maps)
        return h

    h = _conv(state, "conv_in_condition", x)
    down = [h]
    for level in range(_count(state, "down_blocks")):
        block = f"down_blocks.{level}"
        for number in range(_count(state, f"{block}.resnets")):
            h = layer(block, number, h)
            down.append(h)
        if f"{block}.downsamplers.0.conv.weight" in state:
            h = _conv(state, f"{block}.downsamplers.0.conv", h, stride=2)
            down.append(h)

    h = layer("mid_block", 0, h)
    h = _residual(state, "mid_block.resnets.1", _RESIDUAL, h, embedding)
    middle = h

    skips = list(down)
    up = []
    for level in range(_count(state, "up_blocks")):
        block = f"up_blocks.{level}"
        for number in range(_count(state, f"{block}.resnets")):
            h = layer(block, number, torch.cat([h, skips.pop()], dim=1))
            up.append(h)
        if f"{block}.upsamplers.0.conv.weight" in state:
            h = _up(state, f"{block}.upsamplers.0.conv", h, skips[-1])
            up.append(h)
    assert not skips

    layers = [
        *_points(state, "brushnet_down_blocks", down, _conv),
        _conv(state, "brushnet_mid_block", middle),
        *_points(state, "brushnet_up_blocks", up, _conv),
    ]
    if _count(state, "painternet_attention_points") == 0:
        return layers, []
    return layers, _points(state, "painternet_attention_points", crossed, _linear)


def injected_base(
    unet: torch.nn.Module,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    y: torch.Tensor | None,
    layers: Sequence[torch.Tensor],
    attentions: Sequence[torch.Tensor],
    layer_scale: float,
    attention_scale: float,
) -> torch.Tensor:
    """The output [B, 4, h, w] of the host's UNetModel `unet` with a branch's `layers` and `attentions` added to it.

    Its weights are taken in float64, whatever they are in. Without any `attentions` none are added.
    """
    state, x, context = _float64(unet.state_dict()), x.double(), context.double()
    embedding = _embedding(state, timesteps, ("time_embed.0", "time_embed.2"))
    if "label_emb.0.0.weight" in state:
        assert y is not None
        embedding = embedding + _two_linears(state, y.double(), ("label_emb.0.0", "label_emb.0.2"))
    of_layers = (layer_scale * layer.double() for layer in layers)
    of_attentions = (attention_scale * attention.double() for attention in attentions) if attentions else None

    def part(name: str, h: torch.Tensor, grid_of: torch.Tensor | None) -> torch.Tensor:
        """One module of a block; a convolution up is to the grid of `grid_of`."""
        if f"{name}.in_layers.0.weight" in state:
            return _residual(state, name, _HOST_RESIDUAL, h, embedding)
        if f"{name}.proj_in.weight" in state:
            heads = unet.get_submodule(f"{name}.transformer_blocks.0.attn1").heads
            return _transformers(state, name, h, context, heads, [], of_attentions)
        if f"{name}.op.weight" in state:
            return _conv(state, f"{name}.op", h, stride=2)
        if f"{name}.conv.weight" in state:
            assert grid_of is not None
            return _up(state, f"{name}.conv", h, grid_of)
        return _conv(state, name, h)

    h = x
    skips = []
    for number in range(_count(state, "input_blocks")):
        for index in range(_count(state, f"input_blocks.{number}")):
            h = part(f"input_blocks.{number}.{index}", h, None)
        before, h = h, h + next(of_layers)
        skips.append(h if number else before)

    for index in range(_count(state, "middle_block")):
        h = part(f"middle_block.{index}", h, None)
    h = h + next(of_layers)

    for number in range(_count(state, "output_blocks")):
        h = torch.cat([h, skips.pop()], dim=1)
        for index in range(_count(state, f"output_blocks.{number}")):
            name = f"output_blocks.{number}.{index}"
            if f"{name}.conv.weight" in state:
                # What the layer before it hands on.
                h = h + next(of_layers)
            h = part(name, h, skips[-1] if skips else None)
        h = h + next(of_layers)

    assert next(of_layers, None) is None
    assert of_attentions is None or next(of_attentions, None) is None
    return _conv(state, "out.2", F.silu(_group_norm(state, "out.0", h, 1e-5)))


def own_token_positions(words: int) -> list[int]:
    """S of a text of so many tokens: they lie between the start, which is token 0, and the end."""
    return list(range(1, words + 1))


def actual_token_attention_loss(
    maps: Sequence[torch.Tensor], token_positions: Sequence[Sequence[int]], hole: torch.Tensor
) -> torch.Tensor:
    """L_ATAL of A_i [B, heads, cells, tokens], softmaxed, S of each row and the hole [B, 1, h, w], 1 = to be filled.

    A_i is the mean over the heads, m_i the hole's area mean on the layer's grid, the norm's square a sum over the cells. The
    loss is the mean over layers and rows; a row without tokens of its own counts 0, and stays in the mean.
    """
    rows = len(hole)
    assert len(token_positions) == rows
    total = torch.zeros((), dtype=torch.float64)
    for attention in maps:
        _, heads, cells, _ = attention.shape
        assert len(attention) == rows
        grid = _grid(cells, hole)
        for row in range(rows):
            positions = token_positions[row]
            if not positions:
                continue
            for cell in range(cells):
                found = torch.zeros((), dtype=torch.float64)
                for token in positions:
                    for head in range(heads):
                        found = found + attention[row, head, cell, token].double() / heads
                total = total + (found / len(positions) - _area_mean(hole[row, 0], grid, cell)) ** 2
    return total / (len(maps) * rows)


def _grid(cells: int, hole: torch.Tensor) -> tuple[int, int]:
    """Height and width of a layer of so many cells: the hole's own, halved as often as it takes."""
    height, width = hole.shape[2:]
    while height * width > cells:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == cells
    return height, width


def _area_mean(hole: torch.Tensor, grid: tuple[int, int], cell: int) -> torch.Tensor:
    """The mean of the hole [h, w] over what a cell of the grid covers, whole pixels."""
    (height, width), (i, j) = hole.shape, divmod(cell, grid[1])
    top, bottom = i * height // grid[0], math.ceil((i + 1) * height / grid[0])
    left, right = j * width // grid[1], math.ceil((j + 1) * width / grid[1])
    total = torch.zeros((), dtype=torch.float64)
    for row in range(top, bottom):
        for column in range(left, right):
            total = total + hole[row, column].double()
    return total / ((bottom - top) * (right - left))


def _float64(state: State) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def _count(state: State, prefix: str) -> int:
    """How many numbers 0, 1, .. there are after "prefix." in the names."""
    numbers = {int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in state if name.startswith(f"{prefix}.")}
    assert numbers == set(range(len(numbers)))
    return len(numbers)


def _points(
    state: State, name: str, outputs: Sequence[torch.Tensor], layer: Callable[[State, str, torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Z of each output: `layer` with the weights `name`.N."""
    assert _count(state, name) == len(outputs)
    return [layer(state, f"{name}.{number}", output) for number, output in enumerate(outputs)]


def _embedding(state: State, timesteps: torch.Tensor, names: tuple[str, str]) -> torch.Tensor:
    """[B, E] of timesteps [B]: cos(t f_k), then sin(t f_k), f_k = 10000^(-k / half), through two linear layers."""
    half = state[f"{names[0]}.weight"].shape[1] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return _two_linears(state, torch.cat([angles.cos(), angles.sin()], dim=1).double(), names)


def _two_linears(state: State, x: torch.Tensor, names: tuple[str, str]) -> torch.Tensor:
    return _linear(state, names[1], F.silu(_linear(state, names[0], x)))


def _residual(
    state: State, name: str, parts: tuple[str, ...], x: torch.Tensor, embedding: torch.Tensor
) -> torch.Tensor:
    norm1, conv1, time, norm2, conv2, shortcut = (f"{name}.{part}" for part in parts)
    h = _conv(state, conv1, F.silu(_group_norm(state, norm1, x, 1e-5)))
    h = h + _linear(state, time, F.silu(embedding))[:, :, None, None]
    h = _conv(state, conv2, F.silu(_group_norm(state, norm2, h, 1e-5)))
    return (_conv(state, shortcut, x) if f"{shortcut}.weight" in state else x) + h


def _up(state: State, name: str, h: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """To the size of the next skip: of 65 rows 33 are left after a convolution down, not 32.5."""
    return _conv(state, name, F.interpolate(h, size=skip.shape[2:], mode="nearest"))


def _transformers(
    state: State,
    name: str,
    x: torch.Tensor,
    context: torch.Tensor,
    heads: int,
    crossed: list[torch.Tensor],
    added: Iterator[torch.Tensor] | None = None,
    maps: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """A spatial transformer on x [B, channels, h, w].

    The outputs [B, h * w, channels] of its cross-attentions go to the end of `crossed`, their maps to that of `maps`; the next of
    `added`, if it is given, is added to what each of them makes its queries from.
    """
    _, _, height, width = x.shape
    is_linear = state[f"{name}.proj_in.weight"].ndim == 2
    h = _group_norm(state, f"{name}.norm", x, 1e-6)
    if is_linear:
        h = _linear(state, f"{name}.proj_in", h.flatten(2).mT)
    else:
        h = _conv(state, f"{name}.proj_in", h).flatten(2).mT

    for depth in range(_count(state, f"{name}.transformer_blocks")):
        block = f"{name}.transformer_blocks.{depth}"
        n = _layer_norm(state, f"{block}.norm1", h)
        h = h + _attention(state, f"{block}.attn1", n, n, heads)
        n = _layer_norm(state, f"{block}.norm2", h)
        if added is not None:
            n = n + next(added)
        crossed.append(_attention(state, f"{block}.attn2", n, context, heads, maps))
        h = h + crossed[-1]
        n = _layer_norm(state, f"{block}.norm3", h)
        values, gates = _linear(state, f"{block}.ff.net.0.proj", n).chunk(2, dim=-1)
        h = h + _linear(state, f"{block}.ff.net.2", values * F.gelu(gates))

    if is_linear:
        h = _linear(state, f"{name}.proj_out", h).mT.unflatten(2, (height, width))
    else:
        h = _conv(state, f"{name}.proj_out", h.mT.unflatten(2, (height, width)))
    return x + h


def _attention(
    state: State,
    name: str,
    queries_from: torch.Tensor,
    keys_from: torch.Tensor,
    heads: int,
    maps: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """to_out(softmax(Q K^T / sqrt(d)) V), a head at a time: [B, N, channels], [B, M, .] -> [B, N, channels].

    softmax(Q K^T / sqrt(d)) [B, heads, N, M] goes to the end of `maps`.
    """
    q = _linear(state, f"{name}.to_q", queries_from)
    k, v = (_linear(state, f"{name}.{to}", keys_from) for to in ("to_k", "to_v"))
    d, rest = divmod(q.shape[2], heads)
    assert rest == 0
    found, looked = [], []
    for head in range(heads):
        here = slice(head * d, (head + 1) * d)
        looked.append((q[:, :, here] @ k[:, :, here].mT / math.sqrt(d)).softmax(dim=-1))
        found.append(looked[-1] @ v[:, :, here])
    if maps is not None:
        maps.append(torch.stack(looked, dim=1))
    return _linear(state, f"{name}.to_out.0", torch.cat(found, dim=-1))


def _linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _conv(state: State, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """3x3 with a border of zeros, or 1x1."""
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding=weight.shape[2] // 2)


def _group_norm(state: State, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _layer_norm(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
