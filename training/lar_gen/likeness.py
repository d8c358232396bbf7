"""The benchmark's own eyes for subjects: how alike the objects of two crops look.

It is another network than the one that the models read subjects with, on other pictures, and no model is trained by it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..demo.classifier_network import WIDTH, conv_features, pooled
from ..demo.latents import as_pixels
from ..loop import Batch, Task, step_seed
from ..world.backgrounds import BACKGROUNDS
from ..world.crops import cut, square, worn_out
from ..world.subjects import Look, make_portrait
from .contrast import SUBJECTS, alike_looks, contrast_loss, share_found

_SIZE = 64
_DEV_SUBJECTS = 512


class Likeness(nn.Module):
    """Vectors [B, 64] of length 1 from crops [B, 3, 64, 64] in [0, 1]: their products say how alike two are, -1 to 1."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = conv_features()
            self.head = nn.Linear(2 * WIDTH, _SIZE)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.head(pooled(self.features(2.0 * crops - 1.0))).float(), dim=-1)


def _crop(look: Look, rng: np.random.Generator) -> np.ndarray:
    """A subject somewhere in a crop, uint8 [64, 64, 3]."""
    picture, mask = make_portrait(look, rng, BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
    rows, columns = np.nonzero(mask)
    size = max(np.ptp(rows), np.ptp(columns)) + 1
    side = size * rng.uniform(0.95, 1.6)
    reach = 0.4 * abs(side - size) + 0.03 * size
    x, y = (0.5 * (of.min() + of.max() + 1) + rng.uniform(-reach, reach) for of in (columns, rows))
    return worn_out(cut(picture, square(x, y, side)), rng)


def crop_pairs(split: str, numbers: np.ndarray, rng: np.random.Generator) -> Batch:
    """Two crops of each subject: pixels [2, B, 3, 64, 64]."""
    looks = alike_looks(split, numbers)
    return {"pixels": torch.stack([as_pixels(np.stack([_crop(look, rng) for look in looks])) for _ in range(2)])}


class LikenessTask(Task):
    """Trains a Likeness on pairs of crops; `batch` is the number of pairs."""

    name = "subject-likeness"

    def __init__(self, seed: int) -> None:
        self.likeness = Likeness(seed)
        self.networks = nn.ModuleDict({"likeness": self.likeness})

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        return crop_pairs("train", rng.choice(SUBJECTS, size, replace=False), rng)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        loss = contrast_loss(self.likeness(batch["pixels"].flatten(0, 1)).unflatten(0, (2, -1)))
        return {"loss": loss}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How often a view's other view is the likest of 512, on the split "dev"; and of the four that are alike."""
        device = next(self.networks.parameters()).device
        batch = crop_pairs("dev", np.arange(_DEV_SUBJECTS), np.random.default_rng(0))
        seen = self.likeness(batch["pixels"].flatten(0, 1).to(device)).unflatten(0, (2, -1))
        fours = seen.unflatten(1, (-1, 4)).unbind(1)
        return {"found": share_found(seen), "found_of_4": float(np.mean([share_found(of) for of in fours]))}
