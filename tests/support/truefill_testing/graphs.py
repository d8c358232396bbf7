"""Graphs in API format, and what a running ComfyUI makes of them."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from devtools.client import Client, GraphInterrupted, Progress


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


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
