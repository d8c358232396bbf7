"""Untrained weights of the demo models, for tests of what is done with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from devtools.pack import pack_module


def untrained_tasks() -> list[Any]:
    """The tasks of all stages in their order; the UNets are moved away from the zeros that they start with."""
    vocabulary = pack_module("training.demo.vocabulary").world_vocabulary()
    # No step is made, so that nothing looks at them.
    latents = pack_module("training.demo.latents").Latents(torch.zeros(1, 4, 32, 32))
    text2image = pack_module("training.demo.text2image").TextToImageTask(latents, latents, vocabulary, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in text2image.unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    unet, text = text2image.unet.state_dict(), text2image.text.state_dict()
    return [
        pack_module("training.demo.vae").VaeTask(seed=0),
        text2image,
        pack_module("training.demo.inpaint").InpaintTask(latents, latents, vocabulary, unet, text),
        pack_module("training.demo.classifier").ClassifierTask(seed=0),
    ]


def untrained_networks() -> dict[str, torch.nn.Module]:
    """The networks of all files, by name."""
    vae, text2image, inpaint, classifier = untrained_tasks()
    return {
        "vae": vae.vae,
        "text": text2image.text,
        "text2image": text2image.unet,
        "inpaint": inpaint.unet,
        "classifier": classifier.classifier,
    }


def write_untrained(folder: Path) -> Path:
    """Train no step of any stage and export that; returns the folder of the files."""
    loop = pack_module("training.loop")
    settings = loop.Settings(steps=1, batch=1, learning_rate=1e-3)
    for task in untrained_tasks():
        loop.Trainer(task, settings, folder / "runs" / task.name, torch.device("cpu")).save()
    pack_module("training.demo.export").export(folder / "runs", folder / "out")
    return folder / "out"
