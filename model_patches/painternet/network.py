"""A control branch's network, and how what it sees gets into the UNet beside it.

PainterNet, section 3.2. The branch is a UNet of 9 input channels. At each layer point i the UNet's layer gets
w Z_lay(branch's layer output) added to what it hands on, so that the next layer and the skip connection read it; at each
attention control point the cross-attention's input gets w Z_attn(branch's cross-attention output). The Zs begin at zero. The
points are BrushNet's: every layer of the encoder, the middle, and every layer of the decoder, before and after its upsampling;
and as in its code the first layer's skip connection goes without.

The UNet's queries read the attention control points, for keys and values come from the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, Upsample
from torch import nn

from ...weights.files import differing
from ...weights.painternet import BranchPlan, BranchWeights
from ..core.operations import in_memory
from ..core.refusals import refuse_copy
from ..core.unet_attention import Place, add_patch, transformer_places


@dataclass(frozen=True, eq=False)
class Features:
    """What a branch says of a call.

    layers: for each layer point, [rows, channels, h, w]. attentions: for each cross-attention, [rows, cells, channels].
    """

    layers: Sequence[torch.Tensor]
    attentions: Mapping[Place, torch.Tensor]


class BranchNetwork(nn.Module):
    """A branch: the UNet, and its zero convolutions."""

    def __init__(self, plan: BranchPlan, has_attention_points: bool, operations: Any, **factory: Any) -> None:
        """`factory` is the dtype and the device of the weights."""
        super().__init__()
        self.unet = UNetModel(**plan.unet_config, operations=operations, **factory)
        middle = self.unet.middle_block
        assert middle is not None
        if not plan.depth_middle:
            middle[1] = nn.Identity()
        # Nobody asks the branch for the noise.
        self.unet.out = nn.Sequential()
        widths = [width_of(layer) for layer in layer_points(self.unet)]
        self.layer_points = nn.ModuleList(operations.Conv2d(width, width, 1, **factory) for width in widths)
        self.attention_points = nn.ModuleList()
        if has_attention_points:
            widths = [t.cross.to_q.weight.shape[1] for t in transformer_places(self.unet)]
            self.attention_points.extend(operations.Linear(width, width, **factory) for width in widths)

    @property
    def reads_text(self) -> bool:
        """Whether it has cross-attentions."""
        return bool(transformer_places(self.unet))

    @property
    def reads_pooled(self) -> bool:
        """Whether it is told of SDXL's pooled text and sizes."""
        return self.unet.num_classes is not None

    @property
    def points(self) -> nn.ModuleList:
        """All zero convolutions."""
        return nn.ModuleList([*self.layer_points, *self.attention_points])

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None,
        y: torch.Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Features:
        """What it says of its input [rows, 9, h, w]; `options` are the host's for a call, of this UNet."""
        layers: list[torch.Tensor] = []
        attentions: dict[Place, torch.Tensor] = {}
        numbers = {t.place: number for number, t in enumerate(transformer_places(self.unet))}

        def read_attention(n: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
            place: Place = (*extra_options["block"], extra_options["block_index"])
            attentions[place] = self.attention_points[numbers[place]](n)
            return n

        def read_layer(layer: nn.Module, given: Any, output: torch.Tensor) -> None:
            layers.append(self.layer_points[len(layers)](output))

        own = dict(options or {})
        if self.attention_points:
            patches = dict(own.get("patches", {}))
            own["patches"] = {**patches, "attn2_output_patch": [*patches.get("attn2_output_patch", []), read_attention]}
        with ExitStack() as hooks:
            for layer in layer_points(self.unet):
                hooks.callback(layer.register_forward_hook(read_layer).remove)
            self.unet(x, timesteps, context, y, None, own)
        return Features(layers, attentions)


def width_of(layer: Any) -> int:
    """Output channels of a layer of a UNet."""
    width: int = layer.in_channels if isinstance(layer, SpatialTransformer) else layer.out_channels
    return width


def layer_points(unet: UNetModel) -> list[nn.Module]:
    """The layers of a UNet whose outputs are layer points, in the order of a forward pass."""
    found: list[nn.Module] = []
    middle = [unet.middle_block] if unet.middle_block is not None else []
    for block in (*unet.input_blocks, *middle, *unet.output_blocks):
        layers = list(block.children())
        if len(layers) > 1 and isinstance(layers[-1], Upsample):
            found.append(layers[-2])
        found.append(layers[-1])
    return found


@contextmanager
def injected(
    unet: UNetModel, features: Features, layer_scale: float, attention_scale: float, options: dict[str, Any]
) -> Iterator[None]:
    """Within it a call of `unet` with `options`, which gets patches, reads a branch's features."""
    if layer_scale:
        first, *rest = features.layers

        def add_first(h: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
            return h + layer_scale * first.to(h) if transformer_options["block"] == ("input", 0) else h

        # BrushNet's skip connection of the first layer goes without.
        add_patch(options, "input_block_patch_after_skip", add_first)
    else:
        rest = []
    if features.attentions and attention_scale:

        def add_attention(
            n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            place: Place = (*extra_options["block"], extra_options["block_index"])
            return n + attention_scale * features.attentions[place].to(n), context, value

        # Who reads the attention's input, as PAIntA does, shall read what the attention does.
        patches = options.get("patches", {})
        options["patches"] = {**patches, "attn2_patch": [add_attention, *patches.get("attn2_patch", [])]}
    with ExitStack() as hooks:
        for layer, feature in zip(layer_points(unet)[1:], rest, strict=bool(rest)):
            hooks.callback(layer.register_forward_hook(_adding(layer_scale, feature)).remove)
        yield


def _adding(scale: float, feature: torch.Tensor) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    return lambda layer, given, output: output + scale * feature.to(output)


def branch_model(weights: BranchWeights) -> comfy.model_patcher.ModelPatcher:
    """A file's branch as a model of the host, whose weights stay where they are between a forward and its backward pass.

    Raises ValueError for tensors that don't fit each other.
    """
    dtype = next(iter(weights.unet.values())).dtype
    offload = comfy.model_management.unet_offload_device()
    has_attention_points = bool(weights.attention_points)
    network = BranchNetwork(
        weights.plan, has_attention_points, in_memory(comfy.ops.manual_cast), dtype=dtype, device=offload
    )
    load_weights(network, weights)
    load = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(network.eval(), load_device=load, offload_device=offload)
    # What the host calls for a copy on another GPU.
    patcher.cached_patcher_init = (refuse_copy, ("Apply Branch",))
    return patcher


def network_state(weights: BranchWeights) -> dict[str, torch.Tensor]:
    """A file's tensors by the names of a `BranchNetwork`."""
    state = {f"unet.{name}": tensor for name, tensor in weights.unet.items()}
    for kind, points in (("layer_points", weights.layer_points), ("attention_points", weights.attention_points)):
        for number, point in enumerate(points):
            state |= {f"{kind}.{number}.{part}": tensor for part, tensor in point.items()}
    return state


def load_weights(network: BranchNetwork, weights: BranchWeights) -> None:
    """Fills a network. Raises ValueError, in one sentence, for tensors that are missing, too many or of other sizes."""
    state = network_state(weights)
    if wrong := differing(network.state_dict(), state):
        raise ValueError(
            f"{weights.name} is a {weights.kind} branch whose tensors don't fit each other ({wrong[0]}): it is incomplete or "
            "changed; download it again."
        )
    network.load_state_dict(state)


def weights_of(network: BranchNetwork, plan: BranchPlan, name: str) -> BranchWeights:
    """A network's weights, as its file has them."""
    state = network.state_dict()

    def point(kind: str, number: int) -> dict[str, torch.Tensor]:
        return {part: state[f"{kind}.{number}.{part}"] for part in ("weight", "bias")}

    return BranchWeights(
        name=name,
        plan=plan,
        unet={key.removeprefix("unet."): tensor for key, tensor in state.items() if key.startswith("unet.")},
        layer_points=[point("layer_points", number) for number in range(len(network.layer_points))],
        attention_points=[point("attention_points", number) for number in range(len(network.attention_points))],
    )
