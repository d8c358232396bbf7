"""LAR-Gen's checkpoint as objects of the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import comfy.clip_vision
import comfy.sd
import folder_paths
import torch


class Loaded(NamedTuple):
    """The host's MODEL, CLIP, VAE and CLIP_VISION, and the pooled text [1, P] of an empty prompt."""

    model: Any
    clip: Any
    vae: Any
    vision: Any
    pooled: torch.Tensor


def load_checkpoint(base: Mapping[str, torch.Tensor], vision: Mapping[str, torch.Tensor], name: str) -> Loaded:
    """Loads UNet, text encoders and VAE (`base`, as an SDXL checkpoint names them), and CLIP ViT-H, by the host's own loaders.

    Raises ValueError, in one sentence that begins with the file's `name`, where these find something missing.
    """
    embeddings = folder_paths.get_folder_paths("embeddings")
    found = comfy.sd.load_state_dict_guess_config(dict(base), embedding_directory=embeddings)
    model, clip, vae = (None, None, None) if found is None else found[:3]
    seen = comfy.clip_vision.load_clipvision_from_sd(dict(vision))
    for part, what in ((model, "UNet"), (clip, "text encoder"), (vae, "VAE"), (seen, "CLIP Vision")):
        if part is None:
            raise ValueError(f"{name} is incomplete or changed: ComfyUI finds no {what} in it; download it again.")
    assert clip is not None
    encoded: Any = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)
    return Loaded(model, clip, vae, seen, encoded[1])
