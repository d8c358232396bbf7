"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from truefill_testing import host

# Tests import `devtools` by name; it lies in the project's root, which must not be on sys.path.
host.load_package("devtools", host.ROOT / "devtools")


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The pack, loaded the way the host loads it."""
    return host.load_pack()


@pytest.fixture(scope="session")
def pack_module() -> Callable[[str], ModuleType]:
    """A function that imports one module of the pack: `pack_module("model_patches.hd_painter.painta")`."""
    return host.pack_module


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    # The models are tiny: one thread is fastest, and rounds the same on every machine.
    torch.set_num_threads(1)
