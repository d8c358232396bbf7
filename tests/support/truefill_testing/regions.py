"""What the tests of regions share."""

from __future__ import annotations

from typing import Any

from devtools.pack import pack_module

# The cut is exactly the hole's box, extended to whole multiples: nothing is resampled as long as native isn't exceeded.
SLICE: dict[str, Any] = {
    "native_size": 4096,
    "context_percent": 0,
    "context_pixels": 0,
    "min_side": 1,
    "max_aspect": 100,
    "max_upscale": 1,
}


def sliced(**changes: Any) -> Any:
    return pack_module("imaging.region_plan").RegionSettings(**{**SLICE, **changes})


def one_sentence(refused: Any) -> bool:
    text = str(refused.value)
    return "\n" not in text and text.endswith(".")
