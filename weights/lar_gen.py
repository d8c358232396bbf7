"""Files that teach a UNet to read a subject: IP-Adapter-Plus as published, and LAR-Gen's checkpoint; told apart by their keys.

IP-Adapter-Plus: `image_proj.*` is the resampler, `ip_adapter.N.to_k_ip.weight` and `.to_v_ip.weight` the projections, numbered as
diffusers lists a UNet's cross-attentions: down, up, and the middle last. LAR-Gen: the projections have their blocks' names in
the UNet, the resampler is `image_proj_model` in the conditioner, beside `patch_projector`, the detail projection of Refine, and
`image_encoder`, CLIP ViT-H. A trained reference network has the UNet's names with `ref_` before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import read_tensors

WHERE_TO_GET = "https://huggingface.co/h94/IP-Adapter/resolve/main/models/ip-adapter-plus_sd15.safetensors"

RELEASE = "https://github.com/modelscope/scepter"
"""Where LAR-Gen was published."""

CLIP_WIDTH = 1280
"""Of CLIP ViT-H's states."""

Place = tuple[str, int, int]
"""("input" | "middle" | "output", index of the UNet block, index within its SpatialTransformer)."""

_NUMBERED = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")
_NAMED = re.compile(
    r"(?:.*\.)?(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.1\.transformer_blocks\.(\d+)\.attn2\.to_([kv])_ip\.weight"
)
_BRANCH = re.compile(r"(?:.*\.)?ref_((?:time_embed|label_emb|input_blocks|middle_block|output_blocks)\..*)")
# What another file holds, and what to say of it.
_OTHERS = (
    ("perceiver_resampler", "an IP-Adapter FaceID file"),
    ("to_q_lora", "an IP-Adapter FaceID file"),
    ("image_proj.proj.", "an IP-Adapter file that is not a Plus one"),
    ("image_proj.net.", "an InstantID or FaceID file"),
)
_ORDER = ("input", "output", "middle")


@dataclass(frozen=True, eq=False, kw_only=True)
class SubjectWeights:
    """What a file holds.

    resampler: tensors by IP-Adapter's names, without `image_proj.`.
    numbered: to_k_ip and to_v_ip in the order of a numbered file; empty where blocks are named.
    named: the same by block.
    detail: weight and bias of Refine's projection of CLIP's states, where the file has it.
    branch: Refine's reference network by the names of the host's UNet, where the file has it.
    """

    resampler: Mapping[str, torch.Tensor]
    numbered: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    named: Mapping[Place, tuple[torch.Tensor, torch.Tensor]]
    detail: Mapping[str, torch.Tensor]
    branch: Mapping[str, torch.Tensor]

    def by_place(self, places: Sequence[Place]) -> dict[Place, tuple[torch.Tensor, torch.Tensor]]:
        """The projections by block of a UNet, whose cross-attentions are `places` in the order of a forward pass."""
        if self.named:
            return dict(self.named)
        ordered = [place for part in _ORDER for place in places if place[0] == part]
        return dict(zip(ordered, self.numbered, strict=False))


def read_subject_weights(path: str | Path) -> SubjectWeights:
    """The weights of a file. Raises ValueError, one sentence, for one that can't be read or is of another kind.

    Nothing in a file is executed.
    """
    path = Path(path)
    return subject_weights(read_tensors(path, WHERE_TO_GET, nested=True), path.name)


def subject_weights(state: Mapping[str, torch.Tensor], name: str, clip_width: int = CLIP_WIDTH) -> SubjectWeights:
    """The weights among a file's tensors, for a CLIP of that width. Raises ValueError that begins with the file's `name`."""
    for part, what in _OTHERS:
        if any(part in key for key in state):
            raise ValueError(_wrong(name, what))
    numbered, named = _projections(_NUMBERED, state), _projections(_NAMED, state)
    resampler = _below("image_proj", state) or _below("image_proj_model", state)
    if not (numbered or named):
        raise ValueError(_wrong(name, "a file without projections to_k_ip and to_v_ip"))
    if "proj_in.weight" not in resampler or "latents" not in resampler:
        raise ValueError(_wrong(name, "a file without a resampler (image_proj)"))
    if (width := resampler["proj_in.weight"].shape[1]) != clip_width:
        raise ValueError(
            _wrong(name, f"made for a CLIP vision model whose states have {width} numbers, not ViT-H's {clip_width}")
        )
    pairs = {**numbered, **named}
    if lonely := [place for place, pair in pairs.items() if len(pair) != 2]:
        raise ValueError(
            f"{name} is an incomplete or changed file: of the block {lonely[0]} it has only one of to_k_ip and to_v_ip. Download "
            f"it again, or take {WHERE_TO_GET}."
        )
    return SubjectWeights(
        resampler=resampler,
        numbered=[(numbered[key]["k"], numbered[key]["v"]) for key in sorted(numbered, key=lambda key: key[1])],
        named={place: (pair["k"], pair["v"]) for place, pair in named.items()},
        detail=_below("patch_projector", state),
        branch=_branch(state),
    )


