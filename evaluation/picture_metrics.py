"""Measures of finished pictures for `dev.py batch --metrics`: those of the papers, by weights that the user has.

What a row does not have (an original, a hole, a prompt) or what does not fit gives no figure. Weights are never downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps

from ..imaging.masks import hole_of
from ..training.world.attributes import COLOURS, PATTERNS, SHAPES
from .metrics import background_change, background_error, seam_visibility

Figures = dict[str, float]
_DETECTED = 0.3
"""A detector's score from which a thing is there."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """picture: the result. original: what it was made of. hole: white where it might change. prompt: what was asked for."""

    picture: Path
    original: Path | None = None
    hole: Path | None = None
    prompt: str | None = None

    @cached_property
    def image(self) -> Image.Image:
        """The result, RGB."""
        return _open(self.picture).convert("RGB")

    @cached_property
    def pixels(self) -> torch.Tensor:
        """The same, [1, 3, H, W] in [0, 1]."""
        return _tensor(self.image)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """The hole [1, 1, H, W], 1 where it is more than noise; None where there is none of the result's size."""
        plane = None if self.hole is None else _open(self.hole).convert("L")
        if plane is None or plane.size != self.image.size:
            return None
        return hole_of(_tensor(plane)[0, 0]).float()

    @cached_property
    def scene(self) -> torch.Tensor | None:
        """The original [1, 3, H, W]; None where there is none of the result's size."""
        image = None if self.original is None else _open(self.original).convert("RGB")
        return None if image is None or image.size != self.image.size else _tensor(image)

    def local(self) -> Image.Image | None:
        """The box around the hole."""
        if self.mask is None or not bool(self.mask.any()):
            return None
        rows, columns = self.mask[0, 0].any(dim=1).nonzero(), self.mask[0, 0].any(dim=0).nonzero()
        return self.image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _tensor(image: Image.Image) -> torch.Tensor:
    values = np.asarray(image)
    return torch.from_numpy(values.reshape(*values.shape[:2], -1).copy()).movedim(-1, 0)[None].float() / 255.0


Metric = Callable[[Sample], Figures]
"""The figures of a sample, by name; without those that it can't have."""


def make_metric(name: str, weights: Mapping[str, Path]) -> Metric:
    """One of METRICS. Raises ValueError, in a sentence, where weights or a package are missing."""
    return METRICS[name](weights)


def _needed(weights: Mapping[str, Path], name: str, what: str, link: str) -> Path:
    path = weights.get(name)
    if path is None or not path.exists():
        found = "was not named" if path is None else f"is not at {path}"
        raise ValueError(f"{what} {found}: get it from {link} and say --weights {name}=PATH.")
    return path


class _Background:
    """The greatest and the mean difference outside of the hole, and how visible its edge is, in levels of 255."""

    def __init__(self, weights: Mapping[str, Path]) -> None:
        pass

    def __call__(self, sample: Sample) -> Figures:
        made, scene, hole = sample.pixels, sample.scene, sample.mask
        if scene is None or hole is None or not bool((hole == 0).any()):
            return {}
        found = {"background max": background_error(made, scene, hole)}
        found["background mean"] = background_change(made, scene, hole)
        seam = float(seam_visibility(made, scene, hole))
        return found if np.isnan(seam) else {**found, "seam": seam}


class _Demo:
    """Whether the hole shows what a prompt of the demo world asks for, by the demo's own classifier: 1 or 0."""

    _ASKED = re.compile(rf"an? ({'|'.join(COLOURS)}) (?:(?:{'|'.join(PATTERNS)}) )?({'|'.join(SHAPES)})")

    def __init__(self, weights: Mapping[str, Path]) -> None:
        from .judge import Judge

        self._judge = Judge()

    def __call__(self, sample: Sample) -> Figures:
        asked = self._ASKED.fullmatch((sample.prompt or "").strip().lower())
        if asked is None or sample.mask is None or not bool(sample.mask.any()):
            return {}
        seen = self._judge.in_hole(sample.pixels[0], sample.mask[0, 0])
        return {"as asked (demo)": float((seen.colour, seen.shape) == asked.groups())}


_CLIP_LINK = "https://huggingface.co/openai/clip-vit-large-patch14 (the whole folder)"


def _clip(weights: Mapping[str, Path]) -> tuple[Any, Any]:
    """transformers' CLIPModel of the folder that was named, and its processor."""
    from transformers import CLIPModel, CLIPProcessor

    folder = _needed(weights, "clip", "CLIP", _CLIP_LINK)
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{folder} is no folder of CLIP in transformers' layout: {said}") from error
    return model, processor


