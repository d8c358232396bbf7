"""What the tests stand on: answers of literal forms kept by content, and cases that hold all pairs."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from truefill_testing import oracle
from truefill_testing.pairwise import all_pairs

pytestmark = pytest.mark.quick

SOURCE = """
from dataclasses import dataclass, field
import torch
from .literal_part import PART

CALLS = []

@dataclass
class Step:
    x: torch.Tensor

@dataclass
class Run:
    latent: torch.Tensor
    steps: list = field(default_factory=list)

def literal_toy(x, factor=2.0, network=None, settings=None):
    CALLS.append(factor)
    return Run(factor * x, [Step(x + PART), Step(x + 2 * PART)])
"""


@dataclass
class Settings:
    gamma: float = 1.0


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Writes and imports a literal form; its answers are kept in a folder of their own."""
    monkeypatch.setattr(oracle, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(oracle, "_ASIDE", tmp_path / "aside")
    monkeypatch.setattr(oracle._State, "compute_all", False)
    # A file that was compiled before may be of the same second and length.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(source: str = SOURCE, part: float = 1.0) -> ModuleType:
        _forget()
        modules = []
        for name, text in (("literal_part", f"PART = {part}\n"), ("literal_toy", source)):
            path = tmp_path / f"{name}.py"
            path.write_text(text, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(f"toys.{name}", path)
            assert spec is not None and spec.loader is not None
            modules.append(importlib.util.module_from_spec(spec))
            monkeypatch.setitem(sys.modules, f"toys.{name}", modules[-1])
            spec.loader.exec_module(modules[-1])
        return modules[-1]

    monkeypatch.setitem(sys.modules, "toys", ModuleType("toys"))
    yield load
    _forget()


def _forget() -> None:
    oracle._contents.cache_clear()
    oracle._sources.cache_clear()


def ask(toy: ModuleType, *arguments: Any, **options: Any) -> Any:
    return oracle.kept(("latent", "steps.x"), toy.literal_toy, *arguments, **options)


def keep() -> None:
    """Puts what was computed in its place, as the end of a run with --oracles does."""
    list(oracle.Plugin._put_in_place(sorted(oracle._ASIDE.glob("*.npz")), drop_others=False))
    _forget()


X = torch.arange(6.0).reshape(2, 3)


def test_an_answer_is_computed_once(toy: Callable[..., ModuleType]) -> None:
    module = toy()
    first = ask(module, X)
    keep()
    again = ask(module, X.clone())
    for answer in (first, again):
        assert torch.equal(answer.latent, 2.0 * X.double())
        assert torch.equal(answer.steps[1].x, X.double() + 2.0)
    assert len(module.CALLS) == 1


@pytest.mark.parametrize(
    "changed",
    [
        lambda x, network: ((x + 1e-3,), {"network": network, "settings": Settings()}),
        lambda x, network: ((x.reshape(3, 2),), {"network": network, "settings": Settings()}),
        lambda x, network: ((x,), {"factor": 2.5, "network": network, "settings": Settings()}),
        lambda x, network: ((x,), {"network": network, "settings": Settings(gamma=0.5)}),
        lambda x, network: ((x,), {"network": torch.nn.Linear(2, 2), "settings": Settings()}),
        lambda x, network: ((x,), {"network": torch.nn.GroupNorm(2, 4, eps=1e-6), "settings": Settings()}),
    ],
    ids=["numbers", "shape", "option", "settings", "weights", "eps"],
)
def test_another_input_is_another_question(toy: Callable[..., ModuleType], changed: Any) -> None:
    module, network = toy(), torch.nn.GroupNorm(2, 4, eps=1e-5)
    ask(module, X, network=network, settings=Settings())
    arguments, options = changed(X, network)
    ask(module, *arguments, **options)
    ask(module, X, network=network, settings=Settings())
    assert len(module.CALLS) == 2


def test_what_another_machine_rounds_otherwise_is_the_same_question(toy: Callable[..., ModuleType]) -> None:
    module = toy()
    for last_bit, made_of, calls in ((0.0, 7, 1), (1e-7, 7, 1), (0.0, 8, 2)):
        ask(module, oracle.made_of(X + last_bit * X, made_of))
        assert len(module.CALLS) == calls


def test_an_edited_form_answers_anew(toy: Callable[..., ModuleType]) -> None:
    ask(toy(), X)
    keep()
    edited = toy(SOURCE.replace("factor * x", "factor * x + 1.0"))
    assert torch.equal(ask(edited, X).latent, 2.0 * X.double() + 1.0)
    assert torch.equal(ask(toy(part=5.0), X).steps[0].x, X.double() + 5.0)


def test_what_cannot_be_told_apart_is_refused(toy: Callable[..., ModuleType]) -> None:
    with pytest.raises(TypeError, match="is not told by what it holds"):
        ask(toy(), X, settings=lambda step: step)


def test_an_answer_that_has_changed_by_itself_fails(
    toy: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = toy()
    ask(module, X)
    keep()
    monkeypatch.setattr(oracle._State, "compute_all", True)
    ask(module, X)
    # As if torch or the host computed something else: the form itself is as it was.
    module.PART = 1.1
    with pytest.raises(pytest.fail.Exception, match="is off by"):
        ask(module, X)


@pytest.mark.parametrize("factors", [("ab", "xyz", "1234"), ("abc", "xyz", "123"), ("ab", "xy", "12", "pq"), ("ab",)])
def test_every_pair_has_a_case_and_few_cases_do(factors: tuple[str, ...]) -> None:
    cases = all_pairs(*factors)
    assert len(set(cases)) == len(cases) and cases == all_pairs(*factors)
    for one, other in itertools.combinations(range(len(factors)), 2):
        found = {(case[one], case[other]) for case in cases}
        assert found == set(itertools.product(factors[one], factors[other]))
    assert len(cases) <= 1.5 * max(len(a) * len(b) for a, b in itertools.combinations([*factors, "a"], 2))