def _branch(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for key, tensor in state.items():
        match = _BRANCH.fullmatch(key)
        # Its copies of the subject's projections are never read.
        if match and "_ip." not in key:
            found[match[1]] = tensor
    return found


def _projections(pattern: re.Pattern[str], state: Mapping[str, torch.Tensor]) -> dict[Place, dict[str, torch.Tensor]]:
    """By place, or by ("", number, 0) in a numbered file: "k" and "v"."""
    found: dict[Place, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        if match := pattern.fullmatch(key):
            *where, kind = match.groups()
            found.setdefault(_place(*where), {})[kind] = tensor
    return found


def _place(block: str, depth: str = "0") -> Place:
    kind, _, index = block.partition(".")
    return ("", int(block), 0) if block.isdigit() else (kind.partition("_")[0], int(index or 0), int(depth))


def _below(module: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a module, wherever it lies."""
    found = {}
    for key, tensor in state.items():
        before, _, after = f".{key}".partition(f".{module}.")
        if after and not before.endswith("."):
            found[after] = tensor
    return found


def _wrong(name: str, what: str) -> str:
    return (
        f"{name} is {what}, but IP-Adapter-Plus weights for ViT-H (SD1.5 or SDXL) or LAR-Gen's are needed, such as "
        f"ip-adapter-plus_sd15.safetensors in models/ipadapter: {WHERE_TO_GET}."
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """LAR-Gen's checkpoint, taken apart.

    base: UNet, text encoders and VAE by the names of an SDXL checkpoint.
    vision: CLIP ViT-H by transformers' names.
    subject: what Assign and Refine read.
    """

    base: dict[str, torch.Tensor]
    vision: dict[str, torch.Tensor]
    subject: SubjectWeights


_FILES = ("diffusion_model.pth", "cond_stage_model.pth", "first_stage_model.pth")
"""How the parts of a checkpoint in three files are called."""
# A tensor by which a part is found, wherever it lies; what of it is taken; and how an SDXL checkpoint calls it.
_PARTS = (
    ("input_blocks.0.0.weight", re.compile(r"(?!ref_)(?!.*_ip\.).*"), "model.diffusion_model."),
    ("encoder.conv_in.weight", re.compile(r".*"), "first_stage_model."),
    ("embedders.0.transformer.text_model.final_layer_norm.weight", re.compile(r"embedders\.[01]\..*"), "conditioner."),
)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """LAR-Gen's checkpoint: one file, with or without a key around all of it, or three in one folder, of which `path` is one.

    Raises ValueError, one sentence, for a file that can't be read or is of another kind, and FileNotFoundError where one of three
    files is missing.
    """
    path = Path(path)
    files = [path.with_name(name) for name in _FILES] if path.name in _FILES else [path]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{path.name} is one of three files, and {missing[0]} is not beside it in {path.parent}."
        )
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= {f"{file.stem}.{key}": tensor for key, tensor in read_tensors(file, RELEASE, nested=True).items()}
    return take_apart(state, path.name)


def take_apart(state: Mapping[str, torch.Tensor], name: str) -> Checkpoint:
    """The parts of a checkpoint's tensors. Raises ValueError that begins with the file's `name`."""
    base = {}
    for known, taken, usual in _PARTS:
        before = next((key.removesuffix(known) for key in state if f".{key}".endswith(f".{known}")), None)
        if before is None:
            raise ValueError(_no_checkpoint(name))
        for key, tensor in state.items():
            part = key.removeprefix(before)
            if key.startswith(before) and taken.fullmatch(part):
                base[usual + part] = tensor
    vision = _below("image_encoder", state)
    if not vision:
        raise ValueError(_no_checkpoint(name))
    return Checkpoint(base=base, vision=vision, subject=subject_weights(state, name))


def _no_checkpoint(name: str) -> str:
    return (
        f"{name} is not LAR-Gen's checkpoint, which has a UNet, a VAE, text encoders and CLIP ViT-H in one: take Load "
        f"Checkpoint, Load CLIP Vision and Load Subject Adapter for it, or LAR-Gen's file, which {RELEASE} links."
    )
