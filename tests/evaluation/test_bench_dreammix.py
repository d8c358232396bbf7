"""The benchmark of small things counts what it says, and keeps what it has made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from devtools.pack import pack_module

bench = pack_module("evaluation.bench_dreammix")
accuracy = pack_module("evaluation.accuracy")


@pytest.mark.quick
@pytest.mark.parametrize("side", [16, 33])
def test_the_hole_is_small_and_what_is_drawn_lies_in_it(side: int) -> None:
    for index in range(4):
        triplet = bench.make_triplet("dev", index)
        hole, (x, y) = bench.small_hole(triplet, side)
        rows, columns = np.flatnonzero(hole[0].any(dim=1)), np.flatnonzero(hole[0].any(dim=0))
        assert len(rows) == len(columns) == side and int(hole.sum()) == side * side
        assert abs(x - (columns[0] + side / 2)) < 1e-6 and abs(y - (rows[0] + side / 2)) < 1e-6
        tall = np.flatnonzero(triplet.hole.any(axis=1))
        assert abs((rows[0] + rows[-1]) - (tall[0] + tall[-1])) <= 1
        made, scene = bench.drawn(triplet, side), accuracy.as_image(triplet.scene.picture)
        outside = hole[..., None].expand_as(scene) == 0
        assert torch.equal(made[outside], scene[outside])
        assert float((made - scene)[~outside].abs().max()) > 0.1


@pytest.mark.quick
def test_a_row_counts_its_outcomes() -> None:
    found = [{"right": k < 3, "empty": k == 9, "seam": float(k), "background_error": 0.0} for k in range(10)]
    first = [{"right": k < 1, "empty": False, "seam": 0.0, "background_error": 0.0} for k in range(10)]
    row = bench.summary(16, "0.7", found, first)
    assert (row["n"], row["right"], row["empty"], row["seam"]) == (10, 0.3, 0.1, 4.5)
    assert row["rise"] == pytest.approx(0.2) and row["rise_ci95"][0] < 0.2 < row["rise_ci95"][1]
    assert "rise" not in bench.summary(16, "0", first, None)
    assert bench.cells(row)["right"].startswith("30.0 (")


def test_it_goes_on_from_what_it_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, rows = tmp_path / "outcomes.jsonl", tmp_path / "rows.json"
    arguments = ["bench", "--scenes", "1", "--sides", "32", "--shares", "0", "1", "--steps", "2"]
    arguments += ["--outcomes", str(outcomes), "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == 0
    first = outcomes.read_text()
    assert [json.loads(line)["share"] for line in first.splitlines()] == [0.0, 1.0]
    made = json.loads(rows.read_text())["rows"]
    assert [row["local_share"] for row in made] == [bench.DRAWN, bench.COARSE, "0", "1"]
    assert all(row["background_max_error"] == 0 for row in made if row["local_share"] != bench.COARSE)

    def none(*_: object) -> None:
        raise AssertionError("nothing is to be made again")

    monkeypatch.setattr(bench.Bench, "fill", none)
    assert bench.main() == 0
    assert outcomes.read_text() == first and json.loads(rows.read_text())["rows"] == made
