"""What LAR-Gen's training leaves, without a step of it: checkpoints of its stages, whose weights are moved from their start."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from devtools.pack import pack_module


def encoded(count: int) -> Any:
    """Random encoded quadruples, for tasks of which no figure matters."""
    generator = torch.Generator().manual_seed(count)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator).half()

    return pack_module("training.lar_gen.quadruples").Encoded(
        clean=some(4, 32, 32),
        masked=some(4, 32, 32),
        hole=(some(1, 32, 32) > 0).half(),
        subject=some(4, 32, 32),
        own=some(65, 160),
        details=some(65, 160),
        prompt=np.asarray([f"a {shape}" for shape in ("star", "moon", "ring", "heart")[:count]]),
    )


def untrained_tasks(train: Any = None) -> list[Any]:
    """The tasks of all stages in their order, on random quadruples where no others are given."""
    shipped, vocabulary = pack_module("training.demo.shipped"), pack_module("training.demo.vocabulary")
    assign, refine = pack_module("training.lar_gen.assign"), pack_module("training.lar_gen.refine")
    words = vocabulary.world_vocabulary()
    data = assign.Data(train or encoded(4), encoded(2), torch.zeros(65, 160), shipped.shipped_text(), words)
    first = assign.AssignTask(data, shipped.shipped_unet("inpaint", 9), seed=3)
    tasks = [
        pack_module("training.lar_gen.vision").VisionTask(seed=1),
        pack_module("training.lar_gen.likeness").LikenessTask(seed=2),
        first,
        refine.RefineTask(data, copy.deepcopy(first.main), shipped.shipped_unet("text2image", 4), seed=4),
    ]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for task in tasks:
            for parameter in task.networks.parameters():
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.1
                parameter.add_(0.1 * spread * torch.randn(parameter.shape, generator=generator))
    return tasks


def write_untrained(folder: Path) -> Path:
    """Export checkpoints of no step beside the demo model's other files; returns the folder of the files."""
    loop, demo_model = pack_module("training.loop"), pack_module("weights.demo_model")
    settings = loop.Settings(steps=1, batch=1, learning_rate=1e-3)
    for task in untrained_tasks():
        loop.Trainer(task, settings, folder / "runs" / task.name, torch.device("cpu")).save()
    pack_module("training.demo.export").export(folder / "runs", folder / "out")
    for name in demo_model.FILES.values():
        shutil.copyfile(demo_model.FOLDER / name, folder / "out" / name)
    return folder / "out"
