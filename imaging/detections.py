"""What a detector found in pictures: which of it counts, how graphs hand it around, and a picture that shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import nms

from .masks import resize_mask
from .prompts import Box, as_bounding_box

Pick = Literal["all", "best", "largest", "smallest", "by index"]
PICKS: tuple[Pick, ...] = get_args(Pick)

_TINT = (0.3, 0.7, 1.0)
_COLORS = ("#ff5050", "#50c8ff", "#ffd23c", "#78e678", "#c896ff", "#ffa0c8")


@dataclass(frozen=True)
class Detection:
    """One thing: its box in pixels, the phrase that found it, and how sure the detector is (0 to 1)."""

    box: Box
    label: str
    score: float

    @property
    def area(self) -> float:
        """In square pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    @property
    def bounding_box(self) -> dict[str, float | str]:
        """The host's BOUNDING_BOX, with the score and the label."""
        return {**as_bounding_box(self.box), "score": self.score, "label": self.label}


@dataclass(frozen=True)
class Choice:
    """Which detections count, of those with an area.

    `threshold`: the score that one must be above. `overlap`: of two boxes that share more (intersection over union) the better
    one stays. `smallest` and `largest`: areas as shares of the picture. Then `pick`: of "all" the `count` best, "by index" the
    one at that place in the order of the scores, from 0.
    """

    threshold: float = 0.3
    overlap: float = 0.8
    smallest: float = 0.0
    largest: float = 1.0
    pick: Pick = "all"
    index: int = 0
    count: int = 16

    def of(self, found: Sequence[Detection], width: int, height: int) -> list[Detection]:
        """The detections of a picture that count, best first."""
        pixels = width * height
        kept = [
            one
            for one in sorted(found, key=lambda one: -one.score)
            if one.score > self.threshold
            and one.area > 0.0
            and self.smallest * pixels <= one.area <= self.largest * pixels
        ]
        if kept:
            boxes = torch.tensor([one.box for one in kept], dtype=torch.float32)
            scores = torch.tensor([one.score for one in kept], dtype=torch.float32)
            kept = [kept[place] for place in sorted(nms(boxes, scores, self.overlap).tolist())]
        if self.pick == "by index":
            return kept[self.index : self.index + 1]
        if self.pick == "all":
            return kept[: self.count]
        order = {"best": lambda one: one.score, "largest": lambda one: one.area, "smallest": lambda one: -one.area}
        return [max(kept, key=order[self.pick])] if kept else []


@dataclass(frozen=True)
class Findings:
    """What a search for some phrases found in each picture of a batch, and that as graphs hand it around."""

    phrases: Sequence[str]
    each: Sequence[Sequence[Detection]]

    @property
    def boxes(self) -> list[list[dict[str, float | str]]]:
        """For each picture a list of the host's BOUNDING_BOX."""
        return [[one.bounding_box for one in found] for found in self.each]

    @property
    def labels(self) -> str:
        """For each picture a list of phrases, as JSON."""
        return json.dumps([[one.label for one in found] for found in self.each])

    @property
    def scores(self) -> str:
        """For each picture a list of scores, as JSON, with four digits."""
        return json.dumps([[round(one.score, 4) for one in found] for found in self.each])

    def preview(self, pictures: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """The first of the pictures [B, H, W, C] as `shown` draws it, with the first of the masks [B, H, W]."""
        return shown(pictures[0], self.each[0], self.phrases, None if masks is None else masks[0])


def labels_of(text: str, pictures: int) -> list[list[str]]:
    """The labels of each picture, of '[["red cup", "spoon"], ["dog"]]'. Raises ValueError, in one sentence, for another text."""
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = None
    right = isinstance(found, list) and all(
        isinstance(of, list) and all(isinstance(label, str) for label in of) for of in found
    )
    if not right:
        raise ValueError(
            f'\'labels\' is {text[:60]!r}: connect Detect\'s labels, or write such as [["red cup", "spoon"]].'
        )
    if len(found) != pictures:
        raise ValueError(
            f"'labels' are of {len(found)} pictures, and 'image' has {pictures}: connect Detect's with the same ones."
        )
    return found


def masks_of(mask: torch.Tensor, labels: Sequence[Sequence[str]], size: tuple[int, ...]) -> list[torch.Tensor]:
    """The masks [n, H, W] of each picture's labels: in a batch each has one for every label, and one where it has none.

    Raises ValueError, in one sentence, for another number of masks.
    """
    counts = [max(len(of), 1) for of in labels]
    batch = resize_mask(mask, size)[:, 0]
    if len(batch) != sum(counts):
        raise ValueError(
            f"'mask' has {len(batch)} masks, and there are {sum(counts)} labels (a picture without any counts as one): switch "
            "'separate' on in Segment, and connect Detect's boxes to it."
        )
    return [of[: len(names)] for of, names in zip(batch.split(counts), labels, strict=True)]


def split_phrases(text: str) -> list[str]:
    """The phrases of "red cup. spoon.", which full stops, commas, semicolons or lines part, in lower case.

    Raises ValueError where there is none.
    """
    phrases = [" ".join(part.lower().split()) for part in re.split(r"[.,;\n]", text)]
    if not any(phrases):
        raise ValueError("'text' says nothing to look for: write one phrase or several, such as \"red cup. spoon.\"")
    return list(dict.fromkeys(phrase for phrase in phrases if phrase))


def shown(
    picture: torch.Tensor, found: Sequence[Detection], phrases: Sequence[str], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """A picture [H, W, C] in [0, 1] with the boxes, labels and scores drawn on it, [1, H, W, 3]; a mask [H, W] tints it."""
    colors = picture[..., :3].cpu().clamp(0.0, 1.0)
    if mask is not None:
        colors = torch.lerp(colors, colors.new_tensor(_TINT), 0.5 * mask.to(colors)[..., None])
    pixels = (colors * 255.0).round().to(torch.uint8).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    pen = ImageDraw.Draw(image)
    unit = max(min(image.size) // 200, 1)
    font = ImageFont.load_default(10.0 + 4 * unit)
    for one in found:
        label = one.label
        color = _COLORS[phrases.index(label) % len(_COLORS)] if label in phrases else _COLORS[0]
        pen.rectangle(one.box, outline=color, width=1 + unit)
        _write(pen, (one.box[0], one.box[1]), f"{label} {one.score:.2f}", color, font)
    if not found:
        _write(pen, (0, 0), f"nothing found: {', '.join(phrases)}", _COLORS[0], font)
    return torch.from_numpy(np.asarray(image).copy()).float()[None] / 255.0


def _write(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    color: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    pen.rectangle(pen.textbbox(place, text, font=font), fill=color)
    pen.text(place, text, fill="black", font=font)
