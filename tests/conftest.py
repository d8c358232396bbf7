"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

# `devtools` lies in the project's root, which must not be on sys.path in a process that holds the host.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from devtools import pack as loader
from truefill_testing import oracle

del sys.path[0]


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The pack, loaded the way the host loads it."""
    return loader.load_pack()


@pytest.fixture(scope="session")
def pack_module() -> Callable[[str], ModuleType]:
    """A function that imports one module of the pack: `pack_module("model_patches.hd_painter.painta")`."""
    return loader.pack_module


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--oracles",
        action="store_true",
        help="compute the literal forms' answers anew instead of reading the kept ones",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m quick` leaves files without a quick test alone: most of them import the host."""
    if config.option.markexpr != "quick" or not collection_path.match("test_*.py"):
        return None
    return None if "mark.quick" in collection_path.read_text(encoding="utf-8") else True


def pytest_collection_finish() -> None:
    """What was imported stays: the host collects garbage whenever it loads a model, and would look through all of it."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    loader.ensure_host()
    from comfy.cli_args import args

    # A GPU's, as most people have it. The servers of tests/host take the host's choice for a CPU, which is another.
    args.use_pytorch_cross_attention = True
    # The models are tiny: one thread is fastest, and rounds the same on every machine.
    torch.set_num_threads(1)
    config.pluginmanager.register(oracle.Plugin(config), "oracles")
