"""The pack's own code on a cluster whose machines have this checkout."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

CHECKOUT = "TRUEFILL_CHECKOUT"
"""A worker's variable with its folder of this checkout."""


def in_checkout(folder: str, module: str, function: str, *arguments: Any) -> Any:
    """Call a function of one of the pack's modules, on a machine that has the checkout in this folder or where CHECKOUT says."""
    folder = os.environ.get(CHECKOUT, folder)
    if "devtools.pack" not in sys.modules:
        # For this import alone: in the search path its `nodes` would be taken for the host's.
        sys.path.insert(0, folder)
        try:
            importlib.import_module("devtools.pack")
        finally:
            sys.path.remove(folder)
    return getattr(sys.modules["devtools.pack"].pack_module(module), function)(*arguments)
