"""The accuracy benchmark's table from known outcomes. Its pictures: tests/host/test_demo_model.py."""

from __future__ import annotations

import json
import sys

import pytest

from devtools.pack import host_path, pack_module
from truefill_testing.dask_cluster import dask_cluster

accuracy = pack_module("evaluation.accuracy")
bench = pack_module("evaluation.bench_accuracy")
table = pack_module("evaluation.accuracy_table")


def outcome(index: int, right: bool, **other: float) -> dict:
    values = {"empty": not right, "seconds": 2.0, "background_error": 0.0, "seam": 1.0}
    return {"row": 0, "index": index, "right": right, **values, **other}


def test_rows_are_the_papers_ablation_with_the_boundary_the_grids_and_the_starts():
    rows = accuracy.methods(["9-channel", "4-channel"], [0.01, 0.1])
    first, second = ([row for row in rows if row.model == model] for model in ("9-channel", "4-channel"))
    assert rows == first + second
    papers = ["plain", "PAIntA", "RASG", "RASG", "PAIntA + RASG", "PAIntA + RASG"]
    assert [row.name for row in first[:6]] == papers
    assert [row.eta for row in first[:6]] == [None, None, 0.01, 0.1, 0.01, 0.1]
    assert [row.name for row in first[6:12]] == ["SBC", *(f"{name} + SBC" for name in papers[1:])]
    rest = {row.name for row in first[12:]}
    assert {"RASG 1/32", "RASG 1/16", "RASG both", "best of 2", "best of 4", "best of 8", "best of 4 at 0.25"} <= rest
    # PILOT is for models that are not made for inpainting.
    assert [row.name for row in second] == [*(row.name for row in first), *accuracy.PILOTS]


def test_the_transformers_rows_say_in_which_layers_a_method_acts(monkeypatch):
    rows = accuracy.methods([accuracy.TRANSFORMER], [0.01])
    assert [row.name for row in rows] == [
        "plain",
        *("SBC", "SBC alternate", "SBC first half", "SBC second half"),
        *("PAIntA", "PAIntA alternate", "PAIntA first half", "PAIntA second half"),
        "PAIntA + SBC",
    ]
    given = []
    monkeypatch.setattr(accuracy, "with_method", lambda model, settings: given.append(settings) or model)
    for row in rows:
        given.clear()
        accuracy.patched(None, row)
        assert [type(settings).__name__ for settings in given] == ["PAIntA"] * row.painta + [
            "SemanticBoundary"
        ] * row.boundary
        assert all(settings.layers == row.layers for settings in given)


def test_outcomes_of_the_transformer_go_with_its_weights(monkeypatch, tmp_path):
    names = [*bench.FILES.values(), bench.DIT_FILE]
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    options = bench.parse(["--weights", str(tmp_path), "--models", "transformer", "9-channel", "--methods", "plain"])
    unet, transformer = sorted(bench.tasks(options), key=lambda row: row.model)
    before = [bench.settings(options, row)["weights"] for row in (unet, transformer)]
    (tmp_path / bench.DIT_FILE).write_bytes(b"2")
    after = [bench.settings(options, row)["weights"] for row in (unet, transformer)]
    assert before[0] == after[0] and before[1] != after[1] and before[1].startswith(before[0])


def test_every_row_can_be_asked_for_and_nothing_else(monkeypatch, capsys):
    names = {row.name for row in accuracy.methods([*accuracy.MODELS], [0.01])}
    monkeypatch.setattr("sys.argv", ["bench_accuracy.py", "--methods", *sorted(names)])
    options = bench.parse()
    assert {row.name for row in bench.tasks(options)} == names
    assert {row.model for row in bench.tasks(options)} == set(accuracy.MODELS)
    monkeypatch.setattr("sys.argv", ["bench_accuracy.py", "--methods", "PILOT gamma 7"])
    with pytest.raises(SystemExit):
        bench.parse()
    assert "invalid choice: 'PILOT gamma 7'" in capsys.readouterr().err


def test_a_row_says_what_came_of_its_triplets():
    plain = [outcome(index, index < 4) for index in range(10)]
    ours = [outcome(index, index < 7, seam=3.0, background_error=0.5 * (index == 9)) for index in range(10)]
    row = table.summary(accuracy.Method("9-channel", painta=True, eta=0.01), ours, plain)
    assert row["method"] == "PAIntA + RASG" and row["n"] == 10 and row["accuracy"] == 0.7
    assert row["ci95"] == pytest.approx((0.3968, 0.8922), abs=1e-3)
    # Three of ten pairs differ, all in one direction.
    assert row["gain"] == pytest.approx(0.3)
    assert row["gain_ci95"] == pytest.approx((0.3 - 0.2994, 0.3 + 0.2994), abs=1e-3)
    assert row["background_max_error"] == 0.5 and row["seam"] == 3.0 and row["seconds"] == 2.0
    assert row["nothing"] == pytest.approx(0.3)
    assert row["seam_rise"] == 2.0 and row["seam_rise_ci95"] == (2.0, 2.0)
    assert "gain" not in table.summary(accuracy.Method("9-channel"), plain, plain)
    json.dumps(row)
    shown = table.cells(row, "SBC")
    assert shown["to SBC"] == "+30.0 (+0.1 to +59.9)" and shown["seam to SBC"] == "+2.00 (+2.00 to +2.00)"
    assert "to plain" in table.cells(row) and "to plain" not in shown


