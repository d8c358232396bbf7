"""Writes trained networks as files that the host's classes read: half-precision safetensors.

    truefill_demo_vae            a TAESD, recognised by the host's own VAE loader
    truefill_demo_text2image     UNet with 4 input channels (model.diffusion_model.*)
    truefill_demo_inpaint        UNet with 9 input channels (model.diffusion_model.*)
    truefill_demo_text           CLIP text model (cond_stage_model.transformer.*) with the world's words only: `read_text`
    truefill_demo_classifier     shape, colour and pattern of a crop

A UNet of this size is none of the families the host's loader guesses; `demo_models.host_model` makes the host's model of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .demo_models import LATENT_SCALE, host_text_state
from .loop import averaged_weights
from .narrow_taesd import widen
from .vocabulary import world_vocabulary

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
_TOKEN_IDS = "token_ids"
FILES = {name: f"truefill_demo_{name}.safetensors" for name in ("vae", "text", "text2image", "inpaint", "classifier")}
"""What is exported, and the file's name."""


def _half(state: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor.detach().cpu().half().contiguous() for name, tensor in state.items()}


def write_vae(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a NarrowTAESD's weights as the host's TAESD."""
    save_file(_half(widen(state, LATENT_SCALE)), path)


def write_unet(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a UNet's weights under the names of an SD1.5 checkpoint."""
    save_file(_half(state, UNET_PREFIX), path)


def write_text(state: Mapping[str, torch.Tensor], token_ids: torch.Tensor, path: Path) -> None:
    """Write a TextEncoder's weights and the tokens (int64 [rows - 1]) that its embeddings belong to."""
    save_file({**_half(state, TEXT_PREFIX), _TOKEN_IDS: token_ids.to(torch.int32).contiguous()}, path)


def _without(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def read_unet(path: Path) -> dict[str, torch.Tensor]:
    """A UNet's weights, for `demo_models.host_model`."""
    return _without(UNET_PREFIX, load_file(path))


def read_text(path: Path) -> dict[str, torch.Tensor]:
    """The weights of the host's CLIPTextModel, with embeddings for all 49,408 tokens."""
    state = load_file(path)
    return host_text_state(_without(TEXT_PREFIX, state), state[_TOKEN_IDS])


def export(runs: Path, out: Path) -> list[Path]:
    """Write every stage that has a checkpoint in `runs` to `out`, averaged weights only; returns the files.

    Raises FileNotFoundError where no stage has one.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, file in FILES.items():
        stage = runs / ("text2image" if name == "text" else name)
        if not (stage / "checkpoint.pt").is_file():
            continue
        path = out / file
        if name == "vae":
            write_vae(averaged_weights(stage, "vae"), path)
        elif name == "text":
            write_text(averaged_weights(stage, "text"), world_vocabulary().token_ids, path)
        elif name == "classifier":
            save_file(_half(averaged_weights(stage, "classifier")), path)
        else:
            write_unet(averaged_weights(stage, "unet"), path)
        written.append(path)
    if not written:
        raise FileNotFoundError(f"No stage in {runs} has a checkpoint: train one first.")
    return written
