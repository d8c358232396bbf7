"""What LAR-Gen knows of a subject: what the host's CLIP ViT-H sees, the tokens that a resampler makes of that, and its latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...imaging.subject import CLIP_SIDE, for_branch, for_clip
from .resampler import Resampler

WHERE_TO_GET = "https://huggingface.co/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class States:
    """CLIP's states [S, patches + 1, width] of S pictures: [S, 257, 1280] of ViT-H.

    own: the last but one layer's, which Assign reads.
    nothing: the same of an all-zero picture (after normalizing), [1, patches + 1, width], for negative prompts.
    details: the last layer's, before the final norm, which a trained Refine reads.
    """

    own: torch.Tensor
    nothing: torch.Tensor
    details: torch.Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """S pictures of a subject, as its encoders see them; without an encoder there is None of it.

    is_one: the pictures are views of one subject; else each is a subject of its own.
    latents: [S, 4, h, w], square, as the VAE gives them.
    """

    states: States | None
    latents: torch.Tensor | None
    is_one: bool

    def tokens(self, resampler: Resampler) -> tuple[torch.Tensor, torch.Tensor]:
        """The subjects' tokens [S, n, width], for views of one side by side, [1, S n, width]; and as many of nothing.

        Nothing's are repeated for views, to which attention is the same. Raises ValueError, in one sentence, for a subject that
        CLIP has not seen, or another CLIP than the resampler's.
        """
        states = self._seen_by(resampler.proj_in.in_features, "Assign", "adapter")
        device = comfy.model_management.get_torch_device()
        resampler = resampler.to(device)
        with torch.no_grad():
            own, nothing = (resampler(of.to(device, torch.float32)) for of in (states.own, states.nothing))
        if not self.is_one:
            return own, nothing
        return own.flatten(0, 1)[None], nothing.repeat(1, len(own), 1)

    def branch_details(self, width: int) -> torch.Tensor:
        """What a trained reference network reads in the place of text, states of that width. Raises ValueError as `tokens`."""
        return self._seen_by(width, "Refine", "reference network").details

    def _seen_by(self, width: int, who: str, what: str) -> States:
        """CLIP's states of that width."""
        if self.states is None:
            raise ValueError(
                f"{who}'s {what} reads what CLIP sees of the subject, and this one was encoded without: connect Load CLIP Vision "
                f"to Encode Subject, with CLIP ViT-H ({WHERE_TO_GET}) in models/clip_vision."
            )
        if (given := self.states.own.shape[2]) != width:
            raise ValueError(
                f"{who}'s {what} reads what a CLIP Vision of width {width} sees, and the subject was shown to one of width "
                f"{given}: connect the one that belongs to the {what} to Encode Subject; published ones read CLIP ViT-H (width "
                f"1280), {WHERE_TO_GET} in models/clip_vision."
            )
        return self.states

    def branch_latents(self) -> torch.Tensor:
        """`latents`. Raises ValueError, in one sentence, where there are none."""
        if self.latents is None:
            raise ValueError(
                "Refine reads the subject's latent, and this one was encoded without: connect the checkpoint's VAE to Encode "
                "Subject."
            )
        return self.latents


def clip_states(clip_vision: Any, subjects: Sequence[torch.Tensor]) -> States:
    """Looks at subjects on white, [h, w, 3] each (`imaging.subject.cut_out`), with a host CLIP_VISION.

    Raises ValueError, in one sentence, for a vision model that is not CLIP.
    """
    if clip_vision.model_type != "clip_vision_model":
        raise ValueError(
            f"Encode Subject was given a vision model of another kind ({clip_vision.model_type}), and needs CLIP ViT-H: put a "
            f"file such as {WHERE_TO_GET} into models/clip_vision and load it."
        )
    squares = torch.stack([for_clip(subject) for subject in subjects])
    seen = clip_vision.encode_image(squares, crop=False)
    # No picture is all zero once the host has normalized it: what is black is not.
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    zeros = torch.zeros(1, 3, CLIP_SIDE, CLIP_SIDE, device=clip_vision.load_device)
    with torch.no_grad():
        _, nothing, *_ = clip_vision.model(pixel_values=zeros, intermediate_output=-2)
    own = seen["penultimate_hidden_states"]
    return States(own=own, nothing=nothing.to(own.device), details=seen["last_hidden_state"])


def squares(subjects: Sequence[torch.Tensor], side: int) -> torch.Tensor:
    """Subjects on white as the branch reads them: [S, side, side, 3]."""
    return torch.stack([for_branch(subject, side) for subject in subjects])
