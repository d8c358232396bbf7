"""The pictures that ship with the pack, each with a hole in its alpha channel, or with a file that is its mask."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "workflows" / "examples"

EXAMPLES = {
    "coffee": "coffee.png",
    "toy scene": "toy.png",
    "large toy scene": "toy_large.png",
    "coffee cup": "coffee.png",
    "toy scene for a subject": "toy_subject_scene.png",
    "toy subject": "toy_subject.png",
}
"""Name and file. Sources and licences: workflows/examples/README.md."""
_MASKS = {"coffee cup": "coffee_cup.png"}
"""White where the named thing is, in place of the hole in the alpha channel."""


def load_example(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the picture [1, H, W, 3] and its hole, or what it is named after, [1, H, W], both float32 in [0, 1].

    Raises ValueError for an unknown name and FileNotFoundError where the pack is incomplete.
    """
    if name not in EXAMPLES:
        raise ValueError(f"There is no example photo '{name}'; there are: {', '.join(EXAMPLES)}.")
    rgba = _read(EXAMPLES[name], "RGBA")
    mask = _read(_MASKS[name], "L") if name in _MASKS else 1.0 - rgba[..., 3]
    return rgba[..., :3].contiguous(), mask


def _read(file: str, mode: str) -> torch.Tensor:
    path = FOLDER / file
    if not path.is_file():
        raise FileNotFoundError(f"The example photo {path} is missing: install TrueFill again, or use Load Image.")
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert(mode), dtype=np.float32) / 255.0)[None]
