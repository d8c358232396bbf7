"""A pack for tests: makes the host's CLIP ViT-H a network of the same kind and width with fewer layers and patches."""

import functools
import json

import comfy.clip_vision

_WHOLE = comfy.clip_vision.ClipVisionModel.__init__


@functools.wraps(_WHOLE)
def _smaller(self, json_config) -> None:
    if not isinstance(json_config, dict) and json_config.endswith("clip_vision_config_h.json"):
        with open(json_config, encoding="utf-8") as file:
            json_config = json.load(file) | {"num_hidden_layers": 3, "intermediate_size": 64, "patch_size": 56}
    _WHOLE(self, json_config)


comfy.clip_vision.ClipVisionModel.__init__ = _smaller

NODE_CLASS_MAPPINGS = {}
