"""The demo model: a latent-diffusion family small enough to ship, as objects of the host.

The plan is that of SD1.5 with fewer channels and levels: 32x32 latents of 256 pixels, self-attention and text attention at
latent / 2 and latent / 4 and in the middle, eps-prediction, scaled-linear betas, a CLIP text model over CLIP's tokenizer with
77 tokens, a TAESD. A UNet of this size is none of the families that the host's loader tells apart, so it is put together here,
in the order in which that loader does it. The files are written by `python dev.py train export`; where no other folder is named,
they are looked for in `demo/`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch

FOLDER = Path(__file__).resolve().parent / "demo"
FILES = {name: f"truefill_demo_{name}.safetensors" for name in ("vae", "text", "text2image", "inpaint", "classifier")}
"""The networks and their files. `classifier` belongs to the benchmark."""
SEGMENTER_FILE = "truefill_demo_segmenter.safetensors"
"""A small Segment Anything of the demo model's world, which `weights.segmenters` reads."""
KINDS = {"inpainting": "inpaint", "text-to-image": "text2image"}
"""The UNets by the name that a user sees: 9 and 4 input channels."""

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
TOKEN_IDS = "token_ids"
CONTEXT_DIM = 192
TOKENS, VOCABULARY_SIZE, _END = 77, 49408, 49407
LATENT_SCALE: float = comfy.latent_formats.SD15().scale_factor
"""What the host multiplies the latents of an SD1.5 VAE by."""

TEXT_CONFIG = {
    "num_hidden_layers": 4,
    "hidden_size": CONTEXT_DIM,
    "num_attention_heads": 3,
    "intermediate_size": 4 * CONTEXT_DIM,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": TOKENS,
    "eos_token_id": _END,
}


def unet_config(in_channels: int) -> dict[str, Any]:
    """Arguments of the host's UNetModel; 4 input channels for text-to-image, 9 for inpainting."""
    return {
        "image_size": 32,
        "in_channels": in_channels,
        "out_channels": 4,
        "model_channels": 64,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": [2, 1, 1],
        "transformer_depth": [0, 0, 1, 1],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "num_heads": -1,
        "num_head_channels": 32,
        "context_dim": CONTEXT_DIM,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "legacy": False,
        "adm_in_channels": None,
    }


def _model_config(in_channels: int) -> comfy.supported_models.SD15:
    plan = unet_config(in_channels)
    config = comfy.supported_models.SD15(dict(plan))
    # SD1.5's own head count is not this model's.
    config.unet_config.update({key: plan[key] for key in ("num_heads", "num_head_channels")})
    return config


def read(network: str, folder: Path = FOLDER) -> dict[str, torch.Tensor]:
    """The state dict of one of FILES; raises FileNotFoundError where the folder has no such file."""
    return read_file(FILES[network], folder)


def read_file(name: str, folder: Path = FOLDER) -> dict[str, torch.Tensor]:
    """The state dict of one of the demo model's files; raises FileNotFoundError where the folder has no such file."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"The folder {folder} has no {path.name}: `python dev.py train export` writes the demo model's files."
        )
    state: Any = comfy.utils.load_torch_file(str(path), safe_load=True)
    return state


def host_unet(state: Mapping[str, torch.Tensor], disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The host's MODEL from a UNet file's state dict. Raises RuntimeError where a key is missing or of another shape.

    disable_dynamic: as in the host's loaders, without its dynamic VRAM.
    """
    config = _model_config(state[f"{UNET_PREFIX}input_blocks.0.0.weight"].shape[1])
    patcher = host_model(config, state, disable_dynamic)
    patcher.cached_patcher_init = (host_unet, (state,))
    return patcher


def host_model(
    config: Any, state: Mapping[str, torch.Tensor], disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    """The host's MODEL of one of its configurations with the weights of a state dict.

    The caller sets `cached_patcher_init`, by which the host loads it again, where it needs a copy of its own.
    """
    device = comfy.model_management.get_torch_device()
    parameters = comfy.utils.calculate_parameters(state, UNET_PREFIX)
    supported = list(config.supported_inference_dtypes)
    dtype = comfy.model_management.unet_dtype(
        model_params=parameters,
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(state, UNET_PREFIX),
    )
    # ComfyUI before 0.30 does not ask for the device.
    asked = inspect.signature(config.set_inference_dtype).parameters
    along = {"device": device} if "device" in asked else {}
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported), **along)
    first_device = comfy.model_management.unet_inital_load_device(parameters, dtype)
    model = config.get_model(state, UNET_PREFIX, device=first_device)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    weights = {name.removeprefix(UNET_PREFIX): tensor for name, tensor in state.items()}
    model.diffusion_model.load_state_dict(weights, assign=patcher.is_dynamic())
    # Since 0.30 ComfyUI makes its networks so.
    model.diffusion_model.requires_grad_(False)
    return patcher


def host_text_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of SD1.5's text encoder, with embeddings for all 49,408 tokens, from the text file's.

    The file has rows for the world's words only; every other token has the first row.
    """
    name = f"{TEXT_PREFIX}text_model.embeddings.token_embedding.weight"
    rows = state[name]
    table = rows[:1].repeat(VOCABULARY_SIZE, 1)
    table[state[TOKEN_IDS].long()] = rows[1:]
    return {key: tensor for key, tensor in state.items() if key != TOKEN_IDS} | {name: table}


def host_clip(state: Mapping[str, torch.Tensor]) -> comfy.sd.CLIP:
    """The host's CLIP from the text file's state dict. Raises RuntimeError where a key is missing or has no place."""
    config = _model_config(4)
    target = config.clip_target()
    target.params = {}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(tensor.numel() for tensor in state.values()),
        # SD1.5's text encoder in this model's size.
        model_options={"clip_l_model_config": TEXT_CONFIG},
    )
    missing, unexpected = clip.load_sd(config.process_clip_state_dict(host_text_state(state)), full_model=True)
    # SD1.5's files have neither of these two.
    missing = [key for key in missing if not key.endswith(("logit_scale", "text_projection.weight"))]
    wrong = [*missing, *unexpected]
    if wrong:
        raise RuntimeError(f"The demo model's text encoder does not fit: {', '.join(wrong[:3])}.")
    return clip


def host_vae(state: dict[str, torch.Tensor]) -> comfy.sd.VAE:
    """The host's VAE from the VAE file's state dict."""
    return comfy.sd.VAE(sd=state)


def load_demo_model(
    kind: str, folder: Path = FOLDER
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the demo model; `kind` is one of KINDS.

    Raises ValueError for another kind and FileNotFoundError where the folder lacks a file.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no demo model '{kind}'; there are: {', '.join(KINDS)}.")
    return host_unet(read(KINDS[kind], folder)), host_clip(read("text", folder)), host_vae(read("vae", folder))
