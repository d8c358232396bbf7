"""`harmonize` under its former name, for the imports in model_patches."""

from .harmonize import ONLY_BLEND, POISSON, Harmony
from .harmonize import harmonize_pictures as harmonise_pictures

__all__ = ["ONLY_BLEND", "POISSON", "Harmony", "harmonise_pictures"]
