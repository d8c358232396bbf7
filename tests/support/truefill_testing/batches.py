"""Batches on stand-in servers, and what is left of them."""

from __future__ import annotations

import csv
import json
import threading
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from devtools.batch import command
from truefill_testing.comfy_stand_in import StandIn


def command_line(table: Path, *servers: StandIn, out: str = "out", **options) -> list[str]:
    arguments = [table.parent / "graph.json", table, "--out", table.parent / out, "--answer", 2, "--patience", 3]
    for name, value in {"metrics": "none", **options}.items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    if servers:
        arguments += ["--servers", *(server.address for server in servers)]
    return [str(argument) for argument in arguments]


def run(*given, **options) -> int:
    """A batch on servers; returns the exit code."""
    return command.work_through(command.parse(command_line(*given, **options)))


def results(table: Path, out: str = "out") -> list[dict[str, str]]:
    with (table.parent / out / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def prompts_of(table: Path, out: str = "out") -> dict[str, str]:
    """What each picture was made of, by the name of its file."""
    found = {}
    for path in (table.parent / out / "pictures").iterdir():
        with Image.open(path) as picture:
            found[path.stem] = json.loads(picture.text["prompt"])["2"]["inputs"]["prompt"]
    return found


def every(count: int, word: str = "row") -> dict[str, str]:
    return {f"{word} {number}": f"{word} {number}" for number in range(1, count + 1)}


@contextmanager
def later(seconds: float, act):
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.join()
