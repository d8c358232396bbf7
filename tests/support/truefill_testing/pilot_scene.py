"""Small models sampled with PILOT, and what its optimiser asks for on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.scene import Scene, boxes, forget_models

pilot = pack_module("model_patches.pilot.sampler")
PILOT = pilot.PILOT

# Both leave known pixels and pixels of the hole on more than one level.
HOLE = boxes((16, 13), (slice(2, 12), slice(3, 13)), (slice(4, 16), slice(0, 9)))
# Random networks predict far away pictures: the released rates would throw the latent out of any sensible range.
CALM = {"learning_rate": 1e-4, "first_learning_rate": 5e-5}


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_no_leftovers() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget_models()


def scene_of(family: str = "sd15", v_prediction: bool = False, **options: Any) -> Scene:
    return Scene(family, False, True, v_prediction=v_prediction, **{"hole": HOLE, **options})


def sampler(**settings: Any) -> Any:
    return pilot.pilot_sampler(PILOT(**{**CALM, **settings}), lambda text: None)


@dataclass
class Spied:
    """What the optimiser asked for and got, in the host's coordinates."""

    x: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    centralisation: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    found = Spied()
    gradient, background = pilot._Job._gradient, pilot.background_loss
    centralisation = pilot.Centralisation.loss

    def spy_gradient(self, x, rows, timestep):
        denoised, result = gradient(self, x, rows, timestep)
        found.x.append(x.clone())
        found.gradients.append(result.clone())
        return denoised, result

    def spy(of: Callable[..., torch.Tensor], into: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noting(*arguments: Any) -> torch.Tensor:
            result = of(*arguments)
            into.append(result.detach().clone())
            return result

        return noting

    monkeypatch.setattr(pilot._Job, "_gradient", spy_gradient)
    monkeypatch.setattr(pilot, "background_loss", spy(background, found.losses))
    monkeypatch.setattr(pilot.Centralisation, "loss", spy(centralisation, found.centralisation))
    return found
