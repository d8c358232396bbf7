"""Files that stand in for the models that the shipped graphs name: of the real formats, with other weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from devtools.pack import ROOT, ensure_host, pack_module
from truefill_testing.checkpoints import checkpoint

CHECKPOINTS = {
    "sd-v1-5-inpainting.safetensors": ("sd15", True),
    "512-inpainting-ema.safetensors": ("sd2", True),
    "sd_xl_base_1.0.safetensors": ("sdxl", False),
    "v1-5-pruned-emaonly-fp16.safetensors": ("sd15", False),
    "x4-upscaler-ema.safetensors": ("x4", False),
}
"""Family and whether it is an inpainting model."""
ANYTHING = {"threshold": 0.0, "pick": "best", "smallest": 4.0, "largest": 30.0}
"""Settings of Mask From Text with which a detector that has learned nothing finds something."""
THE_MOON = {"include": '[{"x":45,"y":80}]', "exclude": ""}
"""Settings of Segment that mean something to the segmenter in the toy scene, all that it has learned to see."""
SHORT_PILOT = {"preset": "text", "interval": 2, "iterations": 1}
"""Settings of PILOT's nodes with which two steps take three passes."""
SHORT_DREAMMIX = {"steps": 2, "local_share": 0.5, "native_size": 128}
"""Settings of DreamMix's node with which each stage takes one small step."""
SHORT_TRAINING = {"steps": 1, "accumulate": 1, "native_size": 128}
"""Settings of Train Subject with which it learns next to nothing."""
SMALL_SAM3 = ROOT / "tests" / "support" / "small_sam3"
"""A pack for the server: without it the host would wait for layers that the file does not have."""
SMALL_CLIP_H = ROOT / "tests" / "support" / "small_clip_h"
"""Likewise."""
SMALL_TEXT_ENCODERS = ROOT / "tests" / "support" / "small_text_encoders"
"""A pack for the server: without it the host would run layers that do nothing in the tests' checkpoints."""
SMALL_TRANSFORMERS = ROOT / "tests" / "support" / "small_transformers"
"""A pack for the server: small networks for files that are empty."""
LAZY_WEIGHTS = ROOT / "tests" / "support" / "lazy_weights"
"""A pack for the server: weights as ComfyUI has them on an NVIDIA GPU by default."""
SLOW_NODE = ROOT / "evaluation" / "slow_node"
"""A pack for the server: a node that takes its time and no processor."""
EMPTY = (
    "diffusion_models/flux1-fill-dev.safetensors",
    "diffusion_models/flux1-dev.safetensors",
    "diffusion_models/qwen_image_fp8_e4m3fn.safetensors",
    "diffusion_models/z_image_turbo_bf16.safetensors",
    "diffusion_models/flux-2-klein-4b-fp8.safetensors",
    "controlnet/Qwen-Image-InstantX-ControlNet-Inpainting.safetensors",
    "text_encoders/clip_l.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "text_encoders/qwen_3_4b.safetensors",
)
"""What that pack makes a small network of."""


def _write_detector(path: Path) -> None:
    from truefill_testing.random_dino import shallow_dino

    torch.save({"model": shallow_dino()}, path)


def _write_sam3(path: Path) -> None:
    from truefill_testing.random_sam3 import random_sam3

    save_file(random_sam3(), path)


def _write_segmenter(path: Path) -> None:
    """The demo's: what it sees in a photo means nothing, and can be nothing at all."""
    demo = pack_module("weights.demo_model")
    torch.save(load_file(demo.FOLDER / demo.SEGMENTER_FILE), path)


def _write_controlnet(path: Path) -> None:
    ensure_host()
    from truefill_testing.random_checkpoints import write_controlnet

    write_controlnet(path)


def _write_lora(path: Path) -> None:
    ensure_host()
    from truefill_testing.random_checkpoints import write_lora

    write_lora(path)


def _write_vision(path: Path) -> None:
    from truefill_testing.subject_weights import write_vision

    write_vision(path)


def _write_adapter_sd15(path: Path) -> None:
    from truefill_testing.subject_weights import write_adapter

    write_adapter(path, checkpoint("sd15", inpainting=True))


def _write_adapter_sdxl(path: Path) -> None:
    from truefill_testing.subject_weights import write_adapter

    write_adapter(path, checkpoint("sdxl", inpainting=False))


