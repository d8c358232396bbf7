"""Low-rank adapters of a UNet's attention projections: how they act in training, and how a file has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import CrossAttention
from torch import nn


class LowRank(nn.Module):
    """up(down(x)) alpha / rank, added to what a linear layer makes. `up` begins at 0, so that a fresh one changes nothing."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.alpha, self.rank = alpha, rank
        # The release's: normally distributed, 1 / rank.
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator) / rank)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up) * (self.alpha / self.rank)
        return made.to(x.dtype)


def attention_projections(unet: nn.Module, outputs: bool) -> dict[str, nn.Module]:
    """The linear layers that are adapted, by their names: to_k and to_v of every attention, with `outputs` to_out.0 as well."""
    found: dict[str, nn.Module] = {}
    for name, module in unet.named_modules():
        if isinstance(module, CrossAttention):
            found[f"{name}.to_k"], found[f"{name}.to_v"] = module.to_k, module.to_v
            if outputs:
                found[f"{name}.to_out.0"] = module.to_out[0]
    return found


def fresh_adapters(unet: nn.Module, rank: int, outputs: bool, seed: int) -> dict[str, LowRank]:
    """Adapters for a UNet, by the names of its layers; alpha is the rank, as in the release."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in attention_projections(unet, outputs).items():
        size: Any = layer.weight
        made[name] = LowRank(size.shape[1], size.shape[0], rank, float(rank), generator)
    return made


@contextmanager
def attached(unet: nn.Module, adapters: Mapping[str, LowRank]) -> Iterator[None]:
    """Within it the UNet's layers make what they make with their adapters; afterwards nothing of it is left."""
    layers = dict(unet.named_modules())
    with ExitStack() as hooks:
        for name, adapter in adapters.items():

            def add(
                _: nn.Module, given: tuple[Any, ...], made: torch.Tensor, adapter: LowRank = adapter
            ) -> torch.Tensor:
                return made + adapter(given[0])

            handle = layers[name].register_forward_hook(add)
            hooks.callback(handle.remove)
        yield


def as_file(adapters: Mapping[str, LowRank], unet_config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file, under the names of diffusers' layers where these have one, else under the host's own.

    Every LoRA loader of the host knows both, other programs the first.
    """
    names = {own: theirs for theirs, own in comfy.utils.unet_to_diffusers(unet_config).items()}
    tensors = {}
    for name, adapter in adapters.items():
        key = "lora_unet_" + names.get(f"{name}.weight", name).removesuffix(".weight").replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = adapter.down.detach().cpu().contiguous()
        tensors[f"{key}.lora_up.weight"] = adapter.up.detach().cpu().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(adapter.alpha)
    return tensors
