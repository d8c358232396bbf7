"""The benchmark of tuned subjects asks for what it says, counts it, and keeps what it has made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from devtools.pack import pack_module

bench = pack_module("evaluation.bench_tuning")
colours = pack_module("training.world.attributes").COLOURS


@pytest.mark.quick
def test_a_subjects_colors_are_its_own_and_the_other_one_is_not() -> None:
    for number in range(20):
        look = bench.look_of("test", number)
        own, other = bench.own_colours(look), bench.other_colour(look)
        for name in own:
            nearest = [
                min(colours, key=lambda of: np.linalg.norm(np.asarray(colours[of]) - tone)) for tone in look.tones[:2]
            ]
            assert name in nearest
        assert other not in own
        found = bench.dictionary(look)
        prompts = bench.subject_prompts(found, bench.TOKEN)
        assert prompts[0] == f"a photo of a sks {look.shape}" and all(name in " ".join(prompts) for name in own)


@pytest.mark.quick
def test_a_row_counts_its_outcomes() -> None:
    found = [{"likeness": 0.1 * k, "found": k > 7, "right": k < 3} for k in range(10)]
    first = [{"likeness": 0.0, "found": False, "right": True} for _ in range(10)]
    row = bench.summary("insertion", "tuned", found, first)
    assert (row["n"], row["found"], row["right"]) == (10, 0.2, 0.3)
    assert row["likeness"] == pytest.approx(0.45) and row["rise"] == pytest.approx(0.45)
    assert bench.cells(row)["found"].startswith("20.0 (")


def test_it_goes_on_from_what_it_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, rows = tmp_path / "outcomes.jsonl", tmp_path / "rows.json"
    arguments = ["bench", "--subjects", "1", "--scenes", "1", "--steps", "1", "--sampling-steps", "2"]
    arguments += ["--loras", str(tmp_path), "--outcomes", str(outcomes), "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == 0
    first = outcomes.read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert [(line["task"], line["row"]) for line in lines] == [
        (task, row) for task, of in bench.TASKS.items() for row in of
    ]
    # Every part of it changes the picture.
    for task in bench.TASKS:
        likeness = [line["outcome"]["likeness"] for line in lines if line["task"] == task]
        assert len(set(likeness)) == len(likeness)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
    made = json.loads(rows.read_text())["rows"]

    def none(*_: object) -> None:
        raise AssertionError("nothing is to be made again")

    monkeypatch.setattr(bench.Bench, "attempt", none)
    assert bench.main() == 0
    assert outcomes.read_text() == first and json.loads(rows.read_text())["rows"] == made
