"""Random-weight checkpoints for the tests, written once and kept in the cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from devtools.pack import ROOT, ensure_host

FAMILIES = ("sd15", "sd2", "sdxl")


def write_checkpoint(path: str | Path, family: str, inpainting: bool, seed: int = 0) -> Path:
    """Write a random checkpoint of "sd15", "sd2" or "sdxl" that the host's own loader recognises."""
    ensure_host()
    from truefill_testing import random_checkpoints

    return random_checkpoints.write_checkpoint(path, family, inpainting, seed)


def models_folder() -> Path:
    """The cache folder, laid out like ComfyUI's `models`, for checkpoints of the present writer."""
    source = Path(__file__).with_name("random_checkpoints.py").read_bytes()
    return ROOT / ".cache" / "random-checkpoints" / hashlib.sha256(source).hexdigest()[:12]


def checkpoint(family: str, inpainting: bool) -> Path:
    """Return the cached random checkpoint ("sd15-inpainting.safetensors"), writing it on the first call."""
    path = models_folder() / "checkpoints" / f"{family}{'-inpainting' if inpainting else ''}.safetensors"
    return path if path.is_file() else write_checkpoint(path, family, inpainting)
