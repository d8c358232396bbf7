"""What a subject's LoRA makes of a prompt while it is trained, by the host's own sampling."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from .adapters import as_file
from .tuning import Example, Tuner

STEPS, CFG = 20, 7.0


def sample_picture(
    model: ModelPatcher, tuner: Tuner, vae: Any, prompt: Any, negative: Any, example: Example, seed: int
) -> torch.Tensor:
    """A picture [1, H, W, 3] of the size of `example`'s by `model`, which stays as it is, with what `tuner` has learned so far.

    `prompt` and `negative` are CONDITIONING. An inpainting model fills the example's first training mask; any other begins with
    noise alone. 20 steps of euler at CFG 7; the same `seed` begins with the same noise.
    """
    lora = as_file(tuner.adapters, tuner.unet_config)
    tuned, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    seen = example.concat[0] if example.concat else {}
    positive, against = ([[text, {**options, **seen}] for text, options in side] for side in (prompt, negative))
    empty = torch.zeros_like(example.latent)
    noise = comfy.sample.prepare_noise(empty, seed)
    latent = comfy.sample.sample(
        tuned, noise, STEPS, CFG, "euler", "normal", positive, against, empty, seed=seed, disable_pbar=True
    )
    return vae.decode(latent)
