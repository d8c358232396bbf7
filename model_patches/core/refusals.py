"""What no method can work with, each in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from comfy.patcher_extension import WrappersMP


def refuse_copy(who: str) -> NoReturn:
    """Raises ValueError: the host would have a network of `who` on a second GPU, too."""
    raise ValueError(
        f"{who} has a network of its own and works on one GPU: take ComfyUI's 'MultiGPU CFG Split' out of the graph."
    )


def refuse_compiled(model_options: Mapping[str, Any], who: str) -> None:
    """Raises ValueError, in one sentence that begins with `who`, for the options of a compiled model."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if "torch.compile" in wrappers:
        raise ValueError(
            f"{who} reads or edits attention while the model runs, which a compiled model does not allow: take the "
            "TorchCompileModel node out of this graph, or the TrueFill nodes."
        )
