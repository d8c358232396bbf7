"""Untrained weights of the demo models, for tests of what is done with them."""

from __future__ import annotations

from pathlib import Path

import torch

from truefill_testing.host import pack_module


def untrained_networks() -> dict[str, torch.nn.Module]:
    """The networks of all files, by name; the UNets are moved away from the zeros that they start with."""
    demo_models = pack_module("training.demo_models")
    vocabulary = pack_module("training.vocabulary").world_vocabulary()
    unet = demo_models.new_unet(4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return {
        "vae": pack_module("training.narrow_taesd").NarrowTAESD(),
        "text": demo_models.TextEncoder(vocabulary, seed=1),
        "text2image": unet,
        "inpaint": demo_models.inpainting_unet(unet.state_dict()),
        "classifier": pack_module("training.classifier").Classifier(),
    }


def write_untrained(folder: Path) -> Path:
    """Train no step of any stage and export that; returns the folder of the files."""
    loop = pack_module("training.loop")
    networks = untrained_networks()

    class Untrained(loop.Task):
        def __init__(self, name: str, **parts: torch.nn.Module) -> None:
            self.name, self.networks = name, torch.nn.ModuleDict(parts)

        def batch(self, seed: int, step: int, size: int) -> dict[str, torch.Tensor]:
            raise NotImplementedError

        def losses(self, batch: object, generator: object) -> dict[str, torch.Tensor]:
            raise NotImplementedError

    settings = loop.Settings(steps=1, batch=1, learning_rate=1e-3)
    stages = {
        "vae": {"vae": networks["vae"]},
        "text2image": {"unet": networks["text2image"], "text": networks["text"]},
        "inpaint": {"unet": networks["inpaint"]},
        "classifier": {"classifier": networks["classifier"]},
    }
    for name, parts in stages.items():
        loop.Trainer(Untrained(name, **parts), settings, folder / "runs" / name, torch.device("cpu")).save()
    pack_module("training.export").export(folder / "runs", folder / "out")
    return folder / "out"
