"""Files of control branches in diffusers' layout: BrushNet for SD1.5 and SDXL, PowerPaint 2.1's, and PainterNet's.

All have `conv_in_condition` with 9 input channels (noisy latent, masked picture's latent, 1 = keep), the UNet's names behind it,
without an output layer, and a 1x1 convolution for each layer point: `brushnet_down_blocks.N`, `brushnet_mid_block`,
`brushnet_up_blocks.N`. BrushNet's have no attention. PainterNet was never released, so that its layout is ours: PowerPaint's
names, and a linear layer for each cross-attention besides, `painternet_attention_points.N`, in the order of a forward pass. A
matrix in 8 bits has its scale beside it, `NAME.scale_weight`. Where heads of attentions are not as wide as in Stable Diffusion,
the file's metadata say how wide, `head_channels`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .files import read_tensors

BRUSHNET = "https://huggingface.co/Kijai/BrushNet-fp16"
POWERPAINT = "https://huggingface.co/JunhaoZhuang/PowerPaint-v2-1"
CHANNELS = 9
"""Of a branch's input."""
DEMO_FILE = "truefill_demo_branch.safetensors"
"""The demo model's branch."""
HEAD_CHANNELS = "head_channels"
ATTENTION_POINT = "painternet_attention_points"
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_EMBEDDINGS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
# What another file holds, and what to say of it.
_OTHERS = (
    (re.compile(r"(control_model\.)?(input_hint_block|zero_convs)\..*|controlnet_.*"), "a ControlNet"),
    (re.compile(r".*\.lora_(up|down|A|B)\..*"), "a LoRA"),
    (re.compile(r"model\.diffusion_model\..*"), "a checkpoint"),
    (re.compile(r"(conv_in|conv_out|input_blocks\.0\.0)\.weight"), "a UNet"),
    (re.compile(r"head"), "Fooocus' inpaint head"),
)


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """What a branch's UNet is like. Depths are of transformers, for each resnet in the order of a forward pass.

    heads: of each attention; None where `head_channels` says how wide one is.
    pooled: channels of SDXL's pooled text and sizes; None for SD1.5 and SD2.
    """

    channels: int
    levels: tuple[int, ...]
    resnets: tuple[int, ...]
    depth_down: tuple[int, ...]
    depth_middle: int
    depth_up: tuple[int, ...]
    context: int | None
    pooled: int | None
    is_linear: bool
    heads: int | None
    head_channels: int | None

    @property
    def has_attention(self) -> bool:
        """Whether it reads a prompt."""
        return self.context is not None

    @property
    def unet_config(self) -> dict[str, Any]:
        """Arguments of the host's UNetModel."""
        return {
            "image_size": 32,
            "in_channels": CHANNELS,
            "out_channels": 4,
            "model_channels": self.channels,
            "channel_mult": self.levels,
            "num_res_blocks": list(self.resnets),
            "transformer_depth": list(self.depth_down),
            "transformer_depth_middle": self.depth_middle,
            # The host takes them from the end.
            "transformer_depth_output": list(reversed(self.depth_up)),
            "num_heads": self.heads or -1,
            "num_head_channels": self.head_channels or -1,
            "context_dim": self.context,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": self.is_linear,
            "legacy": False,
            "num_classes": None if self.pooled is None else "sequential",
            "adm_in_channels": self.pooled,
        }

    def modules(self) -> Iterator[tuple[str, str]]:
        """The modules of the file and of the host's UNet, in pairs of names."""
        yield "conv_in_condition", "input_blocks.0.0"
        yield from _EMBEDDINGS.items()
        number, resnet = 1, 0
        for level, count in enumerate(self.resnets):
            for index in range(count):
                yield from _resnet(f"down_blocks.{level}.resnets.{index}", f"input_blocks.{number}.0")
                if self.depth_down[resnet]:
                    yield f"down_blocks.{level}.attentions.{index}", f"input_blocks.{number}.1"
                number, resnet = number + 1, resnet + 1
            if level < len(self.resnets) - 1:
                yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
                number += 1
        for index in range(2):
            yield from _resnet(f"mid_block.resnets.{index}", f"middle_block.{2 * index}")
        if self.depth_middle:
            yield "mid_block.attentions.0", "middle_block.1"
        number = 0
        for level, count in enumerate(reversed(self.resnets)):
            for index in range(count + 1):
                yield from _resnet(f"up_blocks.{level}.resnets.{index}", f"output_blocks.{number}.0")
                depth = self.depth_up[number]
                if depth:
                    yield f"up_blocks.{level}.attentions.{index}", f"output_blocks.{number}.1"
                if index == count and level < len(self.resnets) - 1:
                    yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.{2 if depth else 1}.conv"
                number += 1

    def layer_points(self) -> list[str]:
        """The file's names of the layer points, in the order of a forward pass."""
        levels = len(self.resnets)
        down, up = 1 + sum(self.resnets) + levels - 1, sum(self.resnets) + levels + levels - 1
        return [
            *(f"brushnet_down_blocks.{index}" for index in range(down)),
            "brushnet_mid_block",
            *(f"brushnet_up_blocks.{index}" for index in range(up)),
        ]


