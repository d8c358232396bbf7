"""Answers of the literal forms, kept by what they were computed from.

A literal form is slow on purpose: float64, one matrix after the other. `kept` looks its answer up in tests/support/kept, under a
hash of every argument (tensors, a network's weights, settings) and of the source of the form and of the forms that it is made
of. So an edited form, another seed or a changed setting asks for an answer that is not there:

    it is computed and stays in .cache/oracles, and the run's summary says so;
    with --oracles every answer is computed, compared with the kept one if there is one, and written.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

from devtools.pack import ROOT

KEPT = ROOT / "tests" / "support" / "kept"
"""One file for each module of literal forms, so that two new methods do not change the same file."""
COMMAND = "python dev.py test --oracles tests/model_patches"
SAME = 2e-6
"""A kept answer is float32, and a computed one may round in another order: how far apart they may be, in deviations."""

_ASIDE = ROOT / ".cache" / "oracles"
# What the literal forms read of a network's modules besides its weights.
_OF_MODULES = (
    *("heads", "dim_head", "eps", "num_groups", "stride", "padding"),
    *("model_channels", "num_classes", "use_linear"),
)
_Answer = dict[str, np.ndarray]


class _State:
    compute_all = False


def kept(parts: tuple[str, ...], oracle: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The named parts of `oracle(*arguments, **options)`, as float64 tensors that have gone through float32.

    `oracle` is a function of one of this package's modules that returns a dataclass. A part is the name of one of its tensors
    ("latent") or of a tensor of each item of a list ("steps.x0"); they are found under the same names in what is returned.
    Raises TypeError for an argument whose content cannot be told, such as a lambda.
    """
    name = oracle.__module__.rpartition(".")[2]
    key = _key(parts, oracle, arguments, options)
    known = None if _State.compute_all else _read(name, key)
    if known is not None:
        return _nested(known)
    result = oracle(*arguments, **options)
    answer = {
        path: value.detach().float().numpy() for path, value in _flat(result, "") if re.sub(r"\.\d+", "", path) in parts
    }
    for part in parts:
        if not hasattr(result, part.partition(".")[0]):
            raise ValueError(f"{oracle.__qualname__} has no {part}")
    if _State.compute_all:
        _compare(answer, _read(name, key), f"{name}, {key}")
    _write(_ASIDE / f"{name}-{key}.npz", {f"{key}/{path}": value for path, value in answer.items()})
    return _nested(answer)


def made_of(tensor: torch.Tensor, *parts: Any) -> torch.Tensor:
    """`tensor`, which the host has computed from `parts` in float32: an answer is looked up by these, since another machine's
    sines and exponentials differ in the last bit."""
    tensor._made_of = parts  # type: ignore[attr-defined]
    return tensor


def _key(parts: tuple[str, ...], oracle: Callable[..., Any], arguments: tuple[Any, ...], options: Any) -> str:
    digest = hashlib.sha256()
    said = [*parts, oracle.__qualname__, *_sources(oracle.__module__), *_told(arguments), *_told(options)]
    for text in said:
        digest.update(text if isinstance(text, bytes) else text.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:20]


@cache
def _sources(module: str) -> tuple[str, ...]:
    """The source of a module of this package and of the modules of literal forms that it imports."""
    texts: dict[str, str] = {}
    names = [module]
    while names:
        name = names.pop()
        if name not in texts:
            path = sys.modules[name].__file__
            assert path is not None
            texts[name] = Path(path).read_text(encoding="utf-8")
            package = name.rpartition(".")[0]
            names += [f"{package}.{found}" for found in re.findall(r"^from \.(literal_\w+) import", texts[name], re.M)]
    return tuple(texts[name] for name in sorted(texts))


def _told(value: Any) -> Iterator[str | bytes]:
    """What a value is, in texts that are the same on every machine: numbers computed in float64 are told as float32, and those
    that the host has computed in float32 by what they are made of."""
    if value is None or isinstance(value, str | bool | int):
        yield repr(value)
    elif isinstance(value, float):
        yield f"{value:.7g}"
    elif isinstance(value, torch.nn.Module):
        yield _network(value)
    elif hasattr(value, "_made_of"):
        yield from _told(value._made_of)
    elif isinstance(value, torch.Tensor):
        tensor = value.detach().contiguous()
        yield str(tuple(tensor.shape))
        yield (tensor.float() if tensor.is_floating_point() else tensor).numpy().tobytes()
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield str(name)
            yield from _told(value[name])
    elif isinstance(value, list | tuple):
        yield str(len(value))
        for item in value:
            yield from _told(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__qualname__
        if callable(value):
            yield from _sources(type(value).__module__)
        yield from _told({field.name: getattr(value, field.name) for field in fields(value)})
    else:
        raise TypeError(f"what a {type(value).__qualname__} computes is not told by what it holds: {value!r}")


_networks: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def _network(module: torch.nn.Module) -> str:
    if module not in _networks:
        digest = hashlib.sha256()
        for name, child in module.named_modules():
            read = {of: getattr(child, of) for of in _OF_MODULES if hasattr(child, of)}
            digest.update(f"{name} {read}".encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().contiguous().numpy())
        _networks[module] = digest.hexdigest()
    return _networks[module]


def _flat(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, bool | int | float):
        yield path, torch.tensor(float(value))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _flat(item, f"{path}.{number}")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _flat(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))


