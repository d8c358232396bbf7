"""Trains a control branch beside a text-to-image UNet that stays as it is: PainterNet's stage, and its ablations.

Both read the local prompt. The branch begins as an inpainting UNet, as one may begin with PowerPaint's; its zero convolutions
begin at zero. The hole counts more than what is known, of which there is more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ops
import numpy as np
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ...model_patches.core.unet_attention import transformer_places
from ...model_patches.painternet.network import BranchNetwork, injected
from ...weights.demo_model import CONTEXT_DIM, unet_config
from ...weights.painternet import BranchPlan
from ..demo.networks import TextEncoder, attention_options
from ..demo.vocabulary import Vocabulary
from ..diffusion import noise_loss
from ..loop import Batch, Task, step_seed
from .attention_loss import actual_token_attention_loss
from .regions import Encoded

EMPTY_PROMPT_SHARE = 0.1
HOLE_WEIGHT = 4.0
ATTENTION_LOSS_WEIGHT = 1e-4
"""The paper's is 1e-5. The loss is a sum over cells, and this UNet's grids have a tenth of the cells that SD1.5's have."""


@dataclass(frozen=True)
class Kind:
    """What of PainterNet is trained; all of it, or what its ablation leaves."""

    attention_points: bool = True
    attention_loss: bool = True


KINDS = {
    "branch": Kind(),
    "branch-without-loss": Kind(attention_loss=False),
    "branch-of-layers": Kind(attention_points=False, attention_loss=False),
}
"""By the stage's name."""


def demo_plan() -> BranchPlan:
    """The demo model's branch."""
    config = unet_config(9)
    return BranchPlan(
        channels=config["model_channels"],
        levels=config["channel_mult"],
        resnets=tuple(config["num_res_blocks"]),
        depth_down=tuple(config["transformer_depth"]),
        depth_middle=config["transformer_depth_middle"],
        depth_up=tuple(reversed(config["transformer_depth_output"])),
        context=CONTEXT_DIM,
        pooled=None,
        is_linear=config["use_linear_in_transformer"],
        heads=None,
        head_channels=config["num_head_channels"],
    )


def new_branch(inpainting: UNetModel, attention_points: bool) -> BranchNetwork:
    """A branch that begins as the demo model's inpainting UNet, in float32 on the CPU."""
    network = BranchNetwork(demo_plan(), attention_points, comfy.ops.disable_weight_init, dtype=torch.float32)
    state = dict(inpainting.state_dict())
    first, bias = "input_blocks.0.0.weight", "input_blocks.0.0.bias"
    # Its inputs are the noisy latent, 1 = hole, and the masked picture; a branch's end with 1 = keep.
    noisy, hole, masked = state[first].split((4, 1, 4), dim=1)
    state[first] = torch.cat([noisy, masked, -hole], dim=1)
    state[bias] = state[bias] + hole.sum(dim=(1, 2, 3))
    network.unet.load_state_dict({name: of for name, of in state.items() if not name.startswith("out.")})
    for point in network.points:
        for weight in point.parameters():
            nn.init.zeros_(weight)
    return network.requires_grad_(True)


class BranchTask(Task):
    """Trains a branch beside `base`, which has 4 input channels."""

    def __init__(
        self,
        name: str,
        train: Encoded,
        dev: Encoded,
        base: UNetModel,
        branch: BranchNetwork,
        text: TextEncoder,
        vocabulary: Vocabulary,
    ) -> None:
        self.name, self._kind = name, KINDS[name]
        self._train, self._dev = train, dev
        self.base, self.branch = base.requires_grad_(False), branch
        self.networks = nn.ModuleDict({"branch": branch})
        # Few prompts differ, and the text encoder stays as it is.
        prompts = sorted({"", *train.prompt.tolist(), *dev.prompt.tolist()})
        self._places = {prompt: place for place, prompt in enumerate(prompts)}
        rows = vocabulary.batch(prompts, unknown=True)
        with torch.no_grad():
            self._contexts = torch.cat([text(row[None]) for row in rows])
        end = rows[:, -1:]
        actual = (rows != end).cumprod(dim=1).bool()
        actual[:, 0] = False
        self._tokens = actual

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.base.to(device)

    def _batch(self, of: Encoded, indices: np.ndarray, is_empty: np.ndarray) -> Batch:
        chosen = torch.from_numpy(indices)
        prompts = ["" if drop else of.prompt[index] for index, drop in zip(indices, is_empty, strict=True)]
        places = [self._places[prompt] for prompt in prompts]
        hole = of.hole[chosen].float()
        return {
            "latents": of.clean[chosen].float(),
            "hole": hole,
            "known": torch.cat([of.masked[chosen].float(), 1.0 - hole], dim=1),
            "context": self._contexts[places],
            "tokens": self._tokens[places],
        }

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        indices = rng.integers(len(self._train.clean), size=size)
        return self._batch(self._train, indices, rng.random(size) < EMPTY_PROMPT_SHARE)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        maps: list[torch.Tensor] = []

        def predict(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            own = attention_options(x.device)
            if self._kind.attention_loss:
                own = reading_maps(self.branch, maps)
            features = self.branch(torch.cat([x, batch["known"]], dim=1), times, batch["context"], options=own)
            options = attention_options(x.device)
            with injected(self.base, features, 1.0, 1.0, options):
                predicted: torch.Tensor = self.base(x, times, batch["context"], transformer_options=options)
            return predicted

        weight = 1.0 + (HOLE_WEIGHT - 1.0) * batch["hole"]
        noise = noise_loss(predict, batch["latents"], generator, weight)
        found = {"loss": noise, "noise": noise}
        if self._kind.attention_loss:
            attention = actual_token_attention_loss(maps, batch["tokens"], batch["hole"])
            found |= {"loss": noise + ATTENTION_LOSS_WEIGHT * attention, "attention": attention}
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The error of the noise over the regions of the development split."""
        device = next(self.networks.parameters()).device
        indices = np.arange(len(self._dev.clean))
        whole = self._batch(self._dev, indices, np.zeros(len(indices), dtype=bool))
        generator = torch.Generator().manual_seed(0)
        losses = []
        for first in range(0, len(indices), 32):
            part = {name: tensor[first : first + 32].to(device) for name, tensor in whole.items()}
            losses.append(float(self.losses(part, generator)["noise"]))
        return {"dev_loss": float(np.mean(losses))}


def reading_maps(branch: BranchNetwork, maps: list[torch.Tensor]) -> dict[str, Any]:
    """Options for a call of a branch whose cross-attentions put their maps [B, heads, cells, tokens] into `maps`."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any], **_: Any) -> torch.Tensor:
        q, k, v = (of.unflatten(-1, (extra["n_heads"], -1)).transpose(1, 2) for of in (q, k, v))
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)
        maps.append(attention)
        return (attention.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    replace: dict[Any, Callable[..., torch.Tensor]] = {t.place: attend for t in transformer_places(branch.unet)}
    device = next(branch.parameters()).device
    return {**attention_options(device), "patches_replace": {"attn2": replace}}
