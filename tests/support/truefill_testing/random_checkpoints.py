"""Writes random-weight checkpoints in the published formats, as small as the host's loader accepts.

They stand in for models that cannot be downloaded: keys, shapes and scales are those of real files, the pictures are noise.
Needs the host's modules on sys.path.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from devtools.pack import pack_module

FAMILIES = ("sd15", "sd2", "sdxl", "x4")
VOCABULARY, TOKENS = 49408, 77

Fill = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file; without `fill` it is all zeros and becomes a hole in the file."""

    name: str
    shape: tuple[int, ...]
    fill: Fill | None = None


def _ones(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.ones(shape)


def _constant(value: float) -> Fill:
    return lambda shape, generator: torch.full(shape, value)


def _normal(std: float) -> Fill:
    return lambda shape, generator: torch.empty(shape).normal_(0.0, std, generator=generator)


def _uniform(bound: float) -> Fill:
    return lambda shape, generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _default_init(shape: tuple[int, ...], gain: float = 1.0) -> Fill:
    """torch's default for a linear or convolution weight, times gain."""
    return _uniform(gain / math.sqrt(math.prod(shape[1:])))


def _unet_config(family: str, in_channels: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "image_size": 32,
        "in_channels": in_channels,
        "out_channels": 4,
        "model_channels": 320,
        "use_spatial_transformer": True,
    }
    # As in the real models there is attention at latent/2 and latent/4, on the way down and up.
    four_levels = config | {"channel_mult": [1, 1, 1, 1], "num_res_blocks": [1, 1, 1, 1], "transformer_depth_middle": 1}
    upper_levels = {"transformer_depth": [1, 1, 1, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0]}
    if family == "sd15":
        return four_levels | upper_levels | {"context_dim": 768, "num_heads": 8}
    if family == "sd2":
        heads = {"num_head_channels": 64, "use_linear_in_transformer": True}
        return four_levels | upper_levels | {"context_dim": 1024, **heads}
    if family == "x4":
        return four_levels | {
            "model_channels": 256,
            "transformer_depth": [0, 1, 1, 1],
            "transformer_depth_output": [0, 0, 1, 1, 1, 1, 1, 1],
            "context_dim": 1024,
            "num_heads": 8,
            "use_linear_in_transformer": True,
            "num_classes": 1000,
            # Text in the place of self-attention, but at the lowest level.
            "disable_self_attentions": [True, True, True, False],
        }
    # The host tells SDXL by its depths on the way down; those of the middle and the way up are free.
    return config | {
        "channel_mult": [1, 1, 1],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 2048,
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    }


def _unet_entries(family: str, inpainting: bool) -> Iterator[Entry]:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(
        **_unet_config(family, 7 if family == "x4" else 9 if inpainting else 4),
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    yield from _network_entries(unet, "model.diffusion_model.")


def _controlnet_entries(family: str) -> Iterator[Entry]:
    import comfy.cldm.cldm
    import comfy.ops

    config = _unet_config(family, 4)
    for name in ("out_channels", "transformer_depth_output"):
        del config[name]
    net = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, device="meta", operations=comfy.ops.disable_weight_init)
    yield from _network_entries(net, "control_model.")


def _network_entries(network: torch.nn.Module, prefix: str) -> Iterator[Entry]:
    for name, tensor in network.state_dict().items():
        shape = tuple(tensor.shape)
        if len(shape) > 1:
            # Sharper queries and keys than torch's default, whose attention is nearly uniform, so that prompts
            # and attention edits show; an output of about unit scale, like the noise it stands for.
            gain = 2.0 if name.endswith(("to_q.weight", "to_k.weight")) else 3.0 if name == "out.2.weight" else 1.0
            fill = _default_init(shape, gain)
        elif name.endswith("weight"):
            fill = _ones
        else:
            fill = None
        yield Entry(prefix + name, shape, fill)


_LAST_LAYERS = {"taesd_encoder.14.weight": 10.0, "taesd_decoder.19.weight": 0.06}


def _vae_entries() -> Iterator[Entry]:
    from comfy.taesd.taesd import TAESD

    with torch.device("meta"):
        vae = TAESD()
    for name, tensor in vae.state_dict().items():
        shape = tuple(tensor.shape)
        if name == "vae_scale":
            fill = _ones
        elif len(shape) > 1:
            # He's gain keeps the scale through the rectifiers, and a damped residual branch that of the sums. The
            # last layers give latents and pictures of a real model's range.
            gain = math.sqrt(6.0)
            if name.endswith(".conv.4.weight"):
                gain *= 0.3
            fill = _default_init(shape, _LAST_LAYERS.get(name, gain))
        elif name == "taesd_decoder.19.bias":
            fill = _constant(0.5)
        else:
            fill = None
        yield Entry(f"first_stage_model.{name}", shape, fill)


def _x4_vae_entries() -> Iterator[Entry]:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    full_size = pack_module("evaluation.full_size")
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=full_size.X4_VAE, embed_dim=4)
    for name, tensor in vae.state_dict().items():
        shape = tuple(tensor.shape)
        fill = _default_init(shape) if len(shape) > 1 else _ones if name.endswith("weight") else None
        yield Entry(f"first_stage_model.{name}", shape, fill)


