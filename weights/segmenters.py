"""Files of promptable segmenters: Segment Anything, SAM-HQ and SAM 2, told apart by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import segment_anything, segment_anything_2, segment_anything_package
from .engines import SEGMENT_ANYTHING, TRANSFORMERS
from .files import differing, read_tensors

WHERE_TO_GET = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"

_FAMILIES = (segment_anything, segment_anything_2)
# What a file of another family holds, and what to say of it.
_OTHERS = (
    ("model.diffusion_model.", "a diffusion checkpoint"),
    ("detector.", "a SAM 3 file, which ComfyUI's own SAM3 nodes read"),
    ("image_encoder.patch_embed.seq.", "a MobileSAM or SAM-HQ Light file"),
)


def read_segmenter(path: str | Path, engine: str = TRANSFORMERS) -> Any:
    """The network of a file, in float32 on the CPU: transformers' SamModel, SamHQModel or Sam2Model, or segment-anything's.

    Raises ValueError, one sentence, for a file that can't be read, one of another model, one that is incomplete, and an engine
    that can't run it. Nothing in a file is executed.
    """
    path = Path(path)
    return segmenter_from_state(read_tensors(path, WHERE_TO_GET), path.name, engine)


def segmenter_from_state(state: Mapping[str, torch.Tensor], name: str, engine: str = TRANSFORMERS) -> Any:
    """The network of a file's tensors. Raises ValueError that begins with the file's `name`, or is about the engine."""
    for key, what in _OTHERS:
        if any(found.startswith(key) for found in state):
            raise ValueError(_wrong(name, what))
    family = next((family for family in _FAMILIES if family.recognised(state)), None)
    if family is None:
        raise ValueError(_wrong(name, "something else"))
    if engine == SEGMENT_ANYTHING.name:
        SEGMENT_ANYTHING.require()
        family = segment_anything_package
        if not family.recognised(state):
            raise ValueError(
                f"{name} is not as Segment Anything was published, which the engine {engine} needs: choose {TRANSFORMERS}."
            )
    try:
        model, tensors = family.network(state)
    except KeyError as error:
        raise ValueError(_incomplete(name, str(error.args[0]))) from None
    except ImportError as error:
        raise ValueError(
            f"{name} needs a later transformers than {version('transformers')}: 4.52 for SAM-HQ, 4.57 for SAM 2. Update "
            "ComfyUI, or take a Segment Anything file."
        ) from error
    except segment_anything_2.UnknownSize as error:
        raise ValueError(_wrong(name, str(error))) from None
    if wrong := differing(model.state_dict(), tensors):
        raise ValueError(_incomplete(name, ", ".join(wrong[:3])))
    model.load_state_dict(tensors, assign=True)
    return model.float().eval().requires_grad_(False)


def _wrong(name: str, what: str) -> str:
    return (
        f"{name} is {what}, but a Segment Anything (ViT-B, L or H), SAM-HQ or SAM 2 file is needed, such as "
        f"sam_vit_b_01ec64.pth in models/sams: {WHERE_TO_GET}."
    )


def _incomplete(name: str, keys: str) -> str:
    return f"{name} is an incomplete or changed segmenter file: {keys}. Download it again, or take {WHERE_TO_GET}."
