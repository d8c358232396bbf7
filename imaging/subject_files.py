"""A folder of subjects in their pictures, as LAR-Gen's data construction leaves it (section 3.4) and its training reads it.

    00001.png            a picture
    00001_0.mask.png     where in it a subject is: white
    00001_0.txt          what words say of it, its prompt
    00001_1.mask.png     the next one

A picture may be a .jpg, .jpeg or .webp as well, and names are free: a mask's begins with its picture's, and has no other dot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MASK = re.compile(r"(.+)_(\d+)\.mask\.png")


@dataclass(frozen=True)
class SubjectFile:
    """One subject: its picture, the mask of it there, and its prompt."""

    picture: Path
    mask: Path
    prompt: str

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture, uint8 [H, W, 3], and the mask, bool [H, W]. Raises ValueError where they differ in size."""
        with Image.open(self.picture) as picture, Image.open(self.mask) as mask:
            if picture.size != mask.size:
                raise ValueError(
                    f"{self.mask.name} has {mask.width} x {mask.height} pixels and {self.picture.name} {picture.width} x "
                    f"{picture.height}: a mask has the size of its picture."
                )
            return np.asarray(picture.convert("RGB")).copy(), np.asarray(mask.convert("L")) > 127


def save_subjects(
    folder: Path,
    pictures: torch.Tensor,
    masks: Sequence[torch.Tensor],
    prompts: Sequence[Sequence[str]],
    smallest: float = 0.01,
    largest: float = 0.6,
) -> list[SubjectFile]:
    """Write pictures [B, H, W, 3] in [0, 1] whose subjects are neither too small nor too large; returns what was written.

    `masks` has [n, H, W] for each picture, as large as it is, and `prompts` as many texts. `smallest` and `largest` are shares of
    the picture; a picture that has no subject between them is left out. Numbers go on after the last one in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(name.stem) for name in folder.iterdir() if name.stem.isdecimal()), default=0)
    written = []
    for picture, of_picture, texts in zip(pictures, masks, prompts, strict=True):
        wanted = [
            (mask > 0.5, text)
            for mask, text in zip(of_picture, texts, strict=True)
            if smallest <= float((mask > 0.5).float().mean()) <= largest
        ]
        if not wanted:
            continue
        number += 1
        path = folder / f"{number:05d}.png"
        _image(picture[..., :3]).save(path)
        for place, (mask, text) in enumerate(wanted):
            name = f"{number:05d}_{place}"
            _image(mask.float()).save(folder / f"{name}.mask.png")
            (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
            written.append(SubjectFile(path, folder / f"{name}.mask.png", text))
    return written


def _image(values: torch.Tensor) -> Image.Image:
    return Image.fromarray((255.0 * values.cpu().clamp(0.0, 1.0)).round().to(torch.uint8).numpy())


def find_subjects(folder: Path) -> list[SubjectFile]:
    """The subjects of a folder by name.

    Raises ValueError, in one sentence, where there is none, and where a mask has no picture or no text.
    """
    found = []
    for path in sorted(folder.glob("*.mask.png")):
        match = _MASK.fullmatch(path.name)
        pictures = [folder / f"{match[1]}{suffix}" for suffix in _SUFFIXES] if match else []
        picture = next((of for of in pictures if of.is_file()), None)
        if match is None or picture is None:
            raise ValueError(f"{path} has no picture: the mask of NAME.png or NAME.jpg is called NAME_0.mask.png.")
        text = path.with_name(path.name.removesuffix(".mask.png") + ".txt")
        if not text.is_file():
            raise ValueError(f"{path} has no prompt: write what it shows into {text.name} beside it.")
        found.append(SubjectFile(picture, path, text.read_text(encoding="utf-8").strip()))
    if not found:
        raise ValueError(
            f"The folder {folder} has no subject: it needs pictures such as 1.png with 1_0.mask.png and 1_0.txt."
        )
    return found