def test_only_a_loss_beyond_noise_is_one(capsys):
    plain = [outcome(index, True) for index in range(60)]
    method = accuracy.Method("9-channel", painta=True, eta=0.01)
    for lost, is_worse in ((0, False), (2, False), (8, True)):
        ours = [outcome(index, index >= lost) for index in range(60)]
        assert bool(table.worse_than_plain([table.summary(method, ours, plain)])) == is_worse


def test_rounding_may_turn_an_answer_and_more_is_another_picture():
    rows = [accuracy.Method("9-channel"), accuracy.Method("9-channel", painta=True)]
    before = [{**outcome(index, index % 2 == 0), "row": row} for index in range(10) for row in range(2)]
    for turned, moved, is_same in ((0, 0.0, True), (1, 0.15, True), (2, 0.0, False), (0, 0.25, False)):
        now = [
            {
                **outcome(o["index"], o["right"] != (o["index"] < turned)),
                "row": o["row"],
                "seam": 1.0 + moved * o["row"],
            }
            for o in before
        ]
        said, same = table.compared(rows, list(zip(now, before, strict=True)))
        assert same == is_same
        assert said.startswith(f"20 pictures made again: {2 * turned} answers differ")
        # One method's alone is not lost among those of the others.
        assert ("9-channel PAIntA 1" in said) == (turned > 1) and f"seams by {moved:.2f} levels" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--again", "2"], "--again compares with what --outcomes has"),
        (["--again", "3", "--triplets", "2", "--outcomes", "a.jsonl"], "no more than --triplets"),
        (["--again", "2", "--captions", "2", "--outcomes", "a.jsonl"], "leave --captions out"),
    ],
)
def test_what_can_not_be_made_again_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert message in capsys.readouterr().err


def test_the_table_has_a_line_for_each_row(capsys):
    found = [outcome(index, index % 2 == 0) for index in range(8)]
    rows = [table.summary(accuracy.Method("4-channel"), found, found), table.summary(None, found, None)]
    pack_module("evaluation.tables").show_table("Title", [table.cells(row) for row in rows])
    _, title, header, *lines = capsys.readouterr().out.splitlines()
    assert title == "Title"
    assert len(lines) == 2 and "accuracy" in header
    assert "50.0" in lines[0] and "51.9" in lines[0] and "text-to-image" in lines[1]


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """A function that puts a script in the place of the workers."""

    def become(script: str) -> None:
        path = tmp_path / "worker.py"
        path.write_text(script)
        monkeypatch.setattr(bench, "command", lambda *arguments: [sys.executable, str(path), *map(str, arguments)])

    return become


def test_every_worker_is_heard(tmp_path, workers):
    workers("import sys, json; print('from the host'); print(json.dumps({'share': sys.argv[-1][:3]}))")
    found = list(bench.outcomes(3, tmp_path))
    assert sorted(line["share"] for line in found) == ["0/3", "1/3", "2/3"]


def test_a_worker_that_fails_ends_the_run(tmp_path, workers):
    workers("import sys, time; time.sleep(60 * (sys.argv[-1][0] == '0')); sys.exit('no weights')")
    with pytest.raises(bench.Incomplete, match="no weights"):
        list(bench.outcomes(2, tmp_path))


@pytest.fixture
def run_with(tmp_path, monkeypatch, workers):
    """A function that runs the benchmark with a script in the place of its workers."""
    for file in pack_module("weights.demo_model").FILES.values():
        (tmp_path / file).touch()

    def run(script: str) -> int:
        workers(script)
        arguments = ["--weights", str(tmp_path), "--triplets", "2", "--workers", "2"]
        monkeypatch.setattr("sys.argv", ["bench", *arguments])
        return bench.main()

    return run


def test_the_command_ends_with_the_last_words_of_a_worker_that_fails(run_with, capsys):
    script = "import sys\nif sys.argv[-1][0] == '1':\n    for n in range(99): print('line', n, file=sys.stderr)\n    sys.exit(7)"
    assert run_with(script) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "bench accuracy: A worker failed with exit status 7; the end of what it said:"
    assert said[1:] == [f"line {n}" for n in range(84, 99)]


def test_the_command_misses_pictures_that_no_worker_made(run_with, capsys):
    assert run_with("") == 1
    assert capsys.readouterr().err == "bench accuracy: 0 of 16 pictures came back.\n"


@pytest.mark.parametrize("arguments", [["--triplets", "0"], ["--steps", "0"], ["--seed", "-1"]])
def test_numbers_out_of_range_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit):
        bench.parse()
    assert "1 or more" in capsys.readouterr().err


def test_a_cluster_has_the_outcomes_of_this_machine(monkeypatch, tmp_path, capsys):
    arguments = "--triplets 2 --seed 40 --steps 2 --models 9-channel --methods plain SBC".split()

    def run(name: str, *more: str) -> list[dict]:
        path = tmp_path / name
        monkeypatch.setattr("sys.argv", ["bench_accuracy.py", *arguments, *more, "--outcomes", str(path)])
        assert bench.main() == 0
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            assert line.pop("seconds") > 0
        return sorted(lines, key=lambda line: (line["index"], line["settings"]["method"]))

    here = run("here.jsonl", "--workers", "2")
    with dask_cluster(tmp_path, workers=2, variables={"TRUEFILL_HOST": str(host_path())}) as address:
        there = run("there.jsonl", "--scheduler", address)
    assert len(here) == 4 and there == here
    assert f"a Dask cluster at {address}" in capsys.readouterr().out
