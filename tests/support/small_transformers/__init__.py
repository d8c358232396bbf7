"""A pack for tests: where the file of a transformer, of its text encoder or its ControlNet is empty, the host loads a small one.

And what a file says of the autoencoder in it, which is text, the host takes for numbers.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import comfy.controlnet
import comfy.latent_formats
import comfy.memory_management
import comfy.ops
import comfy.sd
import comfy.text_encoders.flux
import comfy.text_encoders.qwen_image
import comfy.text_encoders.z_image
import torch
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

sys.path.append(str(Path(__file__).resolve().parents[1]))
# Test support makes the host importable, which it is here.
sys.modules["devtools"], sys.modules["devtools.pack"] = ModuleType("devtools"), ModuleType("devtools.pack")
sys.modules["devtools.pack"].__dict__["ensure_host"] = lambda: None

TRANSFORMERS = {
    "flux1-fill-dev.safetensors": "flux_fill",
    "flux1-dev.safetensors": "flux",
    "qwen_image_fp8_e4m3fn.safetensors": "qwen_image",
    "z_image_turbo_bf16.safetensors": "z_image",
    "flux-2-klein-4b-fp8.safetensors": "flux2",
}
TEXT_ENCODERS = {
    "clip_l.safetensors": ("flux", comfy.text_encoders.flux.FluxTokenizer),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": ("qwen_image", comfy.text_encoders.qwen_image.QwenImageTokenizer),
    "qwen_3_4b.safetensors": ("z_image", comfy.text_encoders.z_image.ZImageTokenizer),
}
KLEINS = ("flux2", comfy.text_encoders.flux.KleinTokenizer)
"""Its text encoder comes in Z-Image's file."""
_LOAD_MODEL, _LOAD_CLIP = comfy.sd.load_diffusion_model, comfy.sd.load_clip
_LOAD_CONTROLNET, _INIT_VAE = comfy.controlnet.load_controlnet, comfy.sd.VAE.__init__


def _weights_at_once() -> Any:
    """Within it the host's layers have weights at once, as these networks need, which no file fills."""
    return mock.patch.object(comfy.memory_management, "aimdo_enabled", False, create=True)


class SmallClip:
    """The host's CLIP interface: the family's tokenizer, and a random embedding for each token."""

    def __init__(self, family: str, tokenizer: Any) -> None:
        self._family, self._tokenizer = family, tokenizer()

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        return self._tokenizer.tokenize_with_weights(text, return_word_ids, **kwargs)

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any], add_dict: dict[str, Any] | None = None) -> list:
        from truefill_testing.small_transformers import transformer_conditioning

        rows = [token[0] for chunk in list(tokens.values())[-1] for token in chunk]
        ((_, options),) = transformer_conditioning(self._family, 1, len(rows))
        ((table, _),) = transformer_conditioning(self._family, 2, 1000)
        text = table[:, torch.tensor(rows) % 1000]
        return [[text, {**options, **(add_dict or {})}]]


@functools.wraps(_LOAD_MODEL)
def _load_model(unet_path: str, *args: Any, **kwargs: Any) -> Any:
    path = Path(unet_path)
    if path.stat().st_size:
        return _LOAD_MODEL(unet_path, *args, **kwargs)
    from truefill_testing.small_transformers import small_transformer

    with _weights_at_once():
        return small_transformer(TRANSFORMERS[path.name])


@functools.wraps(_LOAD_CLIP)
def _load_clip(ckpt_paths: list[str], *args: Any, **kwargs: Any) -> Any:
    path = Path(ckpt_paths[0])
    if path.stat().st_size:
        return _LOAD_CLIP(ckpt_paths, *args, **kwargs)
    return SmallClip(*(KLEINS if kwargs.get("clip_type") == comfy.sd.CLIPType.FLUX2 else TEXT_ENCODERS[path.name]))


@functools.wraps(_LOAD_CONTROLNET)
def _load_controlnet(ckpt_path: str, *args: Any, **kwargs: Any) -> Any:
    """Qwen-Image's for inpainting, which reads the mask besides."""
    if Path(ckpt_path).stat().st_size:
        return _LOAD_CONTROLNET(ckpt_path, *args, **kwargs)
    from truefill_testing.small_transformers import small_transformer

    cpu = torch.device("cpu")
    with _weights_at_once():
        like = small_transformer("qwen_image").model.model_config.unet_config
        operations = comfy.ops.disable_weight_init
        network = QwenImageControlNetModel(4, operations=operations, **{**like, "dtype": torch.float32, "device": cpu})
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(0.0, 0.1, generator=generator)
    return comfy.controlnet.ControlNet(
        network,
        compression_ratio=1,
        latent_format=comfy.latent_formats.Wan21(),
        concat_mask=True,
        load_device=cpu,
        manual_cast_dtype=None,
    )


@functools.wraps(_INIT_VAE)
def _init_vae(self: Any, *args: Any, metadata: Any = None, **kwargs: Any) -> None:
    channels = (metadata or {}).get("tae_latent_channels")
    known = metadata if channels is None else {**metadata, "tae_latent_channels": int(channels)}
    _INIT_VAE(self, *args, metadata=known, **kwargs)


comfy.sd.load_diffusion_model, comfy.sd.load_clip = _load_model, _load_clip
comfy.controlnet.load_controlnet, comfy.sd.VAE.__init__ = _load_controlnet, _init_vae

NODE_CLASS_MAPPINGS = {}
