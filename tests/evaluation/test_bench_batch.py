"""The benchmark of the batch counts what a call has done, also of one that it cuts short."""

from __future__ import annotations

from pathlib import Path

from devtools.pack import pack_module
from truefill_testing.comfy_stand_in import StandIn, graph

bench = pack_module("evaluation.bench_batch")


def write_jobs(folder: Path, rows: int) -> list[str]:
    files = bench.write_jobs(folder, graph(), rows)
    (folder / "jobs.csv").write_text("\n".join(["prompt", *(f"row {number}" for number in range(rows))]))
    return files


def test_a_call_is_measured_and_one_that_takes_too_long_goes_by_what_it_has_done(tmp_path: Path) -> None:
    few, many = (write_jobs(tmp_path / str(rows), rows) for rows in (4, 400))
    with StandIn(0.1) as server:
        run, again = (bench.measured(few, [server.address], tmp_path / "few", 60.0) for _ in range(2))
        assert run.rows == again.rows == 4 and server.ran.total() == 4
        assert run.seconds > run.cpu > 0 and run.peak > 2**24
        short = bench.measured(many, [server.address], tmp_path / "many", 8.0)
    assert 0 < short.rows < 400 and 8.0 <= short.seconds < 30.0


def test_a_graph_waits_only_where_it_is_to() -> None:
    assert [node["class_type"] for node in bench.graph(0).values()] == ["EmptyImage", "PreviewImage"]
    waits = bench.graph(0.5)
    assert waits["2"]["inputs"]["seconds"] == 0.5 and waits["3"]["inputs"]["images"] == ["2", 0]
