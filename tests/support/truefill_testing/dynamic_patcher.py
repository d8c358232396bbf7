"""The host's dynamic VRAM is for GPUs; a patcher that says that it is dynamic is loaded again by the host as a real one."""

from __future__ import annotations

from devtools.pack import ensure_host

ensure_host()

from comfy.model_patcher import ModelPatcher  # noqa: E402


class DynamicPatcher(ModelPatcher):
    """The host's own that moves weights is an ordinary one on a CPU."""

    def is_dynamic(self) -> bool:
        return True
