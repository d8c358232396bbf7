"""The benchmark of subjects: its table from known outcomes, and a run on untrained weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.pack import ensure_host, pack_module
from truefill_testing import demo_subject

ensure_host()

bench = pack_module("evaluation.bench_likeness")
subjects = pack_module("training.world.subjects")
SHAPES = pack_module("training.world.attributes").SHAPES


def outcome(index: int, likeness: float, found: bool) -> dict:
    return {"index": index, "likeness": likeness, "found": found, "text": True, "empty": False, "background_error": 0.0}


@pytest.mark.quick
def test_a_row_says_what_came_of_its_subjects() -> None:
    first = [outcome(index, 0.1, False) for index in range(10)]
    ours = [outcome(index, 0.1 + 0.1 * index, index < 6) for index in range(10)]
    row = bench.summary("Assign 1", ours, first)
    assert row["n"] == 10 and row["likeness"] == pytest.approx(0.55) and row["found"] == 0.6
    assert row["found_ci95"] == pytest.approx((0.3127, 0.8318), abs=1e-3)
    # 0, 0.1 ... 0.9: a mean of 0.45 and a deviation of 0.3028.
    assert row["rise"] == pytest.approx(0.45)
    assert row["rise_ci95"] == pytest.approx((0.45 - 0.1877, 0.45 + 0.1877), abs=1e-3)
    assert bench.cells(row)["found"] == "60.0 (31.3 to 83.2)" and bench.cells(row)["text"].startswith("100.0")


@pytest.mark.quick
def test_the_prompt_says_the_shape_or_another_one_or_nothing() -> None:
    quadruple = subjects.make_quadruple("test", 3, 3)
    own = quadruple.prompt.split()[-1]
    assert bench.prompt_of(quadruple, "own") == (f"a {own}", own)
    prompt, shape = bench.prompt_of(quadruple, "other")
    assert prompt == f"a {shape}" and shape in SHAPES and shape != own
    assert bench.prompt_of(quadruple, "none") == ("", own)
    assert len({bench.other_shape(shape) for shape in SHAPES}) == len(SHAPES)


def test_the_subject_is_told_apart_from_19_of_its_shape() -> None:
    """By a network that sees mean colors alone, in the place of the trained one."""
    judge = bench.LikenessJudge.__new__(bench.LikenessJudge)
    judge._others = {}
    judge._network = lambda crops: torch.nn.functional.normalize(
        torch.nn.functional.adaptive_avg_pool2d(crops - crops.mean(), 4).flatten(1), dim=-1
    )
    quadruple = subjects.make_quadruple("test", 0, 0)
    own = judge.embedding(quadruple.picture, quadruple.hole)
    assert own.shape == (48,) and float(own @ own) == pytest.approx(1.0, abs=1e-5)
    others = judge.others("star")
    assert others.shape == (19, 48) and judge.others("star") is others
    assert len({tuple(of.tolist()) for of in others}) == 19


def test_the_model_is_not_shown_the_truth(tmp_path: Path) -> None:
    """What is to be drawn is nowhere in what a row is given: neither in the hole nor in what the autoencoder sees around it."""
    weights = demo_subject.write_untrained(tmp_path)
    made = bench.Bench(weights)
    quadruple = subjects.make_quadruple("test", 1, 1)
    other = replace(quadruple, picture=255 - quadruple.picture)
    assert not np.array_equal(quadruple.scene, quadruple.picture)
    for row in (bench.ROWS["Assign 1"], bench.ROWS["plain demo model"]):
        pictures = [made.fill(row, of, "a star", 0, 2, 3.0) for of in (quadruple, other)]
        assert np.array_equal(*pictures)
        known = ~quadruple.hole
        assert np.array_equal(pictures[0][known], quadruple.scene[known])
        assert not np.array_equal(pictures[0], quadruple.scene)


def test_a_run_ends_with_a_table_and_goes_on_from_its_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = demo_subject.write_untrained(tmp_path)
    kept, table, pictures = tmp_path / "kept.jsonl", tmp_path / "rows.json", tmp_path / "grid.png"
    arguments = ["bench", "--weights", weights, "--subjects", "2", "--steps", "1", "--outcomes", kept, "--json", table]
    rows = ["--rows", "text alone", "plain demo model", "Assign 0.3 + Refine trained"]
    monkeypatch.setattr("sys.argv", [*map(str, arguments), *rows, "--grid", str(pictures)])
    assert bench.main() == 0
    found = json.loads(table.read_text())["rows"]
    assert [row["row"] for row in found] == ["the truth", "another subject", *rows[1:]]
    assert all(row["background_max_error"] == 0.0 for row in found if row["row"] != "another subject")
    assert found[0]["likeness"] != found[1]["likeness"]
    likenesses = [row["likeness"] for row in found[2:]]
    assert len(set(likenesses)) == 3
    # Subject, hole, three rows and the truth, for two subjects.
    assert np.asarray(Image.open(pictures)).shape[1] == 6 * 256
    assert len(kept.read_text().splitlines()) == 6
    out = capsys.readouterr().out
    assert "likeness" in out and "the truth" in out

    monkeypatch.setattr("sys.argv", [*map(str, arguments), *rows])
    monkeypatch.setattr(bench.Bench, "fill", lambda *_: pytest.fail("made again"))
    assert bench.main() == 0
    assert [row["likeness"] for row in json.loads(table.read_text())["rows"]][2:] == likenesses


def test_without_a_trained_reference_network_its_rows_are_left_out_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = demo_subject.write_untrained(tmp_path)
    (weights / pack_module("weights.demo_subject").REFERENCE_FILE).unlink()
    monkeypatch.setattr(bench.Bench, "fill", lambda self, row, quadruple, *_: quadruple.picture)
    table = tmp_path / "rows.json"
    arguments = ["bench", "--weights", str(weights), "--subjects", "1", "--json", str(table)]
    monkeypatch.setattr("sys.argv", arguments)
    assert bench.main() == 0
    names = [row["row"] for row in json.loads(table.read_text())["rows"]]
    assert "Refine untrained" in names and not any("Refine trained" in name for name in names)
    monkeypatch.setattr("sys.argv", [*arguments, "--rows", "Refine trained"])
    assert bench.main() == 1
    assert "has no trained reference network yet" in capsys.readouterr().err
