"""One real ComfyUI process with the pack, for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.client import Client
from devtools.pack import host_path
from devtools.server import Server
from truefill_testing.checkpoints import FAMILIES, checkpoint, models_folder
from truefill_testing.stand_ins import LAZY_WEIGHTS, SMALL_CLIP_H, SMALL_SAM3, SMALL_TEXT_ENCODERS, SMALL_TRANSFORMERS


@pytest.fixture(scope="session")
def comfyui() -> Iterator[Server]:
    """A running ComfyUI. Its checkpoints are <family>.safetensors, <family>-inpainting.safetensors and x4.safetensors."""
    for family in FAMILIES:
        for inpainting in (False, True):
            checkpoint(family, inpainting)
    checkpoint("x4", inpainting=False)
    small = [SMALL_CLIP_H, SMALL_TEXT_ENCODERS, SMALL_TRANSFORMERS]
    # Before ComfyUI knew SAM 3 there is nothing to make smaller.
    if (host_path() / "comfy" / "ldm" / "sam3").is_dir():
        small.append(SMALL_SAM3)
    # Weights as most people have them; the demo's and the browser's tests' are there at once. And people unpack the pack into
    # folders of all kinds of names.
    with Server(
        host_path(),
        Path(sys.executable),
        pack_folder="ComfyUI-TrueFill main (1)",
        beside=[LAZY_WEIGHTS, *small],
        models=[models_folder()],
        log_name="test-server",
    ) as server:
        yield server


@pytest.fixture(scope="session")
def server(comfyui: Server) -> Client:
    """A client of the running ComfyUI."""
    return comfyui.client