def clip_l_entries(prefix: str) -> Iterator[Entry]:
    """CLIP ViT-L/14's text model under the names of transformers."""
    width = 768
    yield Entry(f"{prefix}embeddings.position_embedding.weight", (TOKENS, width), _normal(0.5))
    yield Entry(f"{prefix}embeddings.token_embedding.weight", (VOCABULARY, width), _normal(1.0))
    for layer in range(12):
        block = f"{prefix}encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            yield Entry(f"{block}{norm}.weight", (width,), _ones)
            yield Entry(f"{block}{norm}.bias", (width,))
        for linear in ("k_proj", "q_proj", "v_proj", "out_proj"):
            # One attending layer mixes the tokens; the others pass them through.
            fill = _default_init((width, width), 2.0) if layer == 0 else None
            yield Entry(f"{block}self_attn.{linear}.weight", (width, width), fill)
            yield Entry(f"{block}self_attn.{linear}.bias", (width,))
        yield Entry(f"{block}mlp.fc1.weight", (4 * width, width))
        yield Entry(f"{block}mlp.fc1.bias", (4 * width,))
        yield Entry(f"{block}mlp.fc2.weight", (width, 4 * width))
        yield Entry(f"{block}mlp.fc2.bias", (width,))
    yield Entry(f"{prefix}final_layer_norm.weight", (width,), _ones)
    yield Entry(f"{prefix}final_layer_norm.bias", (width,))


def _open_clip_entries(prefix: str, width: int, layers: int) -> Iterator[Entry]:
    """A text model of open_clip (ViT-H: 1024 wide, 24 layers; ViT-bigG: 1280, 32)."""
    yield Entry(f"{prefix}positional_embedding", (TOKENS, width), _normal(0.5))
    yield Entry(f"{prefix}token_embedding.weight", (VOCABULARY, width), _normal(1.0))
    yield Entry(f"{prefix}text_projection", (width, width), _default_init((width, width), math.sqrt(3.0)))
    for layer in range(layers):
        block = f"{prefix}transformer.resblocks.{layer}."
        for norm in ("ln_1", "ln_2"):
            yield Entry(f"{block}{norm}.weight", (width,), _ones)
            yield Entry(f"{block}{norm}.bias", (width,))
        fill = _default_init((width, width), 2.0) if layer == 0 else None
        yield Entry(f"{block}attn.in_proj_weight", (3 * width, width), fill)
        yield Entry(f"{block}attn.in_proj_bias", (3 * width,))
        yield Entry(f"{block}attn.out_proj.weight", (width, width), fill)
        yield Entry(f"{block}attn.out_proj.bias", (width,))
        yield Entry(f"{block}mlp.c_fc.weight", (4 * width, width))
        yield Entry(f"{block}mlp.c_fc.bias", (4 * width,))
        yield Entry(f"{block}mlp.c_proj.weight", (width, 4 * width))
        yield Entry(f"{block}mlp.c_proj.bias", (width,))
    yield Entry(f"{prefix}ln_final.weight", (width,), _ones)
    yield Entry(f"{prefix}ln_final.bias", (width,))


def _text_entries(family: str) -> Iterator[Entry]:
    if family == "sd15":
        yield from clip_l_entries("cond_stage_model.transformer.text_model.")
    elif family in ("sd2", "x4"):
        yield from _open_clip_entries("cond_stage_model.model.", 1024, 24)
    else:
        yield from clip_l_entries("conditioner.embedders.0.transformer.text_model.")
        yield from _open_clip_entries("conditioner.embedders.1.model.", 1280, 32)


def _write(path: Path, entries: list[Entry], seed: int) -> Path:
    """Write a half-precision safetensors file in which all-zero tensors are holes. It appears complete or not at all."""
    header, offset = {}, 0
    for entry in entries:
        size = 2 * math.prod(entry.shape)
        header[entry.name] = {"dtype": "F16", "shape": entry.shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            for entry in entries:
                if entry.fill is not None:
                    file.seek(start + header[entry.name]["data_offsets"][0])
                    file.write(entry.fill(entry.shape, generator).half().numpy().tobytes())
            file.truncate(start + offset)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_checkpoint(path: str | Path, family: str, inpainting: bool, seed: int = 0) -> Path:
    """Write a random checkpoint of one family ("sd15", "sd2", "sdxl", or "x4" for the upscaler) and return its path.

    The file appears complete or not at all. Raises ValueError for an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no checkpoint family {family!r}; choose one of {', '.join(FAMILIES)}.")
    vae = _x4_vae_entries() if family == "x4" else _vae_entries()
    return _write(Path(path), [*_unet_entries(family, inpainting), *_text_entries(family), *vae], seed)


def write_controlnet(path: Path, seed: int = 0) -> Path:
    """Write a random ControlNet that goes with "sd15", under the names of the released ones."""
    return _write(path, list(_controlnet_entries("sd15")), seed)


def write_lora(path: Path, seed: int = 0) -> Path:
    """Write a random LoRA of rank 2 for two layers of "sdxl" that each attend to the text, under kohya's names."""
    entries = []
    for block in ("input_blocks_4_1", "output_blocks_4_1"):
        name = f"lora_unet_{block}_transformer_blocks_0_attn2_to_q"
        entries += [
            Entry(f"{name}.alpha", (), _constant(2.0)),
            Entry(f"{name}.lora_down.weight", (2, 320), _normal(0.3)),
            Entry(f"{name}.lora_up.weight", (320, 2), _normal(0.3)),
        ]
    return _write(path, entries, seed)
