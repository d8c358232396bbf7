"""What LAR-Gen knows of a subject: the states of the host's CLIP ViT-H, and the tokens that a resampler makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...imaging.subject import CLIP_SIDE, for_clip
from .resampler import Resampler

WIDTH = 1280
"""Of ViT-H's states."""
WHERE_TO_GET = "https://huggingface.co/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """States [S, 257, 1280] of S pictures.

    states: the last but one layer's, which Assign reads.
    nothing: the same of an all-zero picture (after normalising), [1, 257, 1280], for negative prompts.
    details: the last layer's, before the final norm, which Refine reads.
    is_one: the pictures are views of one subject; else each is a subject of its own.
    """

    states: torch.Tensor
    nothing: torch.Tensor
    details: torch.Tensor
    is_one: bool

    def tokens(self, resampler: Resampler) -> tuple[torch.Tensor, torch.Tensor]:
        """The subjects' tokens [S, n, width], for views of one side by side, [1, S n, width]; and nothing's, [1, n, width].

        These need no repeating: attention to all of them several times is the same.
        """
        device = comfy.model_management.get_torch_device()
        resampler = resampler.to(device)
        with torch.no_grad():
            own, nothing = (resampler(of.to(device, torch.float32)) for of in (self.states, self.nothing))
        return (own.flatten(0, 1)[None] if self.is_one else own), nothing


def encode_subject(clip_vision: Any, subjects: Sequence[torch.Tensor], is_one: bool) -> Subject:
    """Looks at subjects on white, [h, w, 3] each (`imaging.subject.cut_out`), with a host CLIP_VISION.

    Raises ValueError, in one sentence, for a vision model that is not CLIP ViT-H.
    """
    if (width := clip_vision.config.get("hidden_size")) != WIDTH or clip_vision.model_type != "clip_vision_model":
        raise ValueError(
            f"Encode Subject was given a vision model of width {width} ({clip_vision.model_type}), and needs CLIP ViT-H, of "
            f"width {WIDTH}: load a file such as {WHERE_TO_GET} from models/clip_vision."
        )
    squares = torch.stack([for_clip(subject) for subject in subjects])
    seen = clip_vision.encode_image(squares, crop=False)
    # No picture is all zero once the host has normalised it: what is black is not.
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    zeros = torch.zeros(1, 3, CLIP_SIDE, CLIP_SIDE, device=clip_vision.load_device)
    with torch.no_grad():
        _, nothing, *_ = clip_vision.model(pixel_values=zeros, intermediate_output=-2)
    return Subject(
        states=seen["penultimate_hidden_states"],
        nothing=nothing.to(seen["penultimate_hidden_states"].device),
        details=seen["last_hidden_state"],
        is_one=is_one,
    )
