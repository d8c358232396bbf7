"""Files of text detectors: Grounding DINO, by transformers or by its authors' package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import grounding_dino, grounding_dino_package
from .engines import GROUNDING_DINO, TRANSFORMERS
from .files import read_tensors

WHERE_TO_GET = (
    "https://github.com/IDEA-Research/GroundingDINO/releases/download/v0.1.0-alpha/groundingdino_swint_ogc.pth"
)


def read_detector(path: str | Path, engine: str = TRANSFORMERS) -> Any:
    """The network of a file, in float32 on the CPU: transformers' GroundingDinoForObjectDetection, or groundingdino-py's.

    Raises ValueError, one sentence, for a file that can't be read, one of another model, one that is incomplete, and an engine
    that can't run it. Nothing in a file is executed.
    """
    path = Path(path)
    return detector_from_state(read_tensors(path, WHERE_TO_GET), path.name, engine)


def detector_from_state(state: Mapping[str, torch.Tensor], name: str, engine: str = TRANSFORMERS) -> Any:
    """The network of a file's tensors. Raises ValueError that begins with the file's `name`, or is about the engine."""
    if engine == GROUNDING_DINO.name:
        GROUNDING_DINO.require()
    library = grounding_dino_package if engine == GROUNDING_DINO.name else grounding_dino
    try:
        model, wrong = library.network(state)
    except KeyError:
        raise ValueError(_wrong(name, engine)) from None
    if wrong:
        raise ValueError(
            f"{name} is an incomplete or changed Grounding DINO file: {', '.join(wrong[:3])}. Download it again, or take "
            f"{WHERE_TO_GET}."
        )
    return model.float().eval().requires_grad_(False)


def _wrong(name: str, engine: str) -> str:
    if engine != TRANSFORMERS:
        return (
            f"{name} is no Grounding DINO file as published, which the engine {engine} needs: take {WHERE_TO_GET}, or choose "
            f"{TRANSFORMERS}, which reads other layouts too."
        )
    return (
        f"{name} is no Grounding DINO file: one is needed, such as groundingdino_swint_ogc.pth in models/grounding-dino: "
        f"{WHERE_TO_GET}."
    )
