"""Whole batches: each row is done once, has its own files, and the same command goes on after whatever happened."""

from __future__ import annotations

import json
import subprocess
import time

import pytest
from PIL import Image

from devtools import launch
from devtools.batch import command
from devtools.batch.console import Console
from devtools.batch.record import Record
from devtools.batch.table import Row, file_names
from devtools.batch.work import Picture
from devtools.paths import UserError
from truefill_testing.batches import command_line, every, prompts_of, results, run
from truefill_testing.comfy_stand_in import StandIn, graph


def test_every_row_is_done_once_and_no_queue_is_long(jobs, capsys):
    table = jobs(40)
    # Long enough for the next row to be put in meanwhile.
    with StandIn(0.05) as one, StandIn(0.05) as other:
        assert run(table, one, other) == 0
        assert one.ran + other.ran == {f"row {number}": 1 for number in range(1, 41)}
        assert max(one.depths + other.depths) == 2 and min(one.ran.total(), other.ran.total()) > 5
        # The same again has nothing to do.
        assert run(table, one, other) == 0
        assert (one.ran + other.ran).total() == 40
    assert "40 of 40 rows are done already" in capsys.readouterr().out
    assert prompts_of(table) == every(40)
    found = results(table)
    assert [(row["row"], row["result"], row["status"], row["seed used"], row["attempts"]) for row in found] == [
        (str(number), f"row {number}", "done", str(number), "1") for number in range(1, 41)
    ]
    assert {row["server"] for row in found} == {one.address, other.address}
    with Image.open(table.parent / "out" / "results.jpg") as sheet:
        assert sheet.width > sheet.height > 900


def test_a_row_that_fails_everywhere_says_why_and_is_tried_again_by_the_next_call(jobs, capsys):
    table = jobs(5)
    errors = {"row 3": "ValueError"}
    with StandIn(fails=errors) as one, StandIn(fails=errors) as other:
        assert run(table, one, other) == 1
        assert (one.ran + other.ran)["row 3"] == 2
        (failed,) = [row for row in results(table) if row["status"] != "done"]
        assert (failed["result"], failed["attempts"]) == ("row 3", "2")
        assert failed["error"] == "Node 4 (KSampler) failed with ValueError: no room"
        assert "row 3 (row 3): Node 4" in capsys.readouterr().out
        errors.clear()
        assert run(table, one, other) == 0
        assert (one.ran + other.ran).total() == 7
    assert prompts_of(table) == every(5)


def test_an_interrupt_leaves_no_queue_and_the_same_command_goes_on(jobs, monkeypatch):
    table, shown = jobs(30), []

    def show(self, result, places):
        shown.append(result.number)
        if len(shown) == 8:
            raise KeyboardInterrupt

    with StandIn(0.03) as one, StandIn(0.03) as other:
        with monkeypatch.context() as patch:
            patch.setattr(Console, "show", show)
            with pytest.raises(KeyboardInterrupt):
                run(table, one, other)
        time.sleep(0.2)
        assert not one._queue and not other._queue
        done = [row["result"] for row in results(table) if row["status"] == "done"]
        assert len(done) == 8 and sum(row["status"] == "open" for row in results(table)) == 22
        # A power cut in the middle of a line.
        with (table.parent / "out" / "results.jsonl").open("a") as file:
            file.write('{"number": 9, "na')
        assert run(table, one, other) == 0
        assert all((one.ran + other.ran)[name] == 1 for name in done)
        # What the cut has left is passed over for good.
        assert run(table, one, other) == 0
        assert all((one.ran + other.ran)[name] == 1 for name in done)
    assert prompts_of(table) == every(30)


def test_an_interrupt_while_pictures_are_on_their_way_leaves_no_queue(tmp_path, monkeypatch):
    (tmp_path / "graph.json").write_text(json.dumps(graph()))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table = tmp_path / "jobs.csv"
    table.write_text("\n".join(["image,prompt", *(f"a.png,row {number}" for number in range(8))]))

    def interrupt(self, result, places):
        raise KeyboardInterrupt

    monkeypatch.setattr(Console, "show", interrupt)
    with StandIn() as quick, StandIn(30.0) as slow:
        slow.upload_seconds = 1.0
        with pytest.raises(KeyboardInterrupt):
            run(table, quick, slow)
        assert slow.depths and not slow._queue
    assert slow.ran.total() == 0


def test_what_has_changed_is_done_again(jobs):
    table = jobs(4)
    with StandIn() as server:
        assert run(table, server) == 0
        table.write_text(table.read_text().replace("row 2,row 2", "row 2,a star"))
        (table.parent / "out" / "pictures" / "row 3.png").unlink()
        assert run(table, server) == 0
        assert server.ran == {"row 1": 1, "row 2": 1, "row 3": 2, "row 4": 1, "a star": 1}
    assert prompts_of(table) == {**every(4), "row 2": "a star"}


def test_a_picture_that_was_painted_over_is_done_again(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(graph()))
    for name in ("a", "b", "m"):
        Image.new("L" if name == "m" else "RGB", (4, 4)).save(tmp_path / f"{name}.png")
    table = tmp_path / "jobs.csv"
    table.write_text("image,mask,prompt\na.png,m.png,one\nb.png,,two\n")
    with StandIn() as server:
        assert run(table, server) == 0 and run(table, server) == 0
        assert server.ran == {"one": 1, "two": 1}
        Image.new("L", (4, 4), 255).save(tmp_path / "m.png")
        assert run(table, server) == 0
        assert server.ran == {"one": 2, "two": 1}
        with Image.open(tmp_path / "out" / "pictures" / "00001.png") as picture:
            assert picture.getpixel((0, 0)) == (0, 0, 0, 0)