def _resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for name, host in _RESNET.items():
        yield f"{theirs}.{name}", f"{ours}.{host}"


@dataclass(frozen=True, eq=False, kw_only=True)
class BranchWeights:
    """What a file holds.

    unet: the tensors by the names of the host's UNet.
    layer_points, attention_points: weight and bias of each, in the order of a forward pass; a file without attention control
        points has none.
    """

    name: str
    plan: BranchPlan
    unet: Mapping[str, torch.Tensor]
    layer_points: Sequence[Mapping[str, torch.Tensor]]
    attention_points: Sequence[Mapping[str, torch.Tensor]]

    @property
    def kind(self) -> str:
        """Whose it is: "PainterNet", "PowerPaint" or "BrushNet"."""
        return "PainterNet" if self.attention_points else "PowerPaint" if self.plan.has_attention else "BrushNet"


def read_branch(path: str | Path) -> BranchWeights:
    """The branch in a file. Raises ValueError, one sentence, for one that can't be read or is of another kind.

    Nothing in a file is executed.
    """
    path = Path(path)
    state = read_tensors(path, f"one from {BRUSHNET} or {POWERPAINT}")
    metadata = {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    head_channels = metadata.get(HEAD_CHANNELS, "")
    return branch_weights(state, path.name, int(head_channels) if head_channels.isdecimal() else None)


def branch_weights(state: Mapping[str, torch.Tensor], name: str, head_channels: int | None = None) -> BranchWeights:
    """The branch of a file's tensors; `head_channels` where they are not those of Stable Diffusion.

    Raises ValueError that begins with the file's `name`.
    """
    first = state.get("conv_in_condition.weight")
    if first is None or first.dim() != 4 or first.shape[1] != CHANNELS:
        what = next((what for pattern, what in _OTHERS if any(pattern.fullmatch(key) for key in state)), None)
        if first is not None:
            what = f"a branch with {first.shape[1]} input channels instead of {CHANNELS}"
        raise ValueError(
            f"{name} is {what or 'no control branch'}, but BrushNet's, PowerPaint 2.1's or PainterNet's weights are needed: "
            f"{BRUSHNET} or {POWERPAINT}."
        )
    state = _in_full(state)
    plan = _plan(state, head_channels)
    unet: dict[str, torch.Tensor] = {}
    points = plan.layer_points()
    taken = set()
    for theirs, ours in plan.modules():
        for key in [key for key in state if key.startswith(f"{theirs}.")]:
            unet[ours + key.removeprefix(theirs)] = state[key]
            taken.add(key)

    def point(module: str) -> dict[str, torch.Tensor]:
        found = {part: state.get(f"{module}.{part}") for part in ("weight", "bias")}
        taken.update(f"{module}.{part}" for part in found)
        return {part: tensor for part, tensor in found.items() if tensor is not None}

    layers = [point(of) for of in points]
    count = len({key.split(".")[1] for key in state if key.startswith(f"{ATTENTION_POINT}.")})
    attentions = [point(f"{ATTENTION_POINT}.{index}") for index in range(count)]
    wrong = [f"{of} is missing" for of, found in zip(points, layers, strict=True) if len(found) < 2]
    wrong += [f"{ATTENTION_POINT}.{index} is incomplete" for index, found in enumerate(attentions) if len(found) < 2]
    wrong += [f"{key} is unknown" for key in sorted(state.keys() - taken)]
    if wrong:
        raise ValueError(
            f"{name} is an incomplete or changed branch ({wrong[0]}): download it again from {BRUSHNET} or {POWERPAINT}."
        )
    return BranchWeights(name=name, plan=plan, unet=unet, layer_points=layers, attention_points=attentions)


def branch_state(weights: BranchWeights) -> dict[str, torch.Tensor]:
    """A branch by the names of its file, the opposite of `branch_weights`."""
    found = {}
    for theirs, ours in weights.plan.modules():
        found |= {
            theirs + key.removeprefix(ours): tensor
            for key, tensor in weights.unet.items()
            if key.startswith(f"{ours}.")
        }
    for module, point in zip(weights.plan.layer_points(), weights.layer_points, strict=True):
        found |= {f"{module}.{part}": tensor for part, tensor in point.items()}
    for index, point in enumerate(weights.attention_points):
        found |= {f"{ATTENTION_POINT}.{index}.{part}": tensor for part, tensor in point.items()}
    return found


def in_eight_bits(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors with their matrices in 8 bits, each with its scale beside it; all else in half precision."""
    found = {}
    largest = torch.finfo(torch.float8_e4m3fn).max
    for key, tensor in state.items():
        if tensor.dim() < 2:
            found[key] = tensor.half().contiguous()
            continue
        scale = tensor.float().abs().max().clamp(min=1e-12) / largest
        found[key] = (tensor.float() / scale).to(torch.float8_e4m3fn).contiguous()
        found[f"{key.removesuffix('.weight')}.scale_weight"] = scale
    return found


def _in_full(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of 8 bits times their scales, in half precision."""
    found = {}
    for key, tensor in state.items():
        if key.endswith(".scale_weight"):
            continue
        if tensor.dtype.itemsize == 1:
            scale = state.get(f"{key.removesuffix('.weight')}.scale_weight")
            tensor = (tensor.float() if scale is None else tensor.float() * scale.float()).half()
        found[key] = tensor
    return found


def _plan(state: Mapping[str, torch.Tensor], head_channels: int | None) -> BranchPlan:
    def count(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({match[1] for key in state if (match := pattern.match(key))})

    levels = count("down_blocks.")
    resnets = tuple(count(f"down_blocks.{level}.resnets.") for level in range(levels))
    channels = state["conv_in_condition.weight"].shape[0]
    ends = (state.get(f"down_blocks.{level}.resnets.0.conv2.weight") for level in range(levels))
    down = [
        count(f"down_blocks.{level}.attentions.{index}.transformer_blocks.")
        for level in range(levels)
        for index in range(resnets[level])
    ]
    up = [
        count(f"up_blocks.{level}.attentions.{index}.transformer_blocks.")
        for level, of in enumerate(reversed(resnets))
        for index in range(of + 1)
    ]
    context = next((of.shape[1] for key, of in state.items() if key.endswith(".attn2.to_k.weight")), None)
    embedding = state.get("add_embedding.linear_1.weight")
    first = next((of for key, of in state.items() if key.endswith(".proj_in.weight")), None)
    # SD1.5 has 8 heads in every attention, the later families heads of 64 channels.
    is_first_family = head_channels is None and (context or 768) == 768 and embedding is None
    return BranchPlan(
        channels=channels,
        levels=tuple((channels if of is None else of.shape[0]) // channels for of in ends),
        resnets=resnets,
        depth_down=tuple(down),
        depth_middle=count("mid_block.attentions.0.transformer_blocks."),
        depth_up=tuple(up),
        context=context,
        pooled=None if embedding is None else embedding.shape[1],
        is_linear=first is not None and first.dim() == 2,
        heads=8 if is_first_family else None,
        head_channels=None if is_first_family else head_channels or 64,
    )
