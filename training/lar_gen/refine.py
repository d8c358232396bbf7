"""LAR-Gen's second stage: a reference network learns what of a subject's picture the main UNet's self-attentions want to read.

Its cross-attentions, which read CLIP's states of the subject in the place of text, and the linear layer before these are trained;
all else of it is the text-to-image UNet, and the main UNet stays as the first stage left it, at beta = 0.3.
"""

from __future__ import annotations

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ...model_patches.core.unet_attention import Place, transformer_places
from ...model_patches.lar_gen.reference import decoder_inputs
from ...weights.demo_model import CONTEXT_DIM
from ...weights.demo_subject import VISION_CONFIG
from ..demo.networks import attention_options, initialise
from ..diffusion import signal_shares
from ..loop import Batch
from .assign import Data, SubjectTask, SubjectUNet, place_name

BETA = 0.3


class RefineTask(SubjectTask):
    """Trains the cross-attentions of `branch` (4 input channels) and the detail projection; `main` is the first stage's."""

    name = "subject-refine"

    def __init__(self, data: Data, main: SubjectUNet, branch: UNetModel, seed: int) -> None:
        super().__init__(data)
        self._main, self._branch = main.requires_grad_(False), branch.requires_grad_(False)
        self._detail = nn.Linear(VISION_CONFIG["hidden_size"], CONTEXT_DIM)
        initialise(self._detail, seed)
        # A pass ends at the last block's self-attention.
        reached = transformer_places(branch)[:-1]
        cross = {place_name(t.place): t.cross.requires_grad_(True) for t in reached}
        self.networks = nn.ModuleDict({"cross": nn.ModuleDict(cross), "detail": self._detail})

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._main.to(device)
        self._branch.to(device)

    def features(self, noisy: torch.Tensor, times: torch.Tensor, details: torch.Tensor) -> dict[Place, torch.Tensor]:
        """What the branch stores for the subjects' noised latents [B, 4, h, w] and CLIP's last states of them."""
        context = self._detail(details)
        return decoder_inputs(self._branch, noisy, times, context, None, attention_options(noisy.device))

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        noise = torch.randn(batch["subject"].shape, generator=generator).to(batch["subject"])
        with torch.no_grad():
            tokens = self._main.resampler(batch["own"])

        def predict(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            share = signal_shares(times.device)[times][:, None, None, None]
            noisy = share.sqrt() * batch["subject"] + (1 - share).sqrt() * noise
            stored = self.features(noisy, times, batch["details"])
            return self._main(torch.cat([x, batch["known"]], dim=1), times, batch["context"], tokens, BETA, stored)

        error = self._noise_loss(batch, generator, predict)
        return {"loss": error, "noise": error}