def _nested(answer: _Answer) -> Any:
    """Tensors under the names that `_flat` gave them."""
    top: dict[str, Any] = {}
    for path, value in answer.items():
        *levels, last = path.split(".")
        place = top
        for level in levels:
            place = place.setdefault(level, {})
        place[last] = torch.from_numpy(value).double()
    return _as_objects(top)


def _as_objects(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    made = {name: _as_objects(item) for name, item in tree.items()}
    if all(name.isdigit() for name in made):
        return [made[name] for name in sorted(made, key=int)]
    return SimpleNamespace(**made)


@cache
def _contents(name: str) -> dict[str, _Answer]:
    """All kept answers of a module, by key."""
    path = KEPT / f"{name}.npz"
    answers: dict[str, _Answer] = {}
    if path.is_file():
        with np.load(path) as file:
            for entry in file.files:
                key, _, part = entry.partition("/")
                answers.setdefault(key, {})[part] = file[entry]
    return answers


def _read(name: str, key: str) -> _Answer | None:
    known = _contents(name).get(key)
    aside = _ASIDE / f"{name}-{key}.npz"
    if known is None and not _State.compute_all and aside.is_file():
        with np.load(aside) as file:
            known = {entry.partition("/")[2]: file[entry] for entry in file.files}
    return known


def _write(path: Path, arrays: _Answer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two workers may come to the same answer.
    new = path.with_name(f"{uuid.uuid4().hex}.part")
    with new.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(new, path)


def _compare(answer: _Answer, known: _Answer | None, where: str) -> None:
    for path, value in answer.items() if known is not None else ():
        assert known is not None
        far = float(np.abs(value - known[path]).max()) if value.size else 0.0
        if far > SAME * max(float(np.abs(value).max(initial=0.0)), 1e-30):
            pytest.fail(
                f"The kept answer of {where} ({path}) is off by {far:.2g}: what it was computed with has changed, "
                f"torch or the host. If that is right, remove {KEPT} and run `{COMMAND}`.",
                pytrace=False,
            )


class Plugin:
    """Reads pytest's option --oracles, and puts what was computed in its place at the end of a run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._is_worker = hasattr(config, "workerinput")
        _State.compute_all = config.getoption("--oracles")
        if _State.compute_all and not self._is_worker:
            shutil.rmtree(_ASIDE, ignore_errors=True)

    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        """Only the process that has the terminal comes here, once the workers are done."""
        aside = sorted(_ASIDE.glob("*.npz"))
        if not aside:
            return
        if _State.compute_all:
            for line in self._put_in_place(aside, drop_others=exitstatus == 0 and self._all_were_asked()):
                terminalreporter.write_line(line)
        else:
            terminalreporter.write_line(
                f"{len(aside)} answers of literal forms are not kept yet: run `{COMMAND}` and commit {KEPT.name}."
            )

    def _all_were_asked(self) -> bool:
        """Whether this run was of all tests that ask for kept answers, so that those left are of no use."""
        option = self._config.option
        chosen = option.keyword or option.markexpr or getattr(option, "deselect", None) or option.maxfail
        asked = {(Path(self._config.invocation_params.dir) / argument).resolve() for argument in self._config.args}
        return not chosen and any(path in asked for path in (ROOT, ROOT / "tests", ROOT / "tests" / "model_patches"))

    @staticmethod
    def _put_in_place(aside: list[Path], drop_others: bool) -> Iterator[str]:
        of_module: dict[str, _Answer] = {}
        for path in aside:
            with np.load(path) as file:
                of_module.setdefault(path.stem.rpartition("-")[0], {}).update({name: file[name] for name in file.files})
        if drop_others:
            for path in KEPT.glob("*.npz"):
                if path.stem not in of_module:
                    path.unlink()
        for name, computed in sorted(of_module.items()):
            before = {
                f"{key}/{part}": array for key, answer in _contents(name).items() for part, array in answer.items()
            }
            after = computed if drop_others else {**before, **computed}
            # What has not changed stays as it was, to the last bit.
            arrays = {entry: before.get(entry, after[entry]) for entry in sorted(after)}
            path = KEPT / f"{name}.npz"
            if arrays.keys() != before.keys():
                _write(path, arrays)
            counts = [len({entry.partition("/")[0] for entry in entries}) for entries in (computed, after, before)]
            yield (
                f"{name}: {counts[0]} answers computed and compared, {counts[1]} kept ({counts[2]} before), "
                f"{path.stat().st_size / 1e6:.2f} MB"
            )
        shutil.rmtree(_ASIDE)
