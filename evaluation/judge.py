"""Says what object a picture of the demo world shows, with the benchmark's classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..training.demo.classifier_network import Classifier
from ..training.demo.latents import as_pixels
from ..training.world.attributes import COLOURS, SHAPES
from ..training.world.crops import NOTHING, cut
from ..weights.demo_model import FOLDER, read
from .metrics import square_around

Box = tuple[int, int, int]
_COLOURS = tuple(COLOURS)
# Squares to look for an object with in a whole picture: side and distance, in pixels of 256.
_WINDOWS = ((96, 32), (128, 32), (160, 32), (192, 32))


@dataclass(frozen=True)
class Seen:
    """What the classifier sees: `shape` is None where there is no object."""

    shape: str | None
    colour: str


class Judge:
    """Names the object in a part of a picture [3, H, W] in [0, 1]; `folder` holds the classifier's file."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._classifier = Classifier().eval().requires_grad_(False)
        self._classifier.load_state_dict({name: tensor.float() for name, tensor in read("classifier", folder).items()})

    def _probabilities(self, picture: torch.Tensor, boxes: Sequence[Box]) -> tuple[torch.Tensor, torch.Tensor]:
        # Cut from a picture of 8 bits, as in training.
        pixels = (255 * picture.float().cpu().clamp(0.0, 1.0)).round().byte().permute(1, 2, 0).numpy()
        parts = np.stack([cut(pixels, (left, top, left + side, top + side)) for left, top, side in boxes])
        # Patterns are too fine for it to be sure of.
        shape, colour, _ = self._classifier(as_pixels(parts))
        return shape.softmax(dim=1), colour.softmax(dim=1)

    @staticmethod
    def _seen(shape: torch.Tensor, colour: torch.Tensor) -> Seen:
        kind = int(shape.argmax())
        return Seen(None if kind == NOTHING else SHAPES[kind], _COLOURS[int(colour.argmax())])

    def in_hole(self, picture: torch.Tensor, hole: torch.Tensor) -> Seen:
        """What fills a hole [H, W] (1 in the hole): what the square around it shows."""
        shape, colour = self._probabilities(picture, [square_around(hole)])
        return self._seen(shape[0], colour[0])

    def anywhere(self, picture: torch.Tensor) -> Seen:
        """The object of a picture of 256 pixels that has one object: what the surest of many squares shows."""
        height, width = picture.shape[-2:]
        boxes = [
            (left, top, side)
            for side, distance in _WINDOWS
            for top in range(0, height - side + 1, distance)
            for left in range(0, width - side + 1, distance)
        ]
        shape, colour = self._probabilities(picture, boxes)
        sure = shape[:, :NOTHING].amax(dim=1) * colour.amax(dim=1)
        best = int(sure.argmax())
        return self._seen(shape[best], colour[best])
