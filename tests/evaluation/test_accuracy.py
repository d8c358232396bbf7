"""The accuracy benchmark makes its pictures as the shipped graphs do, and measures what it says."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from devtools import launch
from devtools.pack import pack_module
from truefill_testing.demo_weights import write_untrained

accuracy = pack_module("evaluation.accuracy")
bench = pack_module("evaluation.bench_accuracy")
judges = pack_module("evaluation.judge")
triplets = pack_module("training.world.triplets")

QUICK = accuracy.KSampling(steps=2)
COMMAND = launch.command("-p", "evaluation.bench_accuracy")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_untrained(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("model", list(accuracy.MODELS))
def test_a_filled_triplet_is_the_scene_outside_of_the_hole(model, weights):
    models = accuracy.Models(weights)
    triplet = triplets.make_triplet("dev", 0)
    task = accuracy.prepare(models, model, triplet)
    plain = accuracy.fill(models, accuracy.Method(model), task, 0, QUICK)
    assert plain.shape == (1, 256, 256, 3)
    scene, known = accuracy.as_image(triplet.scene.picture), torch.from_numpy(~triplet.hole)
    both = accuracy.fill(models, accuracy.Method(model, painta=True, eta=0.1), task, 0, QUICK)
    for picture in (plain, both):
        assert torch.equal(picture[0][known], scene[0][known])
        assert not torch.equal(picture[0][~known], scene[0][~known])
    assert not torch.equal(plain, both)
    # The noise depends on the seed alone, and no method leaves anything in the task.
    fresh = accuracy.prepare(models, model, triplet)
    for again in (task, fresh):
        assert torch.equal(plain, accuracy.fill(models, accuracy.Method(model), again, 0, QUICK))
    assert not torch.equal(plain, accuracy.fill(models, accuracy.Method(model), task, 1, QUICK))


def test_pilot_fills_a_triplet(weights):
    models = accuracy.Models(weights)
    triplet = triplets.make_triplet("dev", 0)
    task = accuracy.prepare(models, "4-channel", triplet)
    known = torch.from_numpy(~triplet.hole)
    names = ["PILOT", accuracy.FILLED, "PILOT L_bg", "PILOT iterations 2"]
    made = [accuracy.make(models, accuracy.Method("4-channel", pilot=name), task, 0, QUICK) for name in names]
    for picture in made:
        finished = accuracy.finish(task, picture)
        assert torch.equal(finished[0][known], task.pixels[0][known])
    assert all(not torch.equal(made[0], other) for other in made[1:])
    # Every row is a way of its own.
    settings = [str(row) for name, row in accuracy.PILOTS.items() if name != accuracy.FILLED]
    assert len(set(settings)) == len(settings)
    assert torch.equal(made[0], accuracy.make(models, accuracy.Method("4-channel", pilot="PILOT"), task, 0, QUICK))


def test_an_outcome_is_what_the_judge_says_of_the_picture(monkeypatch, weights):
    triplet = triplets.make_triplet("dev", 3)
    task = accuracy.prepare(accuracy.Models(weights), "9-channel", triplet)
    # What is made differs from the scene in the background alone.
    made = accuracy.as_image(triplet.scene.picture)
    shifted = torch.where(torch.from_numpy(triplet.hole)[None, ..., None], made, (made + 0.6) % 1.0)
    monkeypatch.setattr(accuracy, "make", lambda *_: shifted.clone())
    seen = judges.Seen(triplet.shape, triplet.colour)

    class Says:
        def in_hole(self, picture, hole):
            assert picture.shape == (3, 256, 256) and torch.equal(hole > 0, torch.from_numpy(triplet.hole))
            return seen

    outcome, picture = accuracy.attempt({}, accuracy.Method("9-channel"), task, 3, QUICK, Says())
    assert outcome.right and not outcome.empty
    assert outcome.seconds > task.seconds > 0.0
    assert outcome.background_error == 0.0 and outcome.seam == 0.0 and picture.shape == (1, 256, 256, 3)
    known = torch.from_numpy(~triplet.hole)
    change = 255 * float((shifted - made)[0][known].abs().mean())
    assert change > 50 and outcome.change_before == pytest.approx(change, rel=1e-5)
    seen = judges.Seen(None, triplet.colour)
    outcome, _ = accuracy.attempt({}, accuracy.Method("9-channel"), task, 3, QUICK, Says())
    assert not outcome.right and outcome.empty


def test_captions_ask_for_every_attribute_and_are_the_same_every_time():
    found = [accuracy.make_caption("test", index) for index in range(300)]
    assert found == [accuracy.make_caption("test", index) for index in range(300)]
    assert len({caption.shape for caption in found}) == 8 and len({caption.colour for caption in found}) == 8
    assert all(caption.shape in caption.text and caption.colour in caption.text for caption in found)


@pytest.fixture
def command(monkeypatch):
    """Runs the command with further arguments in this process; where it has several workers, these are processes of their own."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench_accuracy.py", *map(str, arguments)])
        return bench.main()

    return run


