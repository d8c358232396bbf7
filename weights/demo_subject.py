"""What the demo model has learned of subjects: LAR-Gen in small, as objects of the host.

Its tensors have the names of LAR-Gen's checkpoint. One file has the UNet with its projections, CLIP's vision model and the
resampler; another, which may be missing, what was trained of the reference network, whose rest is the text-to-image demo
model's. Text encoder and autoencoder are the demo model's own. The files are written by `python dev.py train export`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_patcher
import comfy.sd

from .demo_model import FOLDER, UNET_PREFIX, host_clip, host_unet, host_vae, read, read_file
from .lar_gen import SubjectWeights, subject_weights

FILE = "truefill_demo_subject.safetensors"
REFERENCE_FILE = "truefill_demo_reference.safetensors"
LIKENESS_FILE = "truefill_demo_likeness.safetensors"
"""The benchmark's own eyes for subjects."""
VISION_CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 160,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "hidden_act": "quick_gelu",
    "image_size": 224,
    "patch_size": 28,
    "num_channels": 3,
    "projection_dim": 128,
}
"""CLIP's vision model in small, as the host reads such a description."""
VISION_PREFIX, RESAMPLER_PREFIX, DETAIL_PREFIX, BRANCH_PREFIX = (
    "image_encoder.",
    "image_proj_model.",
    "patch_projector.",
    "ref_",
)


@dataclass(frozen=True, eq=False)
class DemoSubject:
    """The host's MODEL, CLIP, VAE and CLIP_VISION; what Assign reads; and the reference network, with 4 input channels, where
    there is one."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    vision: comfy.clip_vision.ClipVisionModel
    weights: SubjectWeights
    branch: comfy.model_patcher.ModelPatcher | None


def load_demo_subject(folder: Path = FOLDER) -> DemoSubject:
    """The demo model that reads subjects. Raises FileNotFoundError where the folder lacks a file."""
    state = read_file(FILE, folder)
    if (folder / REFERENCE_FILE).is_file():
        state |= read_file(REFERENCE_FILE, folder)
    weights = subject_weights(state, "The demo model's file", VISION_CONFIG["hidden_size"])
    unet = {name: of for name, of in state.items() if name.startswith(UNET_PREFIX) and "_ip." not in name}
    trained = {UNET_PREFIX + name: tensor for name, tensor in weights.branch.items()}
    vision = comfy.clip_vision.ClipVisionModel(VISION_CONFIG)
    missing, unexpected = vision.load_sd(
        {name.removeprefix(VISION_PREFIX): of for name, of in state.items() if name.startswith(VISION_PREFIX)}
    )
    if wrong := [*missing, *unexpected]:
        raise RuntimeError(f"The demo model's CLIP Vision does not fit: {', '.join(wrong[:3])}.")
    return DemoSubject(
        model=host_unet(unet),
        clip=host_clip(read("text", folder)),
        vae=host_vae(read("vae", folder)),
        vision=vision,
        weights=weights,
        branch=host_unet(read("text2image", folder) | trained) if trained else None,
    )
