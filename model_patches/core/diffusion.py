"""What goes together when a diffusion model is sampled."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A host MODEL with the conditionings and the VAE that belong to it."""

    model: Any
    positive: Any
    negative: Any
    vae: Any