def test_the_command_writes_table_rows_and_grid(tmp_path, weights, command):
    options = ["--split", "dev", "--triplets", "2"]
    options += ["--models", "9-channel", "--methods", "plain", "PAIntA + RASG", "--steps", "2", "--workers", "2"]
    options += ["--weights", weights, "--json", tmp_path / "rows.json", "--grid", tmp_path / "grid.png"]
    assert command(*options) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["n"]) for row in rows] == [("plain", 2), ("PAIntA + RASG", 2)]
    for row in rows:
        low, high = row["ci95"]
        assert low <= row["accuracy"] <= high and row["background_max_error"] == 0.0 and row["seconds"] > 0
    # Scene, hole and two methods, for two triplets.
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width == 4 * 256 and picture.height > 2 * 256
        cell = np.asarray(picture)[:256, :256]
    assert np.array_equal(cell, triplets.make_triplet("dev", 0).scene.picture)


def test_kept_outcomes_are_gone_on_from(tmp_path, weights, command):
    kept, rows = tmp_path / "kept.jsonl", tmp_path / "rows.json"
    options = ["--split", "dev", "--models", "9-channel", "--methods", "plain", "PAIntA"]
    options += ["--steps", "2", "--workers", "1", "--weights", weights, "--json", rows]

    def run(*arguments: str) -> list[dict]:
        assert command(*options, *arguments) == 0
        return [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(rows.read_text())]

    run("--triplets", "1", "--outcomes", str(kept))
    first = kept.read_text().splitlines()
    assert len(first) == 2 and {json.loads(line)["index"] for line in first} == {0}
    # Other settings are other outcomes: what they left is not counted.
    other = json.loads(first[0])
    other["settings"]["steps"], other["right"] = 3, not other["right"]
    kept.write_text("\n".join([json.dumps(other), *first]) + "\n")
    resumed = run("--triplets", "2", "--outcomes", str(kept))
    lines = kept.read_text().splitlines()
    assert lines[1:3] == first and [json.loads(line)["index"] for line in lines[3:]] == [1, 1]
    assert resumed == run("--triplets", "2")
    # With nothing left to do the table comes from the file alone.
    for line in (changed := [json.loads(line) for line in lines]):
        line["right"] = True
    kept.write_text("\n".join(map(json.dumps, changed)))
    assert [row["accuracy"] for row in run("--triplets", "2", "--outcomes", str(kept))] == [1.0, 1.0]


def test_pictures_made_again_are_compared_with_what_is_kept(tmp_path, weights, command, capsys):
    kept = tmp_path / "kept.jsonl"
    options = ["--split", "dev", "--models", "9-channel", "--methods", "plain", "--steps", "2", "--workers", "1"]
    options += ["--triplets", "1", "--weights", weights, "--outcomes", kept]
    assert command(*options, "--again", "1") == 1
    assert "kept.jsonl has no outcome of 9-channel plain, triplet 0, with these weights" in capsys.readouterr().err
    assert command(*options) == 0
    written = kept.read_text()
    assert command(*options, "--again", "1") == 0
    assert "1 pictures made again: 0 answers differ, a method's seams by 0.00 levels" in capsys.readouterr().out
    assert kept.read_text() == written
    outcome = json.loads(written)
    for other in ({"right": not outcome["right"]}, {"seam": outcome["seam"] + 2.0}):
        kept.write_text(json.dumps(outcome | other) + "\n")
        assert command(*options, "--again", "1") == 1
        assert "no longer those of this code" in capsys.readouterr().err


def test_the_command_draws_captions_in_its_own_process_where_one_is_enough(
    tmp_path, weights, command, monkeypatch, capsys
):
    monkeypatch.setattr(bench, "outcomes", None)
    options = ["--captions", "1", "--steps", "2", "--workers", "1"]
    assert command(*options, "--weights", weights, "--json", tmp_path / "rows.json") == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["method"], row["n"], row["split"]) == ("text-to-image", 1, "test") and "seam" not in row
    # What it says, and none of the host's bars.
    said, progress = capsys.readouterr()
    assert " 1 process, " in said and progress == "  1/1 pictures, 0 min left\n"


def test_the_command_says_what_it_needs(tmp_path):
    done = subprocess.run([*COMMAND, "--weights", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path} has no truefill_demo_" in done.stderr and len(done.stderr.splitlines()) == 1


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no truefill_demo_inpaint\.safetensors"):
        accuracy.Models(tmp_path)["9-channel"]
