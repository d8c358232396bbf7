"""The benchmark of branches asks for what it says, counts it, and keeps what it has made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from devtools.pack import pack_module

bench = pack_module("evaluation.bench_branch")
full_size = pack_module("evaluation.full_size")


@pytest.mark.quick
def test_each_hole_is_about_a_thing_as_the_prompt_asks_for_it() -> None:
    for index in range(4):
        triplet = bench.make_triplet("dev", index)
        box, irregular, outline = (bench.task_of(triplet, shape).hole for shape in ("box", "irregular", "outline"))
        rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
        assert box.sum() == len(rows) * len(columns) and not (outline & ~box).any()
        assert not (outline & ~irregular).any() and irregular.sum() > outline.sum()
        # In its own hole's middle, and not larger.
        old = np.argwhere(triplet.hole)
        new = np.argwhere(outline)
        assert np.abs((old.min(0) + old.max(0)) - (new.min(0) + new.max(0))).max() < 0.4 * np.ptp(old, axis=0).max()
        assert (np.ptp(new, axis=0) <= np.ptp(old, axis=0)).all()
        assert bench.task_of(triplet, "box").prompt == triplet.prompt


@pytest.mark.quick
def test_a_row_counts_its_outcomes() -> None:
    rest = {"background_error": 0.0, "change_before": 2.0, "seconds": 1.0}
    found = [{"right": k < 3, "empty": k == 9, "seam": float(k), **rest} for k in range(10)]
    first = [{"right": k < 1, "empty": False, "seam": 0.0, **rest} for k in range(10)]
    row = bench.summary("branch", "box", found, first)
    assert (row["n"], row["right"], row["empty"], row["seam"]) == (10, 0.3, 0.1, 4.5)
    assert row["rise"] == pytest.approx(0.2) and row["rise_ci95"][0] < 0.2 < row["rise_ci95"][1]
    assert "rise" not in bench.summary("plain", "box", first, None)
    assert bench.cells(row)["right"].startswith("30.0 (")


def test_it_goes_on_from_what_it_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, rows = tmp_path / "outcomes.jsonl", tmp_path / "rows.json"
    arguments = ["bench", "--triplets", "1", "--shapes", "outline", "--steps", "2", "--runs", str(tmp_path)]
    arguments += ["--rows", "plain 4-channel", "+ attention loss", "--outcomes", str(outcomes), "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == 0
    first = outcomes.read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert [line["row"] for line in lines] == ["plain 4-channel", "+ attention loss"]
    assert lines[0]["outcome"] != lines[1]["outcome"]
    made = json.loads(rows.read_text())["rows"]
    assert [row["shape"] for row in made] == ["outline", "outline", "all", "all"]
    assert all(row["background_max_error"] == 0 for row in made)

    def none(*_: object) -> None:
        raise AssertionError("nothing is to be made again")

    monkeypatch.setattr(bench.Bench, "attempt", none)
    assert bench.main() == 0
    assert outcomes.read_text() == first and json.loads(rows.read_text())["rows"] == made


@pytest.mark.quick
def test_a_branch_that_is_not_there_gets_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--rows", "layer points", "--runs", str(tmp_path)])
    assert bench.main() == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("bench branch: there is no branch 'branch-of-layers' in ") and "\n" not in said
