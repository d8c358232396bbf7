"""A table of rows for a batch, and no long rests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devtools.batch import schedule
from truefill_testing.comfy_stand_in import graph


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr(schedule, "_REST", 0.2)
    monkeypatch.setattr(schedule, "_LOOK", 0.05)


@pytest.fixture
def jobs(tmp_path):
    """A function that writes a table of so many rows, each with a prompt of its own."""
    (tmp_path / "graph.json").write_text(json.dumps(graph()))

    def write(count: int, name: str = "jobs.csv", word: str = "row") -> Path:
        path = tmp_path / name
        lines = ["name,prompt,seed", *(f"{word} {number},{word} {number},{number}" for number in range(1, count + 1))]
        path.write_text("\n".join(lines))
        return path

    return write
