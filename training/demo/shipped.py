"""The demo model's networks as they ship, for trainings that begin with them."""

from __future__ import annotations

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...weights.demo_model import TEXT_PREFIX, TOKEN_IDS, UNET_PREFIX, read
from .narrow_taesd import NarrowTAESD, narrow
from .networks import TextEncoder, new_unet
from .vocabulary import world_vocabulary


def shipped_vae() -> NarrowTAESD:
    """The autoencoder, in evaluation mode."""
    vae = NarrowTAESD()
    vae.load_state_dict(narrow(read("vae")))
    return vae.eval().requires_grad_(False)


def shipped_unet(network: str, channels: int) -> UNetModel:
    """The UNet of "inpaint" (9 input channels) or "text2image" (4), in float32."""
    unet = new_unet(channels, seed=0)
    unet.load_state_dict({name.removeprefix(UNET_PREFIX): tensor.float() for name, tensor in read(network).items()})
    return unet


def shipped_text() -> TextEncoder:
    """The text encoder, which is not trained on."""
    state = read("text")
    vocabulary = world_vocabulary()
    if not torch.equal(state.pop(TOKEN_IDS).long(), vocabulary.token_ids):
        raise ValueError("The demo model's text encoder has other words than this world: export it anew.")
    text = TextEncoder(vocabulary, seed=0)
    text.load_state_dict({name.removeprefix(TEXT_PREFIX): tensor.float() for name, tensor in state.items()})
    return text.requires_grad_(False)
