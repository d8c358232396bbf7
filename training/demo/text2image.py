"""Stage 2: the 4-channel UNet and the text encoder, together.

Besides the noise the UNet has to say what lies where: a linear layer on its features at latent / 2 names shape, colour, pattern
and background of every cell. The noise alone teaches words very slowly, for a shape is a small part of it; naming things
rewards a look at the caption at once (after Yu et al., "Representation Alignment for Generation", with the world's own
labels in the place of another network's features). The layer is not exported.

The text encoder is trained along: a frozen random one would hand every adjective to every noun alike, and the words of a
caption that belong together are what this world is about. It costs little, for only the world's words have embeddings.
One caption in ten is empty, for classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..diffusion import noise_loss
from ..loop import Batch, Task, step_seed
from ..world.attributes import COLOURS, PATTERNS, SHAPES
from ..world.backgrounds import BACKGROUNDS
from ..world.scenes import object_cells, plan_scene, scene_caption
from .latents import Latents
from .networks import TextEncoder, new_unet, predict_noise
from .vocabulary import Vocabulary

EMPTY_CAPTION_SHARE = 0.1
# Each scene has so many wordings of its caption.
_WORDINGS = 64
# So many words in a hundred are replaced by the unknown one, so that unknown words do no harm in a prompt.
_UNKNOWN_SHARE = 0.01

_CELLS = 16
_COLOURS = tuple(COLOURS)
LABEL_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(PATTERNS) + 1, len(BACKGROUNDS))
# The last block at latent / 2 that the way up does not enlarge.
_FEATURES, _WIDTH = 2, 128
LABEL_WEIGHT = 0.1


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
        """The error of the noise over the scenes of the development split."""
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
            losses.append(float(self.losses(part, generator)["noise"]))
        return {"dev_loss": float(np.mean(losses))}


def cell_labels(indices: Iterable[int], split: str = "train") -> torch.Tensor:
    """Shape, colour, pattern and background of every cell of scenes: int64 [B, 4, 16, 16].

    One more than the last shape, colour and pattern stands for none.
    """
    labels = []
    for index in indices:
        row = np.empty((len(LABEL_CLASSES), _CELLS, _CELLS), dtype=np.int64)
        layout = plan_scene(split, int(index))
        cells = object_cells(layout, _CELLS)
        none = [classes - 1 for classes in LABEL_CLASSES[:3]]
        named = [(SHAPES.index(o.shape), _COLOURS.index(o.colour), PATTERNS.index(o.pattern)) for o in layout.objects]
        row[:3] = np.moveaxis(np.asarray([none, *named])[cells], -1, 0)
        row[3] = BACKGROUNDS.index(layout.background)
        labels.append(row)
    return torch.from_numpy(np.stack(labels))


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the four labels; all cells with an object weigh as much as all without.

    `logits` is [B, classes, h, w] for all labels in turn; `labels` [B, 4, h, w].
    """
    there = (labels[:, 0] != LABEL_CLASSES[0] - 1).float()
    weight = there / there.sum().clamp(min=1.0) + (1.0 - there) / (1.0 - there).sum().clamp(min=1.0)
    errors = [
        F.cross_entropy(part, labels[:, place], reduction="none")
        for place, part in enumerate(logits.float().split(LABEL_CLASSES, dim=1))
    ]
    return 0.5 * (torch.stack(errors).mean(dim=0) * weight).sum()


class TextToImageTask(CaptionedTask):
    """Trains the 4-channel UNet and the text encoder on complete captions."""

    name = "text2image"

    def __init__(self, latents: Latents, dev: Latents, vocabulary: Vocabulary, seed: int) -> None:
        super().__init__(latents, dev, vocabulary)
        self.unet, self.text = new_unet(4, seed), TextEncoder(vocabulary, seed + 1)
        layers = list(self.unet.output_blocks[_FEATURES].children())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2)
            self._labels = nn.Conv2d(_WIDTH, sum(LABEL_CLASSES), 1)
        # The host calls the layers of a block one by one.
        layers[-1].register_forward_hook(self._keep_features)
        self.networks = nn.ModuleDict({"unet": self.unet, "text": self.text, "labels": self._labels})

    def _keep_features(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        self._features = output

    def _conditions(self, latents: Latents, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        return {"labels": cell_labels(indices, "dev" if latents is self._dev else "train")}

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        context = self.text(batch["rows"])
        noise = noise_loss(lambda x, times: predict_noise(self.unet, x, times, context), batch["latents"], generator)
        labels = label_loss(self._labels(self._features), batch["labels"])
        return {"loss": noise + LABEL_WEIGHT * labels, "noise": noise, "labels": labels}
