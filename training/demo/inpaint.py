"""Stage 3: the 9-channel UNet, from the 4-channel one, trained as Stable Inpainting was.

Masks know nothing of the objects, captions are those of the whole picture and leave things out, one in ten is empty, and every
fourth hole is the whole picture. So the model may often fill a hole from what lies around it, whatever the caption says: that
is where prompt neglect comes from. The text encoder stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..diffusion import noise_loss
from ..loop import Batch
from ..world.holes import EVERYTHING_SHARE
from .latents import Latents
from .networks import TextEncoder, inpainting_unet, predict_noise
from .text2image import CaptionedTask
from .vocabulary import Vocabulary


class InpaintTask(CaptionedTask):
    """Trains the 9-channel UNet; `unet` and `text` are state dicts from the text-to-image stage."""

    name = "inpaint"
    omission = 0.3

    def __init__(
        self,
        latents: Latents,
        dev: Latents,
        vocabulary: Vocabulary,
        unet: Mapping[str, torch.Tensor],
        text: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(latents, dev, vocabulary)
        self.unet = inpainting_unet(unet)
        self._text = TextEncoder(vocabulary, seed=0)
        self._text.load_state_dict(dict(text))
        self._text.requires_grad_(False)
        self.networks = nn.ModuleDict({"unet": self.unet})

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._text.to(device)

    def _conditions(self, latents: Latents, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        assert latents.masked is not None and latents.hole is not None and latents.blank is not None
        chosen = torch.from_numpy(indices)
        masked, hole = latents.masked[chosen].float(), latents.hole[chosen].float()
        everything = torch.from_numpy(rng.random(len(indices)) < EVERYTHING_SHARE)[:, None, None, None]
        masked = torch.where(everything, latents.blank.float(), masked)
        # The host's order: mask, then masked picture.
        return {"known": torch.cat([torch.where(everything, 1.0, hole), masked], dim=1)}

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        context = self._text(batch["rows"])

        def predict(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            return predict_noise(self.unet, torch.cat([x, batch["known"]], dim=1), times, context)

        noise = noise_loss(predict, batch["latents"], generator)
        return {"loss": noise, "noise": noise}
