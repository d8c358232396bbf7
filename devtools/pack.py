"""Loads the host and the pack into a process, the way the host itself loads packs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PACK_NAME = str(ROOT).replace(".", "_x_")
"""The host names a pack's module after its path (nodes.py, load_custom_node)."""

# Sub-packages that import nothing from the host.
_HOST_FREE = ("imaging",)


def host_path() -> Path:
    """Return the folder of the ComfyUI to run with; raise RuntimeError where there is none."""
    for variable in ("TRUEFILL_HOST", "COMFYUI_PATH"):
        if value := os.environ.get(variable):
            path = Path(value)
            if not (path / "comfy").is_dir():
                raise RuntimeError(f"{variable} is set to {path}, which holds no ComfyUI (no folder 'comfy' in it).")
            return path
    path = ROOT / ".cache" / "ComfyUI"
    if not (path / "comfy").is_dir():
        raise RuntimeError(f"There is no ComfyUI in {path}. Run `python dev.py test`, which fetches it.")
    return path


@cache
def ensure_host() -> Path:
    """Make the host's modules importable, on the CPU where there is no CUDA device; return the host's folder."""
    path = host_path()
    for entry in sys.path:
        if Path(entry or os.curdir).resolve() == ROOT:
            raise RuntimeError(
                f"{ROOT} is on sys.path, so the pack's `nodes` folder would shadow the host's `nodes` module. "
                "Run the tests with `python dev.py test` or with the console script `pytest`, not `python -m pytest`."
            )
    sys.path.insert(0, str(path))

    import torch
    from comfy.cli_args import args

    # As the host's main does: in an older host `nodes` puts the folder of comfy/utils.py on the path.
    importlib.import_module("utils.extra_config")

    args.cpu = not torch.cuda.is_available()
    # folder_paths reads this once, at import: the user's own models and outputs stay untouched.
    base = ROOT / ".cache" / "test-base"
    base.mkdir(parents=True, exist_ok=True)
    args.base_directory = str(base)
    return path


def _package() -> ModuleType:
    """Return the pack's package, created but not executed: enough for its sub-packages to be imported."""
    if PACK_NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACK_NAME, ROOT / "__init__.py")
        assert spec is not None
        sys.modules[PACK_NAME] = importlib.util.module_from_spec(spec)
    return sys.modules[PACK_NAME]


@cache
def load_pack() -> ModuleType:
    """Execute the pack's `__init__.py` as the host does and return the module."""
    ensure_host()
    module = _package()
    assert module.__spec__ is not None and module.__spec__.loader is not None
    module.__spec__.loader.exec_module(module)
    return module


def pack_module(name: str) -> ModuleType:
    """Import one module of the pack, such as "model_patches.hd_painter.painta"."""
    if name.split(".")[0] not in _HOST_FREE:
        ensure_host()
    _package()
    return importlib.import_module(f"{PACK_NAME}.{name}")
