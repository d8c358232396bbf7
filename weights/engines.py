"""What runs a network: transformers, which comes with ComfyUI, or the package that its authors published."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Package:
    """A published package: its name where packages are found, its module, and the transformers from which on it fails."""

    name: str
    module: str
    fails_from: int | None = None

    def check(self, engine: str | None) -> bool | str:
        """For a node's `validate_inputs`: True where this engine can run, or one sentence.

        What another node will name (None) is not known yet.
        """
        if engine != self.name:
            return True
        if find_spec(self.module) is None:
            return (
                f"The engine {self.name} is not installed: run 'pip install {self.name}' with ComfyUI's Python, or choose "
                f"{TRANSFORMERS}, which answers the same."
            )
        if self.fails_from is not None and int(version("transformers").split(".")[0]) >= self.fails_from:
            return (
                f"The engine {self.name} fails with transformers {self.fails_from} and later, and here is "
                f"{version('transformers')}: choose {TRANSFORMERS}, which answers the same."
            )
        return True

    def require(self) -> None:
        """Raises ValueError, one sentence, where this package can't run."""
        if (found := self.check(self.name)) is not True:
            raise ValueError(found)


SEGMENT_ANYTHING = Package("segment-anything", "segment_anything")
GROUNDING_DINO = Package("groundingdino-py", "groundingdino", fails_from=5)
