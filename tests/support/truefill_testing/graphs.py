"""Graphs in API format, and what a running ComfyUI makes of them."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.client import Client, GraphInterrupted, Progress
from devtools.pack import pack_module

SMALL_DREAMMIX: dict[str, Any] = {
    "local_share": 0.5,
    "native_size": 128,
    "context": 0.5,
    "feather": 8,
    "background": "intermediate",
    "under_hole": "blurred",
    "raw_pooled": True,
    "multiple": 64,
}
"""Inputs of DreamMix's nodes for small pictures."""


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def scaled_photo(width: int, height: int) -> dict[str, Any]:
    """Nodes "photo" (its second output is the hole) and "picture", the photo in a size, both saved besides."""
    return {
        "photo": node("TrueFillExamplePhoto", photo="coffee"),
        "picture": node(
            "ImageScale", image=["photo", 0], upscale_method="area", width=width, height=height, crop="disabled"
        ),
        "save picture": node("PreviewImage", images=["picture", 0]),
        "hole": node("MaskToImage", mask=["photo", 1]),
        "save hole": node("PreviewImage", images=["hole", 0]),
    }


def hole_in(png: bytes, size: tuple[int, int]) -> torch.Tensor:
    """A saved hole at a picture's size (height, width), as the nodes see it: [1, 1, height, width]."""
    drawn = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("L")))[None] / 255
    hole: torch.Tensor = pack_module("imaging.masks").resize_mask(drawn, size)
    return hole


def picture(png: bytes) -> np.ndarray:
    """Uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def pictures(pngs: Sequence[bytes]) -> np.ndarray:
    """Uint8 [pictures, H, W, 3]: files of equal pictures differ, each carries its graph."""
    return np.stack([picture(png) for png in pngs])


def run_and_interrupt(server: Client, graph: dict[str, Any], node_type: str) -> None:
    """Runs the graph and interrupts it once a node of this type has made progress."""
    working = threading.Event()

    def note(progress: Progress) -> None:
        if progress.node_type == node_type and progress.maximum > 1:
            working.set()

    def interrupt() -> None:
        assert working.wait(120)
        server.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(GraphInterrupted):
        server.run(graph, note)
    thread.join()
