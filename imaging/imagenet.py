"""Pictures as networks of ImageNet's kind take them."""

import torch

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of each channel of ImageNet's pictures, in [0, 1]."""


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [..., 3, H, W] in [0, 1], less the mean of each channel and divided by its deviation."""
    mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (pixels - mean) / deviation
