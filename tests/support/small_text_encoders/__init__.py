"""A pack for tests: makes the published CLIP text models networks of the same kinds and widths with fewer layers.

In the tests' checkpoints all layers but the first pass everything through, so that the prompts' encodings stay what they were.
The demo model's text encoder is narrower, and stays whole.
"""

import functools

import comfy.clip_model

_LAYERS, _NARROWEST = 3, 768
_WHOLE = comfy.clip_model.CLIPTextModel.__init__


@functools.wraps(_WHOLE)
def _smaller(self, config_dict, *arguments, **named) -> None:
    if config_dict["hidden_size"] >= _NARROWEST:
        config_dict = config_dict | {"num_hidden_layers": min(_LAYERS, config_dict["num_hidden_layers"])}
    _WHOLE(self, config_dict, *arguments, **named)


comfy.clip_model.CLIPTextModel.__init__ = _smaller

NODE_CLASS_MAPPINGS = {}
