"""The pictures that ship with the pack, each with a hole in its alpha channel."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "workflows" / "examples"

EXAMPLES = {"coffee": "coffee.png", "toy scene": "toy.png", "large toy scene": "toy_large.png"}
"""Name and file. Sources and licences: workflows/examples/README.md."""


def load_example(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the picture [1, H, W, 3] and its hole [1, H, W], both float32 in [0, 1].

    Raises ValueError for an unknown name and FileNotFoundError where the pack is incomplete.
    """
    if name not in EXAMPLES:
        raise ValueError(f"There is no example photo '{name}'; there are: {', '.join(EXAMPLES)}.")
    path = FOLDER / EXAMPLES[name]
    if not path.is_file():
        raise FileNotFoundError(f"The example photo {path} is missing: install TrueFill again, or use Load Image.")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255.0
    rgba = torch.from_numpy(pixels)[None]
    return rgba[..., :3].contiguous(), 1.0 - rgba[..., 3]
