"""Stage 2: the 4-channel UNet and the text encoder, together.

The text encoder is trained along: a frozen random one would hand every adjective to every noun alike, and the words of a
caption that belong together are what this world is about. It costs little, for only the world's words have embeddings.
One caption in ten is empty, for classifier-free guidance.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..demo_models import TextEncoder, new_unet, predict_noise
from ..diffusion import noise_loss
from ..latents import Latents
from ..loop import Batch, Task, step_seed
from ..vocabulary import Vocabulary
from ..world.scenes import scene_caption

EMPTY_CAPTION_SHARE = 0.1
# Each scene has so many wordings of its caption.
_WORDINGS = 64
# So many words in a hundred are replaced by the unknown one, so that unknown words do no harm in a prompt.
_UNKNOWN_SHARE = 0.01


class CaptionedTask(Task):
    """A task over latents of the split "train" with global captions; `dev` holds some of the split "dev"."""

    omission = 0.0

    def __init__(self, latents: Latents, dev: Latents, vocabulary: Vocabulary) -> None:
        self._latents, self._dev, self._vocabulary = latents, dev, vocabulary

    def _rows(self, split: str, indices: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        captions = [scene_caption(split, int(i), int(rng.integers(_WORDINGS)), self.omission) for i in indices]
        if split == "train":
            captions = ["" if rng.random() < EMPTY_CAPTION_SHARE else caption for caption in captions]
        return self._vocabulary.batch(captions)

    def _conditions(self, latents: Latents, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        """What besides the caption the UNet is given."""
        return {}

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        indices = rng.integers(len(self._latents.clean), size=size)
        rows = self._rows("train", indices, rng)
        # Start and end (every row's last token) stay what they are.
        unknown = torch.from_numpy(rng.random(tuple(rows.shape)) < _UNKNOWN_SHARE)
        rows[unknown & (rows != rows[:, -1:]) & (rows != rows[:, :1])] = 0
        return {
            "latents": self._latents.clean[torch.from_numpy(indices)].float(),
            "rows": rows,
            **self._conditions(self._latents, indices, rng),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss over the scenes of the development split."""
        rng = np.random.default_rng(0)
        indices = np.arange(len(self._dev.clean))
        batch = {
            "latents": self._dev.clean.float(),
            "rows": self._rows("dev", indices, rng),
            **self._conditions(self._dev, indices, rng),
        }
        device = next(self.networks.parameters()).device
        generator = torch.Generator().manual_seed(0)
        losses = []
        for first in range(0, len(indices), 32):
            part = {name: tensor[first : first + 32].to(device) for name, tensor in batch.items()}
            losses.append(float(self.losses(part, generator)["loss"]))
        return {"dev_loss": float(np.mean(losses))}


class TextToImageTask(CaptionedTask):
    """Trains the 4-channel UNet and the text encoder on complete captions."""

    name = "text2image"

    def __init__(self, latents: Latents, dev: Latents, vocabulary: Vocabulary, seed: int) -> None:
        super().__init__(latents, dev, vocabulary)
        self.unet, self.text = new_unet(4, seed), TextEncoder(vocabulary, seed + 1)
        self.networks = nn.ModuleDict({"unet": self.unet, "text": self.text})

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        context = self.text(batch["rows"])
        return {
            "loss": noise_loss(
                lambda x, times: predict_noise(self.unet, x, times, context), batch["latents"], generator
            )
        }
