"""Tensors of a control branch's file in diffusers' layout: every name and shape written out, with random or no values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """widths: channels of each level. depths: transformers of each level's attentions, and of the middle's; no attention at all
    where context is None."""

    widths: Sequence[int]
    resnets: Sequence[int]
    depths: Sequence[int]
    depth_middle: int
    context: int | None
    pooled: int | None = None
    is_linear: bool = False
    has_attention_points: bool = False


BRUSHNET_SD15 = Layout(widths=(320, 640, 1280, 1280), resnets=(2,) * 4, depths=(0,) * 4, depth_middle=0, context=None)
BRUSHNET_SDXL = Layout(
    widths=(320, 640, 1280), resnets=(2,) * 3, depths=(0,) * 3, depth_middle=0, context=None, pooled=2816
)
POWERPAINT = Layout(widths=(320, 640, 1280, 1280), resnets=(2,) * 4, depths=(1, 1, 1, 0), depth_middle=1, context=768)
PAINTERNET_SD15 = replace(POWERPAINT, has_attention_points=True)
PAINTERNET_SDXL = Layout(
    widths=(320, 640, 1280),
    resnets=(2,) * 3,
    depths=(0, 2, 10),
    depth_middle=10,
    context=2048,
    pooled=2816,
    is_linear=True,
    has_attention_points=True,
)


def shapes(layout: Layout) -> Shapes:
    """Name and shape of each tensor."""
    first, embedding = layout.widths[0], 4 * layout.widths[0]
    yield from _affine("conv_in_condition", first, 9, 3, 3)
    yield from _affine("time_embedding.linear_1", embedding, first)
    yield from _affine("time_embedding.linear_2", embedding, embedding)
    if layout.pooled is not None:
        yield from _affine("add_embedding.linear_1", embedding, layout.pooled)
        yield from _affine("add_embedding.linear_2", embedding, embedding)
    skips, points, attentions = [first], [first], []
    width = first
    for level, wide in enumerate(layout.widths):
        for index in range(layout.resnets[level]):
            yield from _resnet(f"down_blocks.{level}.resnets.{index}", width, wide, embedding)
            width = wide
            if layout.depths[level]:
                name = f"down_blocks.{level}.attentions.{index}"
                yield from _attention(name, width, layout.depths[level], layout)
                attentions += [width] * layout.depths[level]
            skips.append(width)
            points.append(width)
        if level < len(layout.widths) - 1:
            yield from _affine(f"down_blocks.{level}.downsamplers.0.conv", width, width, 3, 3)
            skips.append(width)
            points.append(width)
    for index, wide in enumerate(points):
        yield from _affine(f"brushnet_down_blocks.{index}", wide, wide, 1, 1)
    yield from _resnet("mid_block.resnets.0", width, width, embedding)
    if layout.depth_middle:
        yield from _attention("mid_block.attentions.0", width, layout.depth_middle, layout)
        attentions += [width] * layout.depth_middle
    yield from _resnet("mid_block.resnets.1", width, width, embedding)
    yield from _affine("brushnet_mid_block", width, width, 1, 1)
    points = []
    for level, wide in enumerate(reversed(layout.widths)):
        depth = layout.depths[len(layout.widths) - 1 - level]
        count = layout.resnets[len(layout.widths) - 1 - level] + 1
        for index in range(count):
            yield from _resnet(f"up_blocks.{level}.resnets.{index}", width + skips.pop(), wide, embedding)
            width = wide
            if depth:
                yield from _attention(f"up_blocks.{level}.attentions.{index}", width, depth, layout)
                attentions += [width] * depth
            points.append(width)
        if level < len(layout.widths) - 1:
            yield from _affine(f"up_blocks.{level}.upsamplers.0.conv", width, width, 3, 3)
            points.append(width)
    for index, wide in enumerate(points):
        yield from _affine(f"brushnet_up_blocks.{index}", wide, wide, 1, 1)
    if layout.has_attention_points:
        for index, wide in enumerate(attentions):
            yield from _affine(f"painternet_attention_points.{index}", wide, wide)


def _affine(name: str, out: int, *rest: int) -> Shapes:
    yield f"{name}.weight", (out, *rest)
    yield f"{name}.bias", (out,)


def _resnet(name: str, given: int, made: int, embedding: int) -> Shapes:
    yield from _affine(f"{name}.norm1", given)
    yield from _affine(f"{name}.conv1", made, given, 3, 3)
    yield from _affine(f"{name}.time_emb_proj", made, embedding)
    yield from _affine(f"{name}.norm2", made)
    yield from _affine(f"{name}.conv2", made, made, 3, 3)
    if given != made:
        yield from _affine(f"{name}.conv_shortcut", made, given, 1, 1)


def _attention(name: str, width: int, depth: int, layout: Layout) -> Shapes:
    assert layout.context is not None
    kernel = () if layout.is_linear else (1, 1)
    yield from _affine(f"{name}.norm", width)
    yield from _affine(f"{name}.proj_in", width, width, *kernel)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _affine(f"{block}.{norm}", width)
        for kind, read in (("attn1", width), ("attn2", layout.context)):
            yield f"{block}.{kind}.to_q.weight", (width, width)
            yield f"{block}.{kind}.to_k.weight", (width, read)
            yield f"{block}.{kind}.to_v.weight", (width, read)
            yield from _affine(f"{block}.{kind}.to_out.0", width, width)
        yield from _affine(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _affine(f"{block}.ff.net.2", width, 4 * width)
    yield from _affine(f"{name}.proj_out", width, width, *kernel)


def without_values(layout: Layout) -> dict[str, torch.Tensor]:
    """Tensors that only have a shape."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes(layout)}


def random_branch(layout: Layout, seed: int) -> dict[str, torch.Tensor]:
    """Random values of sizes that keep a pass through it in range, float32."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(layout):
        values = torch.randn(shape, generator=generator)
        if name.endswith(".weight") and len(shape) > 1:
            fan_in = torch.tensor(shape[1:]).prod().sqrt()
            gain = 1.3 if ".to_q." in name or ".to_k." in name else 1.0
            found[name] = gain * values / fan_in
        else:
            found[name] = 0.1 * values + (".norm" in name and name.endswith(".weight"))
    return found


_SMALL_SD15 = replace(PAINTERNET_SD15, widths=(32, 64, 128, 128), context=24)
SMALL = {
    "sd15": _SMALL_SD15,
    "sd2": replace(_SMALL_SD15, context=32, is_linear=True),
    "sdxl": replace(PAINTERNET_SDXL, widths=(32, 64, 128), depths=(0, 2, 3), depth_middle=3, context=40),
}
"""For `small_models`."""


def without_attention(layout: Layout) -> Layout:
    """BrushNet's of the same family."""
    return replace(layout, depths=(0,) * len(layout.depths), depth_middle=0, context=None, has_attention_points=False)


def small_heads(family: str, channels: int) -> int:
    """Of `small_models`."""
    return 4 if family == "sd15" else channels // 16


def of_checkpoint(layout: Layout, resnets: int) -> Layout:
    """The layout's family with the few and narrow levels of `random_checkpoints`."""
    return replace(layout, widths=(320,) * len(layout.widths), resnets=(resnets,) * len(layout.widths))


def in_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the published files are."""
    return {name: tensor.half() for name, tensor in state.items()}