def test_no_two_rows_write_the_same_file(tmp_path):
    record = Record(tmp_path)
    made = []
    for row, pictures in (
        ("a", [("5", 1), ("5", 2)]),
        ("a~1", [("5", 1)]),
        ("a 1", [("5", 1)]),
        ("a", [("4", 1), ("5", 1)]),
        ("a~Result", [("5", 1)]),
    ):
        made.append((row, [Picture(node, number, ".png", b"") for node, number in pictures]))
    rows = [Row(number, name, {}) for number, name in enumerate(file_names([row for row, _ in made]), 1)]
    files = [record.save_pictures(row, graph(), pictures) for row, (_, pictures) in zip(rows, made, strict=True)]
    every_one = [file for of_row in files for file in of_row]
    assert len({file.casefold() for file in every_one}) == len(every_one) == 7
    assert files[0] == ["pictures/a~1.png", "pictures/a~2.png"]
    assert files[3] == ["pictures/a-2~KSampler.png", "pictures/a-2~Result.png"]


def test_two_batches_on_the_same_servers_do_not_mix(jobs):
    mine, theirs = jobs(20, "mine.csv", "mine"), jobs(60, "theirs.csv", "theirs")
    with StandIn(0.01) as one, StandIn(0.01) as other:
        arguments = command_line(theirs, one, other, out="b")
        process = subprocess.Popen(launch.command("-m", "devtools.batch.command", *arguments))
        # Theirs are at it when mine begin.
        while not one.ran:
            time.sleep(0.01)
        assert run(mine, one, other, out="a") == 0
        assert process.wait(60) == 0
        assert set((one.ran + other.ran).values()) == {1}
    assert prompts_of(mine, "a") == every(20, "mine") and prompts_of(theirs, "b") == every(60, "theirs")


def test_pictures_get_names_of_their_own_and_stay_in_the_folder(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(graph()))
    for folder, color in (("x", (1, 2, 3)), ("y", (4, 5, 6))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4), color).save(tmp_path / folder / "photo ü.png")
    table = tmp_path / "jobs.jsonl"
    rows = [{"name": "../../up", "image": "x/photo ü.png"}, {"name": "../../up", "image": "y/photo ü.png"}]
    table.write_text("\n".join(json.dumps(row) for row in rows))
    with StandIn() as server:
        assert run(table, server) == 0
        assert len(server.uploads) == 2
        folders = {name.partition("/")[0] for name in server.uploads}
        assert len(folders) == 1 and folders.pop().startswith("truefill-batch-")
        assert all(name.isascii() and " " not in name for name in server.uploads)
    files = {path.name: Image.open(path).getpixel((0, 0)) for path in (tmp_path / "out" / "pictures").iterdir()}
    assert files == {"up.png": (1, 2, 3), "up-2.png": (4, 5, 6)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.json", "jobs.jsonl", "out", "x", "y"]


def test_a_row_without_its_picture_fails_alone(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(graph()))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "jobs.csv").write_text("image,prompt\na.png,one\ngone.png,two\na.png,three\n")
    with StandIn() as server:
        assert run(tmp_path / "jobs.csv", server) == 1
        assert server.ran == {"one": 1, "three": 1}
    assert [row["status"] for row in results(tmp_path / "jobs.csv")] == ["done", "failed", "done"]
    assert "gone.png can't be read" in results(tmp_path / "jobs.csv")[1]["error"]


def test_a_folder_with_strange_results_is_not_written_over(jobs):
    table = jobs(2)
    (table.parent / "out").mkdir()
    (table.parent / "out" / "results.jsonl").write_text("my notes\nmore\n")
    with (
        StandIn() as server,
        pytest.raises(UserError, match=r"results.jsonl, line 1 is no result: remove it"),
    ):
        run(table, server)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--servers", "file:///etc"], "'file:///etc' is no address"),
        (["--servers", "http://a", "http://a/"], "names a server twice"),
        (["--local", "0"], "no whole number above 0"),
        (["--local", "1", "--scheduler", "tcp://a:1"], "leave --scheduler out"),
        (["--map", "a=b"], "not COLUMN=NODE.INPUT"),
        (["--timeout", "0"], "are above 0"),
    ],
)
def test_options_that_make_no_sense_are_a_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit):
        command.parse(["graph.json", "jobs.csv", *arguments])
    assert said in capsys.readouterr().err


def test_figures_are_taken_of_what_is_done_and_kept(tmp_path, capsys):
    (tmp_path / "graph.json").write_text(json.dumps(graph()))
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    hole = Image.new("L", (8, 8))
    hole.paste(255, (2, 2, 5, 5))
    hole.save(tmp_path / "m.png")
    table = tmp_path / "jobs.csv"
    table.write_text("image,mask,prompt\na.png,m.png,a blue star\na.png,m.png,my cat\n,,no picture\n")
    with StandIn() as server:
        assert run(table, server) == 0
        assert "background max" not in results(table)[0]
        assert run(table, server, metrics=["background", "demo"]) == 0
        assert server.ran.total() == 3
    first, second, third = results(table)
    # The stand-in gives the picture back.
    assert first["background max"] == second["background max"] == "0.0" and third["background max"] == ""
    assert first["as asked (demo)"] == "0.0" and second["as asked (demo)"] == ""
    assert "background max: 0 (0 to 0, 2 rows)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no metric 'beauty'; there are background, demo, clip"):
        run(table, metrics="beauty")
    with pytest.raises(UserError, match=r"CLIP was not named: get it from https://\S+ .* and say --weights clip=PATH"):
        run(table, metrics="clip")
    with pytest.raises(UserError, match=r"CLIP is not at /nowhere"):
        run(table, metrics="clip", weights="clip=/nowhere")
