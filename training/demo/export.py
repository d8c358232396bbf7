"""Writes trained networks as the files that `weights.demo_model` reads: half-precision safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...weights.demo_dit import FILE as DIT_FILE
from ...weights.demo_model import FILES, LATENT_SCALE, SEGMENTER_FILE, TEXT_PREFIX, TOKEN_IDS, UNET_PREFIX
from ...weights.demo_subject import FILE as SUBJECT_FILE
from ...weights.demo_subject import LIKENESS_FILE, REFERENCE_FILE
from ...weights.painternet import DEMO_FILE as BRANCH_FILE
from ...weights.painternet import HEAD_CHANNELS
from ..lar_gen.export import reference_state, subject_state
from ..lar_gen.stages import ASSIGN, LIKENESS, REFINE, VISION
from ..loop import averaged_weights
from ..painternet.export import branch_tensors
from ..world.attributes import WORLD_VERSION
from .narrow_taesd import widen
from .vocabulary import world_vocabulary

# The stages that a file needs, where they are not called like it.
_STAGES = {"text": ("text2image",), "likeness": (LIKENESS,), "subject": (VISION, ASSIGN), "reference": (REFINE,)}


def _half(state: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor.detach().cpu().half().contiguous() for name, tensor in state.items()}


def write_vae(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a NarrowTAESD's weights as the host's TAESD."""
    save_file(_half(widen(state, LATENT_SCALE)), path)


def write_unet(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the weights of a UNet, or of a transformer, under the names of a checkpoint."""
    save_file(_half(state, UNET_PREFIX), path)


def write_text(state: Mapping[str, torch.Tensor], token_ids: torch.Tensor, path: Path) -> None:
    """Write a TextEncoder's weights and the tokens (int64 [rows - 1]) that its embeddings belong to."""
    save_file({**_half(state, TEXT_PREFIX), TOKEN_IDS: token_ids.to(torch.int32).contiguous()}, path)


def _record(stage: Path) -> dict[str, Any]:
    """How a stage was trained, and what it measured at its end."""
    state = torch.load(stage / "checkpoint.pt", map_location="cpu", weights_only=True)
    figures = stage / "figures.json"
    finished = figures.is_file() and state["step"] == state["identity"]["steps"]
    measured = json.loads(figures.read_text()) if finished else {}
    restarts = {"restarts": state["restarts"]} if state["restarts"] else {}
    return {**state["identity"], "trained_steps": state["step"], **restarts, "figures": measured}


def export(runs: Path, out: Path) -> list[Path]:
    """Write every stage that has a checkpoint in `runs` to `out`, averaged weights only; returns the weights' files.

    Besides there are the stages' settings and figures (recipe.json) and their loss curves. What is in `out` of stages that have
    no checkpoint stays. Raises FileNotFoundError where no stage has one, and ValueError where `out` is of another world.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / "recipe.json"
    recipe: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"stages": {}}
    if recipe.setdefault("world_version", WORLD_VERSION) != WORLD_VERSION:
        raise ValueError(
            f"{record} is of version {recipe['world_version']} of the world, this is version {WORLD_VERSION}: name another "
            "folder."
        )
    stages: dict[str, Any] = recipe["stages"]
    written: list[Path] = []
    for name, file in {
        **FILES,
        "segmenter": SEGMENTER_FILE,
        "likeness": LIKENESS_FILE,
        "subject": SUBJECT_FILE,
        "reference": REFERENCE_FILE,
        "branch": BRANCH_FILE,
        "dit": DIT_FILE,
    }.items():
        needed = _STAGES.get(name, (name,))
        if not all((runs / stage / "checkpoint.pt").is_file() for stage in needed):
            continue
        path = out / file
        stage = runs / needed[0]
        if name == "vae":
            write_vae(averaged_weights(stage, "vae"), path)
        elif name == "text":
            write_text(averaged_weights(stage, "text"), world_vocabulary().token_ids, path)
        elif name == "subject":
            save_file(_half(subject_state(runs)), path)
        elif name == "reference":
            save_file(_half(reference_state(runs)), path)
        elif name == "branch":
            tensors, head_channels = branch_tensors(stage)
            save_file(tensors, path, {HEAD_CHANNELS: str(head_channels)})
        elif name in ("classifier", "segmenter", "likeness"):
            save_file(_half(averaged_weights(stage, name)), path)
        else:
            write_unet(averaged_weights(stage, "network" if name == "dit" else "unet"), path)
        written.append(path)
        for stage in (runs / which for which in needed):
            stages[stage.name] = _record(stage)
            if (curves := stage / "losses.png").is_file():
                shutil.copyfile(curves, out / f"losses_{stage.name}.png")
    if not written:
        raise FileNotFoundError(f"No stage in {runs} has a checkpoint: train one first.")
    recipe["torch"] = torch.__version__
    record.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return written
