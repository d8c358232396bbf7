"""What servers may do in the middle of a batch: die, hang, forget, fail, be busy, send elsewhere."""

from __future__ import annotations

import time

import pytest

from devtools.batch import schedule
from devtools.paths import UserError
from truefill_testing.batches import every, later, prompts_of, results, run
from truefill_testing.comfy_stand_in import StandIn, graph


def test_a_server_that_dies_and_returns_loses_nothing(jobs):
    table, until_then = jobs(60), []

    def stop():
        one.stop()
        until_then.append(one.ran.total())

    with StandIn(0.03) as one, StandIn(0.03) as other:
        with later(0.4, stop), later(1.0, one.start):
            assert run(table, one, other) == 0
        # It was given rows again.
        assert one.ran.total() > until_then[0]
    assert prompts_of(table) == every(60)
    assert len(results(table)) == 60 and len((table.parent / "out" / "results.jsonl").read_text().splitlines()) == 60


def test_a_server_that_hangs_is_left_alone(jobs, monkeypatch):
    table = jobs(30)

    def hang():
        one.hangs = True

    with StandIn(0.02) as one, StandIn(0.02) as other:
        with later(0.2, hang):
            assert run(table, one, other, answer=0.5) == 0
        assert other.ran.total() > one.ran.total()
        one.hangs = False
    assert prompts_of(table) == every(30)


def test_a_server_that_forgets_its_queue_is_asked_again(jobs):
    table = jobs(20)

    def restart():
        only.stop()
        only.start()

    with StandIn(0.05) as only, later(0.3, restart):
        assert run(table, only) == 0
    assert prompts_of(table) == every(20)


def test_no_row_is_blamed_for_a_server_that_is_away_for_long(jobs, monkeypatch):
    monkeypatch.setattr(schedule, "_REST", 0.05)
    monkeypatch.setattr(schedule, "_LONGEST_REST", 0.1)
    table = jobs(20)

    def leave_and_return():
        while not only.ran:
            time.sleep(0.01)
        only.stop()
        time.sleep(1.5)
        only.start()

    with StandIn(0.05) as only, later(0.0, leave_and_return):
        assert run(table, only, patience=30) == 0
    assert prompts_of(table) == every(20)
    assert {row["attempts"] for row in results(table)} <= {"1", "2"}


def test_a_row_that_fails_on_one_server_is_done_by_another(jobs):
    table = jobs(16)
    errors = dict.fromkeys(every(16), "OutOfMemoryError")
    with StandIn(fails=errors) as small, StandIn(0.1) as large:
        assert run(table, small, large) == 0
        # After three in a row it rests, longer each time, and does not draw all rows to itself because it is the faster.
        assert small.ran.total() < 10 and large.ran.total() == 16
    assert all(row["status"] == "done" and row["server"] == large.address for row in results(table))


def test_other_peoples_graphs_come_first(jobs):
    table = jobs(6)
    with StandIn(0.15) as server:
        for number in range(5):
            server.put(
                f"theirs {number}", {**graph(), "2": {"class_type": "x", "inputs": {"prompt": f"theirs {number}"}}}
            )
        assert run(table, server) == 0
        assert server.ran == {**{f"theirs {number}": 1 for number in range(5)}, **dict.fromkeys(every(6), 1)}
        # With each of ours that was put in there were two at most.
        assert max(server.depths) == 2 and len(server.depths) == 6
        assert not any(name.startswith("theirs") for name in server.canceled)


def test_a_row_that_takes_too_long_is_stopped(jobs):
    table = jobs(2)
    with StandIn(5.0) as server:
        assert run(table, server, timeout=0.5) == 1
        assert not server._queue
    assert all(
        row["error"] == "The graph did not finish within 0 seconds." or "0.5" in row["error"] for row in results(table)
    )


def test_redirects_are_not_followed_and_silence_ends_the_batch(jobs):
    table = jobs(3)
    with StandIn() as server:
        server.redirects = True
        with pytest.raises(
            UserError, match=r"No server answers: .* redirect to http://127.0.0.1:9/, which is not followed"
        ):
            run(table, server)
    with (
        StandIn(0.3) as server,
        later(0.4, server.stop),
        pytest.raises(UserError, match="No server has answered for 1 seconds"),
    ):
        run(jobs(50), server, patience=1)
