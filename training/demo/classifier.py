"""The classifier of the benchmark: shape, colour and pattern of the object in a crop."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..loop import Batch, Task, step_seed
from ..world.crops import IGNORED, Crop, make_crop
from .classifier_network import Classifier
from .latents import as_pixels

_SCENES = 1_000_000
_HEADS = ("shape", "colour", "pattern")


def _as_batch(crops: list[Crop]) -> Batch:
    labels = {name: torch.tensor([getattr(crop, name) for crop in crops]) for name in _HEADS}
    return {"pixels": as_pixels(np.stack([crop.picture for crop in crops])), **labels}


class ClassifierTask(Task):
    """Trains a Classifier on crops of single objects."""

    name = "classifier"

    def __init__(self, seed: int) -> None:
        self.classifier = Classifier(seed)
        self.networks = nn.ModuleDict({"classifier": self.classifier})

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        return _as_batch([make_crop("train", int(index)) for index in rng.integers(_SCENES, size=size)])

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        logits = self.classifier(batch["pixels"])
        errors = {
            name: F.cross_entropy(head.float(), batch[name], ignore_index=IGNORED)
            for name, head in zip(_HEADS, logits, strict=True)
        }
        return {"loss": torch.stack(list(errors.values())).sum(), **errors}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy over 1000 crops of the development split, for each label and for shape and colour together."""
        device = next(self.classifier.parameters()).device
        right: dict[str, list[torch.Tensor]] = {name: [] for name in (*_HEADS, "shape_and_colour")}
        for first in range(0, 1000, 100):
            batch = _as_batch([make_crop("dev", index) for index in range(first, first + 100)])
            logits = self.classifier(batch["pixels"].to(device))
            hits = [head.argmax(dim=1).cpu() == batch[name] for name, head in zip(_HEADS, logits, strict=True)]
            there = batch["colour"] != IGNORED
            right["shape"].append(hits[0])
            right["colour"].append(hits[1][there])
            right["pattern"].append(hits[2][there])
            right["shape_and_colour"].append(hits[0] & (hits[1] | ~there))
        return {name: float(torch.cat(values).float().mean()) for name, values in right.items()}
