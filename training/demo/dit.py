"""The demo model as a diffusion transformer (DiT): a flow, learned on the same latents and captions as the 4-channel UNet.

The text encoder is the one that ships, and stays as it is. Here, too, a linear layer names what lies in every cell
(`text2image`), from the picture's tokens in the middle of the network.

It first learns what words mean on coarse pictures, at a quarter of the time for a step: latents averaged over 2x2 cells, at the
places that these have in the whole, and no padding behind the captions.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.ops
import numpy as np
import torch
import torch.nn.functional as F
from comfy.ldm.flux.model import Flux
from torch import nn

from ...model_patches.core.autograd import saving_copies
from ...weights.demo_dit import network_config
from ..diffusion import flow_loss
from ..loop import Batch
from .latents import GRID, Latents
from .networks import TextEncoder, attention_options, initialise
from .text2image import LABEL_CLASSES, LABEL_WEIGHT, CaptionedTask, cell_labels, label_loss
from .vocabulary import Vocabulary

# The single block whose output the labels are read off, of six.
_READ = 1
COARSE_STEPS = 2_500
_COARSE = 2
_ZERO_AT_START = ("img_mod.lin", "txt_mod.lin", "modulation.lin", "final_layer.linear", "adaLN_modulation.1")


def new_dit(seed: int) -> Flux:
    """The host's network with fresh weights, in float32 on the CPU: every block passes its input on."""
    network = Flux(**network_config(), operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu")
    initialise(network, seed)
    for name, child in network.named_modules():
        if isinstance(child, nn.Linear) and name.endswith(_ZERO_AT_START):
            nn.init.zeros_(child.weight)
            nn.init.zeros_(child.bias)
    return network.requires_grad_(True)


def predict_flow(
    network: Flux, x: torch.Tensor, levels: torch.Tensor, context: torch.Tensor, coarse: int = 1
) -> torch.Tensor:
    """The network's flow [B, 4, H, W] for noisy latents, noise levels [B] and context [B, N, 192].

    A cell of the latents stands for so many each way as `coarse` says. It may be differentiated, though the host's blocks write
    into what autograd has saved, and its rotations have no derivative otherwise.
    """
    shift = (coarse - 1) / 2
    places = {"rope_options": {"scale_x": coarse, "scale_y": coarse, "shift_x": shift, "shift_y": shift}}
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        with saving_copies(network, on_cpu=False):
            return network(x, levels, context, transformer_options={**attention_options(x.device), **places})
    finally:
        comfy.model_management.in_training = before


class DitTask(CaptionedTask):
    """Trains the transformer on complete captions, with a text encoder that stays as it is."""

    name = "dit"

    def __init__(self, latents: Latents, dev: Latents, vocabulary: Vocabulary, text: TextEncoder, seed: int) -> None:
        super().__init__(latents, dev, vocabulary)
        self.network, self._text = new_dit(seed), text.requires_grad_(False)
        config = network_config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self._labels = nn.Linear(config["hidden_size"], sum(LABEL_CLASSES))
        self.network.single_blocks[_READ].register_forward_hook(self._keep_features)
        self.networks = nn.ModuleDict({"network": self.network, "labels": self._labels})

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._text.to(device)

    def matrices(self) -> list[torch.Tensor]:
        blocks = nn.ModuleList([*self.network.double_blocks, *self.network.single_blocks])
        return [weight for name, weight in blocks.named_parameters() if weight.ndim == 2 and "mod" not in name]

    def _keep_features(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        # The next block writes into it.
        self._features = output.clone()

    def _conditions(self, latents: Latents, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        return {"labels": cell_labels(indices, "dev" if latents is self._dev else "train")}

    def batch(self, seed: int, step: int, size: int) -> Batch:
        batch = super().batch(seed, step, size)
        if step < COARSE_STEPS:
            batch["latents"] = F.avg_pool2d(batch["latents"], _COARSE)
            batch["labels"] = batch["labels"][..., ::_COARSE, ::_COARSE]
        return batch

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        coarse = GRID // batch["latents"].shape[-1]
        rows = batch["rows"]
        context: Any = self._text(rows)
        if coarse > 1:
            ends = rows == rows[:, -1:]
            context = context[:, : int((~ends).sum(dim=1).max()) + 1]
        flow = flow_loss(
            lambda x, levels: predict_flow(self.network, x, levels, context, coarse), batch["latents"], generator
        )
        side = GRID // (coarse * network_config()["patch_size"])
        picture = self._labels(self._features[:, -side * side :]).transpose(1, 2).unflatten(2, (side, side))
        labels = label_loss(picture, batch["labels"])
        return {"loss": flow + LABEL_WEIGHT * labels, "noise": flow, "labels": labels}
