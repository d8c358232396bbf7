"""A pack for tests: makes the host's CLIP ViT-H a network of the same kind and width with fewer layers and patches."""

import functools
import json
import tempfile
from pathlib import Path

import comfy.clip_vision

_WHOLE = comfy.clip_vision.ClipVisionModel.__init__
_CHANGES = {"num_hidden_layers": 3, "intermediate_size": 64, "patch_size": 56}


@functools.wraps(_WHOLE)
def _smaller(self, json_config) -> None:
    if isinstance(json_config, dict) or not json_config.endswith("clip_vision_config_h.json"):
        _WHOLE(self, json_config)
        return
    config = json.loads(Path(json_config).read_text(encoding="utf-8")) | _CHANGES
    # Older hosts take the name of a file only.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        _WHOLE(self, str(file))


comfy.clip_vision.ClipVisionModel.__init__ = _smaller

NODE_CLASS_MAPPINGS = {}