class _Clip:
    """100 times the cosine of CLIP's embeddings of prompt and picture (Hessel et al. 2021), of the whole or of the hole's box."""

    local: ClassVar[bool] = False

    def __init__(self, weights: Mapping[str, Path]) -> None:
        self._model, self._processor = _clip(weights)

    @torch.no_grad()
    def __call__(self, sample: Sample) -> Figures:
        image = sample.local() if self.local else sample.image
        if image is None or not sample.prompt:
            return {}
        given = self._processor(text=[sample.prompt], images=image, return_tensors="pt", padding=True, truncation=True)
        made = self._model(**given)
        cosine = torch.cosine_similarity(made.image_embeds, made.text_embeds)
        return {"local CLIP" if self.local else "CLIP": 100.0 * float(cosine)}


class _LocalClip(_Clip):
    local = True


class _Aesthetic:
    """LAION's aesthetic score, by a linear head on CLIP ViT-L/14 (improved-aesthetic-predictor)."""

    _LINK = "https://github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth)"

    def __init__(self, weights: Mapping[str, Path]) -> None:
        file = _needed(weights, "aesthetic", "The aesthetic predictor", self._LINK)
        self._clip, self._processor = _clip(weights)
        state = torch.load(file, map_location="cpu", weights_only=True)
        numbers = sorted({int(name.split(".")[1]) for name in state if re.fullmatch(r"layers\.\d+\.weight", name)})
        self._layers = [(state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]) for number in numbers]
        width = self._clip.config.projection_dim
        if not numbers or self._layers[0][0].shape[1] != width or self._layers[-1][0].shape[0] != 1:
            raise ValueError(
                f"{file} is no aesthetic predictor for this CLIP, whose embeddings have {width} values: get it from {self._LINK}."
            )

    @torch.no_grad()
    def __call__(self, sample: Sample) -> Figures:
        given = self._processor.image_processor(sample.image, return_tensors="pt")
        x = self._clip.visual_projection(self._clip.vision_model(**given).pooler_output)
        x = torch.nn.functional.normalize(x)
        # Between its linear layers there is nothing but dropout.
        for weight, bias in self._layers:
            x = torch.nn.functional.linear(x, weight.float(), bias.float())
        return {"aesthetic": float(x)}


class _Detector:
    """Whether Grounding DINO finds the prompt's thing: 1 where the middle of a box it is sure of lies in the hole, else 0."""

    def __init__(self, weights: Mapping[str, Path]) -> None:
        from ..selection.detectors import Detector
        from ..weights.detectors import WHERE_TO_GET, read_detector
        from ..weights.grounding_dino import tokenizer

        file = _needed(weights, "detector", "Grounding DINO", WHERE_TO_GET)
        self._detector = Detector.of(read_detector(file), tokenizer())

    def __call__(self, sample: Sample) -> Figures:
        if sample.mask is None or not sample.prompt:
            return {}
        # A full stop would end the phrase.
        phrase = sample.prompt.replace(".", " ").strip().lower()
        found = self._detector.detect(sample.pixels[0].movedim(0, -1), [phrase])
        sure = [detection.box for detection in found if detection.score >= _DETECTED]
        return {"detected": float(any(_middle_in(box, sample.mask[0, 0]) for box in sure))}


def _middle_in(box: tuple[float, float, float, float], hole: torch.Tensor) -> bool:
    left, top, right, bottom = box
    row = min(max(int((top + bottom) / 2), 0), hole.shape[0] - 1)
    column = min(max(int((left + right) / 2), 0), hole.shape[1] - 1)
    return bool(hole[row, column])


class _Lpips:
    """LPIPS of the background (Zhang et al. 2018, AlexNet): both pictures black in the hole."""

    _LINK = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"

    def __init__(self, weights: Mapping[str, Path]) -> None:
        try:
            import lpips
        except ImportError:
            raise ValueError("LPIPS is not installed: pip install lpips.") from None
        file = _needed(weights, "lpips", "AlexNet", self._LINK)
        state = torch.load(file, map_location="cpu", weights_only=True)
        self._model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
        own = self._model.net.state_dict()
        wanted = {name: "features." + name.split(".", 1)[1] for name in own}
        if missing := [name for name in wanted.values() if name not in state]:
            raise ValueError(f"{file} is no AlexNet of torchvision, it has no {missing[0]}: get {self._LINK}.")
        self._model.net.load_state_dict({name: state[of] for name, of in wanted.items()})

    @torch.no_grad()
    def __call__(self, sample: Sample) -> Figures:
        if sample.scene is None or sample.mask is None:
            return {}
        made, scene = (pixels * (1.0 - sample.mask) for pixels in (sample.pixels, sample.scene))
        return {"background LPIPS": float(self._model(made, scene, normalize=True))}


METRICS: dict[str, Callable[[Mapping[str, Path]], Metric]] = {
    "background": _Background,
    "demo": _Demo,
    "clip": _Clip,
    "local-clip": _LocalClip,
    "aesthetic": _Aesthetic,
    "detector": _Detector,
    "lpips": _Lpips,
}
