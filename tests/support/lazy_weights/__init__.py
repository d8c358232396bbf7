"""A pack for tests: what ComfyUI's dynamic VRAM does to loading, the default on an NVIDIA GPU, without a GPU.

Files are mapped into memory, read-only, and a linear layer or an embedding has no weight before one is loaded into it. Where
weights lie is as ever: on a CPU the host's patcher is the ordinary one.
"""

from __future__ import annotations

from typing import Any

import comfy.memory_management
import comfy.ops
import torch

NODE_CLASS_MAPPINGS: dict[str, Any] = {}


def _lazily() -> None:
    import comfy_aimdo.control

    if not comfy_aimdo.control.init():
        raise RuntimeError("comfy-aimdo, which comes with ComfyUI, can't be loaded here.")
    layers: Any = comfy.ops.disable_weight_init
    load = layers._lazy_load_from_state_dict

    def load_and_cast(module: Any, *args: Any, **kwargs: Any) -> None:
        load(module, *args, **kwargs)
        # On a GPU the patcher does it.
        for name in ("weight", "bias"):
            weight, dtype = getattr(module, name), getattr(module, f"{name}_comfy_model_dtype", None)
            if weight is not None and dtype is not None:
                setattr(module, name, torch.nn.Parameter(weight.to(dtype), requires_grad=False))

    layers._lazy_load_from_state_dict = staticmethod(load_and_cast)
    comfy.memory_management.aimdo_enabled = True


# Older ComfyUIs have nothing of the kind.
if hasattr(comfy.ops.disable_weight_init, "_lazy_load_from_state_dict"):
    _lazily()
