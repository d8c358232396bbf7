"""Files that teach a UNet to read a subject: IP-Adapter-Plus as published, and LAR-Gen's checkpoint; told apart by their keys.

IP-Adapter-Plus: `image_proj.*` is the resampler, `ip_adapter.N.to_k_ip.weight` and `.to_v_ip.weight` the projections, numbered as
diffusers lists a UNet's cross-attentions: down, up, and the middle last. LAR-Gen: the projections have their blocks' names in
the UNet, the resampler is `image_proj_model` in the conditioner, beside `patch_projector`, the detail projection of Refine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import read_tensors

WHERE_TO_GET = "https://huggingface.co/h94/IP-Adapter/resolve/main/models/ip-adapter-plus_sd15.safetensors"

CLIP_WIDTH = 1280
"""Of CLIP ViT-H's states."""

Place = tuple[str, int, int]
"""("input" | "middle" | "output", index of the UNet block, index within its SpatialTransformer)."""

_NUMBERED = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")
_NAMED = re.compile(
    r"(?:.*\.)?(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.1\.transformer_blocks\.(\d+)\.attn2\.to_([kv])_ip\.weight"
)
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
    """

    resampler: Mapping[str, torch.Tensor]
    numbered: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    named: Mapping[Place, tuple[torch.Tensor, torch.Tensor]]
    detail: Mapping[str, torch.Tensor]

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


def subject_weights(state: Mapping[str, torch.Tensor], name: str) -> SubjectWeights:
    """The weights among a file's tensors. Raises ValueError that begins with the file's `name`."""
    for part, what in _OTHERS:
        if any(part in key for key in state):
            raise ValueError(_wrong(name, what))
    numbered, named = _projections(_NUMBERED, state), _projections(_NAMED, state)
    resampler = _below("image_proj", state) or _below("image_proj_model", state)
    if not (numbered or named):
        raise ValueError(_wrong(name, "a file without projections to_k_ip and to_v_ip"))
    if "proj_in.weight" not in resampler or "latents" not in resampler:
        raise ValueError(_wrong(name, "a file without a resampler (image_proj)"))
    if (width := resampler["proj_in.weight"].shape[1]) != CLIP_WIDTH:
        raise ValueError(
            _wrong(name, f"made for a CLIP vision model whose states have {width} numbers, not ViT-H's {CLIP_WIDTH}")
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
    )


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