def _write_branch_sd15(path: Path) -> None:
    from truefill_testing import branch_files

    layout = branch_files.of_checkpoint(branch_files.BRUSHNET_SD15, resnets=1)
    save_file(branch_files.in_half(branch_files.random_branch(layout, 1)), path)


def _write_branch_sdxl(path: Path) -> None:
    from truefill_testing import branch_files

    layout = branch_files.of_checkpoint(branch_files.BRUSHNET_SDXL, resnets=2)
    save_file(branch_files.in_half(branch_files.random_branch(layout, 2)), path)


def _write_powerpaint(path: Path) -> None:
    from truefill_testing import branch_files

    layout = branch_files.of_checkpoint(branch_files.POWERPAINT, resnets=1)
    save_file(branch_files.in_half(branch_files.random_branch(layout, 3)), path)


def _write_powerpaints_encoder(path: Path) -> None:
    from truefill_testing.task_encoders import write_task_encoder

    write_task_encoder(path)


def _write_vae(path: Path) -> None:
    """An autoencoder with 16 channels in TAESD's format, which is the host's smallest."""
    ensure_host()
    from comfy.taesd.taesd import TAESD

    _write_random(TAESD(latent_channels=16), path)


def _write_flux2_vae(path: Path) -> None:
    """An autoencoder with 128 channels at 1/16, in the same format."""
    ensure_host()
    from comfy.taesd.taesd import TAESD

    _write_random(TAESD(latent_channels=128), path, {"tae_latent_channels": "128"})


def _write_wan_vae(path: Path) -> None:
    """Qwen-Image's autoencoder with few channels."""
    ensure_host()
    from comfy.ldm.wan.vae import WanVAE

    plan = {
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
    }
    _write_random(WanVAE(dim=8, z_dim=16, **plan), path)


def _write_random(network: torch.nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, tensor in state.items():
        if "gamma" in name or name == "vae_scale":
            tensor.fill_(1.0)
        elif tensor.ndim > 1:
            tensor.uniform_(-1.0, 1.0, generator=generator).mul_(tensor[0].numel() ** -0.5)
        else:
            tensor.zero_()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)


_WRITTEN = {
    "vae/ae.safetensors": _write_vae,
    "vae/flux2-vae.safetensors": _write_flux2_vae,
    "vae/qwen_image_vae.safetensors": _write_wan_vae,
    "inpaint/brushnet_random_mask_fp16.safetensors": _write_branch_sd15,
    "inpaint/brushnet_random_mask_sdxl.safetensors": _write_branch_sdxl,
    "inpaint/diffusion_pytorch_model.safetensors": _write_powerpaint,
    "inpaint/pytorch_model.bin": _write_powerpaints_encoder,
    "clip_vision/model.safetensors": _write_vision,
    "ipadapter/ip-adapter-plus_sd15.safetensors": _write_adapter_sd15,
    "ipadapter/ip-adapter-plus_sdxl_vit-h.safetensors": _write_adapter_sdxl,
    "controlnet/control_v11p_sd15_canny_fp16.safetensors": _write_controlnet,
    "loras/papercut.safetensors": _write_lora,
    "checkpoints/sam3.1_multiplex_fp16.safetensors": _write_sam3,
    "grounding-dino/groundingdino_swint_ogc.pth": _write_detector,
    "sams/sam_vit_b_01ec64.pth": _write_segmenter,
}


def place_names(models: Path) -> None:
    """Put empty files into a folder laid out like ComfyUI's `models`, for graphs that are looked at and not run."""
    for name in (*(f"checkpoints/{file}" for file in CHECKPOINTS), *_WRITTEN, *EMPTY):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).touch()


def place_stand_ins(models: Path) -> list[Path]:
    """Put all of them into a folder laid out like ComfyUI's `models`; returns the new files."""
    placed = []
    for name, kind in CHECKPOINTS.items():
        placed.append(models / "checkpoints" / name)
        placed[-1].parent.mkdir(parents=True, exist_ok=True)
        placed[-1].symlink_to(checkpoint(*kind))
    for name, write in _WRITTEN.items():
        placed.append(models / name)
        placed[-1].parent.mkdir(parents=True, exist_ok=True)
        write(placed[-1])
    for name in EMPTY:
        placed.append(models / name)
        placed[-1].parent.mkdir(parents=True, exist_ok=True)
        placed[-1].touch()
    return placed
