"""Grounding DINO under the host's memory manager: boxes for phrases."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ..imaging.detections import Choice, Detection, Findings
from ..imaging.imagenet import normalized
from ..imaging.pictures import check_pictures, resampled
from .placed import Placed

SHORTER_SIDE, LONGER_SIDE = 800, 1333
"""A picture is scaled until its shorter side has the first, or its longer side the second."""

# Of the network's text, special tokens included.
_MOST_TOKENS = 256
# How many pixels apart the places of the network's grids are.
_STRIDES = (8, 16, 32, 64)


@dataclass
class Detector:
    """transformers' GroundingDinoForObjectDetection, or what has its interface, placed by the host, and its tokenizer."""

    patcher: ModelPatcher
    tokenizer: Any

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Detector:
        """A detector of such a network. It stays in float32: its deformable attention is not made for less."""
        device = comfy.model_management.get_torch_device()
        return cls(ModelPatcher(Placed(model), device, comfy.model_management.unet_offload_device()), tokenizer)

    @torch.inference_mode()
    def detect(self, picture: torch.Tensor, phrases: Sequence[str]) -> list[Detection]:
        """All that each of the network's queries sees in a picture [H, W, 3 or 4] in [0, 1]; most of it has a score near 0.

        A box belongs to the phrase of which one token fits it best; its score is that token's. Raises ValueError for a picture of
        another shape or with values that are NaN or infinite, for a text that is too long for the network, and for a phrase
        without a word.
        """
        check_pictures(picture[None], "'image'")
        # The network takes a full stop for the end of a phrase.
        text = self.tokenizer(["".join(f"{phrase}. " for phrase in phrases)], return_tensors="pt")
        tokens = text["input_ids"][0].tolist()
        if len(tokens) > _MOST_TOKENS:
            raise ValueError(
                f"'text' has {len(tokens)} tokens, but the detector reads {_MOST_TOKENS} at most: look for fewer things at once."
            )
        spans = phrase_tokens(tokens, self.tokenizer.convert_tokens_to_ids("."))
        for phrase, span in zip(phrases, spans, strict=True):
            if span.start == span.stop:
                raise ValueError(
                    f"'text' has the phrase {phrase!r}, in which there is no word: write what to look for."
                )
        height, width = picture.shape[:2]
        size = scaled_size(height, width, self.patcher.model.network.config.num_queries)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory(*size), force_full_load=True)
        device = self.patcher.load_device
        pixels = picture[..., :3].to(device, torch.float32).movedim(-1, 0).clamp(0.0, 1.0)
        pixels = resampled(pixels[None], size, "bilinear")[0]
        output = self.patcher.model.network(
            pixel_values=normalized(pixels)[None], **{name: ids.to(device) for name, ids in text.items()}
        )
        fits = output.logits[0, :, : len(tokens)].float().sigmoid().cpu()
        scores, best = torch.stack([fits[:, span].amax(dim=1) for span in spans], dim=1).max(dim=1)
        boxes = pixel_boxes(output.pred_boxes[0].float().cpu(), width, height)
        return [
            Detection((box[0], box[1], box[2], box[3]), phrases[int(phrase)], score)
            for box, phrase, score in zip(boxes.tolist(), best.tolist(), scores.tolist(), strict=True)
        ]


def detect_batch(detector: Detector, pictures: torch.Tensor, phrases: Sequence[str], choice: Choice) -> Findings:
    """What counts in each of the pictures [B, H, W, C] in [0, 1]; the log says where that is nothing.

    Raises ValueError as `Detector.detect`.
    """
    each = []
    for number, picture in enumerate(pictures):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found = detector.detect(picture, phrases)
        height, width = picture.shape[:2]
        each.append(choice.of(found, width, height))
        if not each[-1]:
            logging.info("TrueFill: nothing found in picture %d for %s.", number, ", ".join(phrases))
    return Findings(phrases, each)


def scaled_size(height: int, width: int, queries: int) -> tuple[int, int]:
    """Height and width at which the network sees a picture, rounded as its authors do.

    A picture so thin that the network would have fewer places in it than queries, each of which starts at a place of its own, is
    made as much thicker as it needs.
    """
    short, long = min(height, width), max(height, width)
    side = SHORTER_SIDE
    if long / short * side > LONGER_SIDE:
        side = round(LONGER_SIDE * short / long)
    # The authors' rule leaves nothing of the thinnest.
    side, other = (side, int(side * long / short)) if side else (1, LONGER_SIDE)
    while sum(-(-side // stride) * -(-other // stride) for stride in _STRIDES) < queries:
        side += 1
    return (side, other) if height <= width else (other, side)


def memory(height: int, width: int) -> int:
    """Bytes that looking at a scaled picture takes: somewhat more than `bench segment` measures."""
    return 1800 * height * width


def phrase_tokens(tokens: list[int], stop: int) -> list[slice]:
    """Where each phrase's tokens lie between the first and the last special token; each phrase ends with `stop`."""
    spans, start = [], 1
    for place, token in enumerate(tokens):
        if token == stop:
            spans.append(slice(start, place))
            start = place + 1
    return spans


def pixel_boxes(boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Boxes [N, 4] as center and size in shares of a picture, as left, top, right, bottom in its pixels, within it."""
    center, half = boxes[:, :2], boxes[:, 2:] / 2.0
    size = boxes.new_tensor([width, height])
    corners = torch.cat(((center - half) * size, (center + half) * size), dim=1)
    return torch.minimum(corners.clamp(min=0.0), size.repeat(2))
