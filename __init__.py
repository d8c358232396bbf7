"""ComfyUI-TrueFill: inpainting that puts what was asked for where it was asked for."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
