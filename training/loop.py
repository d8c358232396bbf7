"""The training loop: deterministic, resumable, with an average of the weights and a record of the losses.

Batches and random numbers of a step depend on the seed and the number of the step only, so nothing but weights, optimizer and
step number has to be kept: a run that was stopped and resumed gives the same weights as one that was not, bit for bit on the
same CPU with the same number of threads. (CUDA's own kernels add in varying order.)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .curves import draw_curves

Batch = dict[str, torch.Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Settings:
    """How a stage is trained. What is listed in IDENTITY has to stay the same when a run is resumed.

    muon: the task's matrices by Muon (Jordan et al. 2024, at AdamW's scale as in arXiv 2502.16982), the rest by AdamW.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int = 0
    bfloat16: bool = True
    ema: float = 0.999
    warm_up: int = 500
    clip: float = 1.0
    save_every: float = 180.0
    record_every: int = 20
    workers: int = 0
    muon: bool = False


IDENTITY = ("steps", "batch", "learning_rate", "seed", "bfloat16", "ema", "warm_up", "clip", "muon")
# What a warm restart may change, and the record of it says as it was before.
_RESTARTED = ("steps", "batch", "learning_rate")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: for a progress line. `losses` are means over the last recorded steps."""

    name: str
    step: int
    steps: int
    steps_per_second: float
    losses: dict[str, float]

    @property
    def seconds_left(self) -> float:
        """At the present rate."""
        return (self.steps - self.step) / max(self.steps_per_second, 1e-9)


class Task(ABC):
    """What one stage trains: its networks, its data and its loss."""

    name: str
    networks: nn.ModuleDict
    """The networks that are trained, saved and averaged."""

    def matrices(self) -> list[torch.Tensor]:
        """The weights of hidden linear layers, for Muon."""
        return []

    @abstractmethod
    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The data of one step, on the CPU: a pure function of the arguments. May run in another process."""

    @abstractmethod
    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Scalars, of which "loss" is minimised. `generator` lives on the CPU."""

    def to(self, device: torch.device) -> None:
        """Move everything that the loss needs to a device."""
        self.networks.to(device)

    def evaluate(self) -> dict[str, float]:
        """Figures of merit of the networks on the development split, to be called with the averaged weights."""
        return {}


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's random numbers."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


def learning_rate_at(step: int, settings: Settings) -> float:
    """Rises linearly, stays, and falls linearly to a twentieth over the last quarter of the run."""
    rise = min((step + 1) / max(1, min(settings.warm_up, settings.steps // 4)), 1.0)
    fall_steps = max(1, settings.steps // 4)
    fall = min((settings.steps - step) / fall_steps, 1.0)
    return settings.learning_rate * rise * (0.05 + 0.95 * fall)


class _Steps(Dataset[Batch]):
    """The batches of a range of steps."""

    def __init__(self, task: Task, settings: Settings, first: int) -> None:
        self._task, self._settings, self._first = task, settings, first

    def __len__(self) -> int:
        return self._settings.steps - self._first

    def __getitem__(self, index: int) -> Batch:
        return self._task.batch(self._settings.seed, self._first + index, self._settings.batch)


def in_workers(dataset: Dataset[Item], workers: int) -> Iterator[Item]:
    """The items of a dataset in their order, made ahead by so many processes, which start with the first item.

    Without any, or where none can fork, this process makes them.
    """
    # Only forked workers see a pack whose modules are named after its folder.
    workers = workers if "fork" in multiprocessing.get_all_start_methods() else 0
    context = "fork" if workers else None
    yield from DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context)


def _optimizers(task: Task, parameters: list[torch.Tensor], settings: Settings) -> list[torch.optim.Optimizer]:
    rate, decay = settings.learning_rate, 0.01
    matrices = task.matrices() if settings.muon else []
    own = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in own]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return made


class Trainer:
    """One stage's run. Its state lies in `folder`: checkpoint.pt, losses.json, losses.png.

    With `restart` a run that has ended goes on to more steps, its learning rate high again (a warm restart, arXiv 1608.03983),
    with another size of batch if the settings say so; what is recorded of it says at which steps that was, and how it had been
    trained up to there.

    Raises ValueError where the folder holds a run with other settings.
    """

    def __init__(
        self, task: Task, settings: Settings, folder: Path, device: torch.device, restart: bool = False
    ) -> None:
        self.task, self.settings, self.folder, self.device = task, settings, folder, device
        task.to(device)
        self._parameters: list[torch.Tensor] = list(task.networks.parameters())
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._optimizers = _optimizers(task, self._parameters, settings)
        self.step = 0
        self.restarts: list[dict[str, Any]] = []
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}
        if self.checkpoint.is_file():
            self._resume(restart)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _identity(self) -> dict[str, Any]:
        values = asdict(self.settings)
        return {"task": self.task.name, **{name: values[name] for name in IDENTITY}}

    def _resume(self, restart: bool) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        mine = self._identity()
        before = replace(self.settings, steps=state["identity"]["steps"])
        # So long as it has not begun to slow down, a run may be made longer or shorter.
        same_so_far = all(
            learning_rate_at(step, before) == learning_rate_at(step, self.settings) for step in range(state["step"])
        )
        self.restarts = state["restarts"]
        restarted = restart and state["step"] == before.steps < self.settings.steps
        if restarted:
            self.restarts.append({name: state["identity"][name] for name in _RESTARTED})
        for name, value in state["identity"].items():
            may_differ = name in _RESTARTED if restarted else name == "steps" and same_so_far
            if value != mine[name] and not may_differ:
                raise ValueError(
                    f"The run in {self.folder} has {name} {value}, this one {mine[name]}. "
                    "Resume it with its own settings, or start afresh in another folder."
                )
        self.task.networks.load_state_dict(state["networks"])
        for average, name in zip(self._average, dict(self.task.networks.named_parameters()), strict=True):
            average.copy_(state["average"][name])
        for optimizer, kept in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.history, self._sums = state["step"], state["history"], state["sums"]

    def save(self) -> None:
        """Write the state; the files appear complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = list(dict(self.task.networks.named_parameters()))
        state = {
            "identity": self._identity(),
            "networks": self.task.networks.state_dict(),
            "average": dict(zip(names, self._average, strict=True)),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "step": self.step,
            "restarts": self.restarts,
            "history": self.history,
            "sums": self._sums,
        }
        partial = self.checkpoint.with_suffix(f".{os.getpid()}.partial")
        try:
            torch.save(state, partial)
            partial.replace(self.checkpoint)
        finally:
            partial.unlink(missing_ok=True)
        if self.history:
            (self.folder / "losses.json").write_text(json.dumps(self.history))
            draw_curves(self.history, self.task.name).save(self.folder / "losses.png", optimize=True)

    def use_average(self) -> None:
        """Put the averaged weights into the task's networks, to look at; the run cannot go on after this."""
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._average)

    def _update(self, batch: Batch) -> dict[str, float]:
        settings = self.settings
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        generator = torch.Generator().manual_seed(step_seed(settings.seed, self.step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bfloat16):
            losses = self.task.losses(batch, generator)
        for parameter in self._parameters:
            parameter.grad = None
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self._parameters, settings.clip)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(self.step, settings)
            optimizer.step()
        # A young average forgets faster, or the first weights would stay in it for long.
        keep = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._parameters, 1.0 - keep)
        return {name: float(value.detach()) for name, value in losses.items()}

    def train(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> bool:
        """Train to the last step; saves every few minutes and at the end. Returns whether the end was reached.

        After `should_stop` says so the step at hand is finished and the state is saved.
        """
        settings = self.settings
        started, first = time.monotonic(), self.step
        saved = started
        batches = in_workers(_Steps(self.task, settings, self.step), settings.workers)
        while self.step < settings.steps and not should_stop():
            losses = self._update(next(batches))
            self.step += 1
            for name, value in losses.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            now = time.monotonic()
            if self.step % settings.record_every == 0:
                means = {name: value / settings.record_every for name, value in self._sums.items()}
                self.history.append({"step": self.step, **means})
                self._sums = {}
                report(
                    Progress(self.task.name, self.step, settings.steps, (self.step - first) / (now - started), means)
                )
            if now - saved > settings.save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.step >= settings.steps


def averaged_weights(folder: Path, network: str) -> dict[str, torch.Tensor]:
    """One network from a stage's folder, on the CPU: averaged weights, and what is not trained as it is.

    Raises FileNotFoundError without a checkpoint.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}: train the stage {folder.name!r} first.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    prefix = f"{network}."
    whole = {**state["networks"], **state["average"]}
    return {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
