"""What goes together when a diffusion model is sampled."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Diffusion:
    """A host MODEL with the conditionings and the VAE that belong to it."""

    model: Any
    positive: Any
    negative: Any
    vae: Any


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What every way of sampling has; `steps` of the `scheduler`'s, and the noise of `seed`."""

    seed: int = 0
    steps: int = 20
    cfg: float = 7.5
    scheduler: str = "normal"
