"""An autoencoder that fits into the host's TAESD: the same graph with fewer channels and blocks.

The full TAESD spends most of its time on 64 channels at full resolution, far more than this world needs. A convolution with
fewer channels is one with 64 whose other weights are zero, and a missing block is one whose convolutions are zero (what
remains is its last rectifier), so that the trained weights go into the host's class without any change of the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import comfy.taesd.taesd
import torch
from torch import nn

LATENT_CHANNELS = 4
# Channels and blocks at 1/1, 1/2, 1/4 and 1/8 of the picture's side.
_ENCODER_WIDTHS, _ENCODER_BLOCKS = (16, 32, 64, 64), (1, 2, 3, 3)
_DECODER_WIDTHS, _DECODER_BLOCKS = (32, 32, 64, 64), (1, 3, 3, 3)


class _Block(nn.Module):
    """TAESD's residual block under the host's names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


def _level(width: int, present: int, places: int) -> list[nn.Module]:
    return [_Block(width) if number < present else nn.ReLU() for number in range(places)]


def _encoder() -> nn.Sequential:
    widths = _ENCODER_WIDTHS
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), *_level(widths[0], _ENCODER_BLOCKS[0], 1)]
    for level in range(1, 4):
        layers.append(nn.Conv2d(widths[level - 1], widths[level], 3, stride=2, padding=1, bias=False))
        layers += _level(widths[level], _ENCODER_BLOCKS[level], 3)
    return nn.Sequential(*layers, nn.Conv2d(widths[3], LATENT_CHANNELS, 3, padding=1))


def _decoder() -> nn.Sequential:
    widths = _DECODER_WIDTHS
    layers: list[nn.Module] = [
        comfy.taesd.taesd.Clamp(),
        nn.Conv2d(LATENT_CHANNELS, widths[3], 3, padding=1),
        nn.ReLU(),
        *_level(widths[3], _DECODER_BLOCKS[3], 3),
    ]
    for level in (2, 1, 0):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(widths[level + 1], widths[level], 3, padding=1, bias=False)]
        layers += _level(widths[level], _DECODER_BLOCKS[level], 3 if level else 1)
    return nn.Sequential(*layers, nn.Conv2d(widths[0], 3, 3, padding=1))


def _initialise(module: nn.Module) -> None:
    """Weights that keep the scale through dozens of rectified layers without a norm, and blocks that start as nothing."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d):
            if name.endswith(".conv.4"):
                nn.init.zeros_(child.weight)
            else:
                nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class NarrowTAESD(nn.Module):
    """Autoencoder of pictures [B, 3, H, W] in [0, 1] with latents [B, 4, H / 8, W / 8] of about unit variance.

    H and W are multiples of 8.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.taesd_encoder = _encoder()
            self.taesd_decoder = _decoder()
            _initialise(self)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents in the scale that the UNet works in."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures, nearly but not strictly within [0, 1]."""
        return self.taesd_decoder(latents)


def widen(state: Mapping[str, torch.Tensor], latent_scale: float) -> dict[str, torch.Tensor]:
    """The state dict of the host's TAESD that computes what a NarrowTAESD with this state dict does.

    The host multiplies a VAE's latents by `latent_scale` before the UNet sees them (0.18215 for SD1.5); TAESD divides by
    it. Raises ValueError for a state dict of anything else.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in comfy.taesd.taesd.TAESD().state_dict().items()}
    strangers = [name for name in state if name not in shapes]
    if strangers:
        raise ValueError(f"This is no state dict of a narrow TAESD: it has {strangers[0]}.")
    wide = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in state.items():
        wide[name][tuple(slice(0, length) for length in tensor.shape)] = tensor.float().cpu()
    wide["vae_scale"].fill_(latent_scale)
    return wide


def narrow(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the NarrowTAESD that `widen` made this one of, in float32."""
    shapes = {name: tensor.shape for name, tensor in NarrowTAESD().state_dict().items()}
    return {
        name: state[name][tuple(slice(0, length) for length in shape)].float().clone() for name, shape in shapes.items()
    }
