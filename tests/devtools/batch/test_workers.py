"""Dask's workers: in this process, in others that know nothing of the pack, and such as die."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import Future

import psutil
import pytest
from distributed import Client

from devtools.batch import schedule
from devtools.batch.cluster import open_cluster
from devtools.batch.schedule import Place, Scheduler, Task
from devtools.batch.work import Job, Limits, Outcome
from devtools.paths import UserError
from truefill_testing.batches import every, later, prompts_of, results, run
from truefill_testing.comfy_stand_in import StandIn
from truefill_testing.dask_cluster import dask_cluster


def test_servers_of_the_same_address_on_several_machines_are_several():
    """As workers have them that each name a ComfyUI of their own."""

    class Machines:
        def submit(self, function, address, job, limits, worker):
            future = Future()
            future.set_result(Outcome("failed", 0.0, "no room") if worker == "small" else Outcome("done", 0.0))
            future.status = "finished"
            return future

        def wait(self, futures, seconds):
            pass

        def result(self, future, seconds):
            return future.result()

    places = [Place("http://127.0.0.1:8188", worker) for worker in ("small", "large")]
    scheduler = Scheduler(Machines(), places, Limits(), retries=1, patience=1.0)
    ended = list(scheduler.run(Task(number, lambda: Job({}, [], "", "")) for number in range(6)))
    assert sorted(done.task.number for done in ended) == list(range(6))
    assert all(done.outcome.status == "done" and done.server == places[1].name for done in ended)


def test_nothing_listens_to_the_network():
    with open_cluster(None, 2, 1.0):
        listening = [entry.laddr for entry in psutil.Process().net_connections() if entry.status == psutil.CONN_LISTEN]
    assert listening and {address.ip for address in listening} == {"127.0.0.1"}


def test_without_dask_a_sentence_says_what_to_install(jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with StandIn() as server, pytest.raises(UserError, match='pip install "distributed"'):
        run(jobs(1), server)


def test_a_cluster_that_knows_nothing_of_the_pack_does_the_work(jobs, tmp_path):
    """Its workers run elsewhere: a process without this checkout on its path, whose own ComfyUI a variable names."""
    table = jobs(6)
    with (
        StandIn() as server,
        dask_cluster(tmp_path, threads=2, variables={"TRUEFILL_SERVER": server.address}) as address,
    ):
        assert run(table, scheduler=address) == 0
        assert server.ran.total() == 6
    assert prompts_of(table) == every(6)


def test_a_worker_that_dies_loses_nothing(jobs, tmp_path):
    table = jobs(16)
    with (
        StandIn(0.1) as server,
        dask_cluster(tmp_path, 2, variables={"TRUEFILL_SERVER": server.address}) as address,
        Client(address) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))

        def kill():
            while server.ran.total() < 4:
                time.sleep(0.01)
            psutil.Process(victim).kill()

        with later(0.0, kill):
            assert run(table, scheduler=address) == 0
    assert prompts_of(table) == every(16)
    assert sum(row["status"] == "done" for row in results(table)) == 16


def test_a_worker_that_dies_with_what_its_row_gave_loses_nothing(jobs, tmp_path, monkeypatch):
    """The row has ended, and its worker goes before anybody asks what came of it."""
    table = jobs(6)
    take, killed = schedule.Scheduler._take, []

    def kill_first(self, future):
        if not killed:
            killed.append(pids[self._running[future].place.worker])
            psutil.Process(killed[0]).kill()
        yield from take(self, future)

    monkeypatch.setattr(schedule, "_FETCH", 2.0)
    with (
        StandIn() as server,
        dask_cluster(tmp_path, 2, variables={"TRUEFILL_SERVER": server.address}) as address,
        Client(address) as client,
    ):
        pids = client.run(os.getpid)
        monkeypatch.setattr(schedule.Scheduler, "_take", kill_first)
        assert run(table, scheduler=address) == 0
    assert killed and prompts_of(table) == every(6)
    assert [row["status"] for row in results(table)] == ["done"] * 6


def test_a_scheduler_that_is_not_there_is_a_sentence(jobs):
    with pytest.raises(UserError, match=r"no Dask scheduler at tcp://127.0.0.1:9"):
        run(jobs(1), scheduler="tcp://127.0.0.1:9", answer=1)
