"""Kept outcomes are those of the same settings, and a figure shows its interval."""

from __future__ import annotations

from pathlib import Path

import pytest

from devtools.pack import pack_module

outcomes = pack_module("evaluation.outcomes")
tables = pack_module("evaluation.tables")


@pytest.mark.quick
def test_what_was_made_with_other_settings_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    for steps, row, index in ((20, "a", 1), (20, "b", 1), (30, "a", 2), (20, "a", 3)):
        outcomes.keep_outcome(path, {"steps": steps}, {"index": index, "right": True}, row=row)
    found = outcomes.kept_outcomes(path, ("row",), lambda line: {"steps": 20} if line["row"] == "a" else None)
    assert found == {("a", index): {"index": index, "right": True} for index in (1, 3)}
    assert outcomes.kept_outcomes(tmp_path / "none.jsonl", ("row",), lambda line: None) == {}
    outcomes.keep_outcome(None, {}, {"index": 1})
    assert outcomes.kept_outcomes(None, ("row",), lambda line: {}) == {}


@pytest.mark.quick
def test_a_figure_and_its_interval() -> None:
    row = {"right": 0.25, "right_ci95": (0.1, 0.4)}
    assert tables.with_interval(row, "right") == "25.0 (10.0 to 40.0)"
    assert tables.with_interval(row, "right", 1.0, 2) == "0.25 (0.10 to 0.40)"
    assert tables.with_interval(row, "rise") == ""
