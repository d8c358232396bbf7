"""The file of a subject's LoRA, and the one that a run which was stopped leaves beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from .adapters import as_file
from .tuning import Example, Tuner, Tuning


@dataclass(frozen=True)
class LoraFile:
    """`path` is the LoRA's; `unfinished` has its weights, the optimizer's state and the step, until it is done."""

    path: Path
    unfinished: Path


def lora_file(folder: Path, name: str) -> LoraFile:
    """The files of a new LoRA in `folder`. Raises ValueError, in one sentence, for a name that is none or taken."""
    name = name.strip().removesuffix(".safetensors")
    if not name or any(character in name for character in '/\\:*?"<>|') or name.startswith("."):
        raise ValueError(f"'name' is {name!r}, and must be the name of a file, such as my_toy.")
    path = folder / f"{name}.safetensors"
    if path.exists():
        raise ValueError(
            f"There is a LoRA {path.name} in {folder} already, and none is overwritten: choose another name."
        )
    return LoraFile(path, folder / f"{name}.unfinished")


def identity_of(tuning: Tuning, subject: Sequence[Example], regular: Sequence[Example]) -> str:
    """What a run has to have in common with the one that it goes on from: all but its length and how it saves memory."""
    settings = {key: value for key, value in asdict(tuning).items() if key not in ("steps", "recompute")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for example in (*subject, *regular):
        for tensor in (example.latent, example.masks, *(text for prompt in example.prompts for text, _ in prompt)):
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_lora(file: LoraFile, tuner: Tuner, words: str) -> None:
    """Writes the LoRA, whole or not at all, and removes the unfinished one. `words` are what calls it in a prompt.

    Raises ValueError, in one sentence, where it can't be written.
    """
    metadata = {"modelspec.trigger_phrase": words, "truefill.steps": str(tuner.step)}
    _write(file.path, as_file(tuner.adapters, tuner.unet_config), metadata)
    file.unfinished.unlink(missing_ok=True)


def keep_unfinished(file: LoraFile, tuner: Tuner, identity: str) -> None:
    """Writes what a run needs to go on. Raises ValueError, in one sentence, where it can't be written."""
    tensors = {}
    for name, adapter in tuner.adapters.items():
        for kind, weight in (("down", adapter.down), ("up", adapter.up)):
            tensors[f"{name}.{kind}"] = weight.detach().cpu().contiguous()
            for key, value in tuner.optimizer.state.get(weight, {}).items():
                tensors[f"{name}.{kind}.{key}"] = value.detach().cpu().contiguous()
    _write(file.unfinished, tensors, {"identity": identity, "step": str(tuner.step)})


def go_on(file: LoraFile, tuner: Tuner, identity: str) -> bool:
    """Brings a fresh run to where the unfinished one of its name was; False where there is none.

    Raises ValueError, in one sentence, for one of other pictures, prompts or settings.
    """
    if not file.unfinished.is_file():
        return False
    with safe_open(str(file.unfinished), framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    if metadata.get("identity") != identity:
        raise ValueError(
            f"{file.unfinished} is of a run with other pictures, prompts or settings: choose another name, or delete the file."
        )
    with torch.inference_mode(False), torch.no_grad():
        for name, adapter in tuner.adapters.items():
            for kind, weight in (("down", adapter.down), ("up", adapter.up)):
                weight.copy_(tensors[f"{name}.{kind}"])
                begin = f"{name}.{kind}."
                state = {key[len(begin) :]: value for key, value in tensors.items() if key.startswith(begin)}
                if state:
                    # Adam counts its steps on the CPU.
                    tuner.optimizer.state[weight] = {
                        key: value.clone() if key == "step" else value.clone().to(weight)
                        for key, value in state.items()
                    }
    tuner.step = int(metadata["step"])
    return True


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, str(part), metadata)
        part.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(
            f"{path} could not be written ({error}): make room there or choose another place for loras; what was kept before "
            "is still there."
        ) from error
