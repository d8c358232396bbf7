"""The demo model as a diffusion transformer (DiT): Flux's network in small, as an object of the host.

Text and picture attend to each other in one sequence, as in the models that have no UNet; it predicts a flow. It has no pooled
text, so that attention is the only way from the prompt to the picture. VAE and text encoder are those of `demo_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch

from .demo_model import CONTEXT_DIM, FOLDER, host_clip, host_model, host_vae, load_demo_model, read, read_file
from .demo_model import KINDS as UNETS

FILE = "truefill_demo_dit.safetensors"
KIND = "transformer"
KINDS = (*UNETS, KIND)
"""The demo models by the name that a user sees."""
SHIFT = 0.5
"""Of the noise schedule: Flux's for the 256 tokens that a picture has here."""


def network_config() -> dict[str, Any]:
    """Arguments of the host's Flux network."""
    return {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "vec_in_dim": None,
        "context_in_dim": CONTEXT_DIM,
        "hidden_size": 192,
        "mlp_ratio": 4.0,
        "num_heads": 3,
        "depth": 3,
        "depth_single_blocks": 6,
        "axes_dim": [16, 24, 24],
        "theta": 10_000,
        "qkv_bias": True,
        "guidance_embed": False,
        "txt_ids_dims": [],
    }


class _DemoDit(comfy.supported_models.Flux):
    latent_format = comfy.latent_formats.SD15
    sampling_settings: ClassVar = {"shift": SHIFT}


def host_dit(state: Mapping[str, torch.Tensor], disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The host's MODEL from the file's state dict. Raises RuntimeError where a key is missing or of another shape.

    disable_dynamic: as in the host's loaders, without its dynamic VRAM.
    """
    patcher = host_model(_DemoDit({"image_model": "flux", **network_config()}), state, disable_dynamic)
    patcher.cached_patcher_init = (host_dit, (state,))
    return patcher


def load_kind(kind: str, folder: Path = FOLDER) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a demo model; `kind` is one of KINDS. Raises as `load_demo_model`."""
    if kind not in KINDS:
        raise ValueError(f"There is no demo model '{kind}'; there are: {', '.join(KINDS)}.")
    if kind != KIND:
        return load_demo_model(kind, folder)
    return host_dit(read_file(FILE, folder)), host_clip(read("text", folder)), host_vae(read("vae", folder))
