"""Rows to servers: each is done once, on whichever server can.

Dask has the workers, on this machine or on many; what they are given is decided here, for a row may not wait for a server that
is gone, and a server may not be given more than it has begun with.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..paths import UserError
from .cluster import Cluster
from .work import DEEPEST, Job, Limits, Outcome, cancel_job, do_job

_REST, _LONGEST_REST = 2.0, 60.0
"""Seconds until a server that was gone, or that failed several times in a row, is given a row again; doubled each time."""
_FAILURES = 3
_LOOK = 0.5
_FETCH = 10.0
"""Seconds for what a row gave to come from its worker."""
_LAST_LOOK = 10.0
"""Seconds for what is at work to end when the batch does."""
_BLAMED = 3
"""So many servers, or times, have to go away under a row until it is held to be what ends them."""


@dataclass
class Place:
    """A server and the worker that talks to it (any, where that is None)."""

    address: str
    worker: str | None = None
    busy: int = 0
    failures: int = 0
    rest: float = _REST
    ready_at: float = 0.0
    why: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return self.address if self.worker is None else f"{self.address} of {self.worker}"

    def pause(self, why: str) -> None:
        """Let the server alone for a while."""
        now = time.monotonic()
        # Two rows may find it gone at the same time.
        if now >= self.ready_at:
            self.ready_at, self.why = now + self.rest, why
            self.rest = min(2 * self.rest, _LONGEST_REST)

    def succeeded(self) -> None:
        self.failures, self.rest, self.why = 0, _REST, ""


@dataclass
class Task:
    """A row at work: what is to be run (made when it is needed), the names of places where it failed, and how often.

    attempts: how often it was given to a server that answered.
    """

    number: int
    make: Callable[[], Job]
    attempts: int = 0
    failed: int = 0
    gone: int = 0
    avoid: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Done:
    """A row's end."""

    task: Task
    server: str
    outcome: Outcome


@dataclass
class _Running:
    task: Task
    place: Place
    job: Job


class Scheduler:
    """Runs tasks on places by a cluster's workers.

    retries: how often a row whose graph failed is tried again, on another server where there is one. patience: seconds without
    any server that answers, after which the batch ends.
    """

    def __init__(self, cluster: Cluster, places: list[Place], limits: Limits, retries: int, patience: float) -> None:
        self._cluster, self.places, self._limits = cluster, places, limits
        self._retries, self._patience = retries, patience
        self._running: dict[Any, _Running] = {}
        self._last_answer = time.monotonic()

    def run(self, tasks: Iterable[Task]) -> Iterator[Done]:
        """The rows as they end. Raises UserError where no server has answered for too long."""
        self._waiting = deque(tasks)
        try:
            while self._waiting or self._running:
                yield from self._give_out()
                if not self._running:
                    self._check_patience()
                    time.sleep(_LOOK)
                    continue
                self._cluster.wait(self._running, _LOOK)
                ended = [future for future in self._running if future.done()]
                for future in ended:
                    # Taking one may have found the worker of others gone.
                    if future in self._running:
                        yield from self._take(future)
                if not ended:
                    self._take_back()
        finally:
            self._end()

    def _give_out(self) -> Iterator[Done]:
        now = time.monotonic()
        # The one with least to do first.
        for place in sorted(self.places, key=lambda place: place.busy):
            while place.busy < DEEPEST and now >= place.ready_at and (task := self._next(place)) is not None:
                if place.why and place.busy:
                    # A server that was gone is tried with one row.
                    self._waiting.appendleft(task)
                    break
                try:
                    job = task.make()
                except UserError as error:
                    yield Done(task, "", Outcome("failed", 0.0, str(error)))
                    continue
                place.busy += 1
                future = self._cluster.submit(do_job, place.address, job, self._limits, worker=place.worker)
                self._running[future] = _Running(task, place, job)

    def _next(self, place: Place) -> Task | None:
        """The first row that has not failed on this server, or that has failed on all."""
        usable = {other.name for other in self.places if not other.why}
        for _ in range(len(self._waiting)):
            task = self._waiting.popleft()
            if place.name not in task.avoid or usable <= task.avoid:
                return task
            self._waiting.append(task)
        return None

    def _take_back(self) -> None:
        """Rows whose worker is gone: Dask would wait for it to return."""
        there = self._cluster.workers()
        for future, running in list(self._running.items()):
            place = running.place
            if there if place.worker is None else place.worker in there:
                continue
            future.cancel()
            del self._running[future]
            place.busy -= 1
            place.pause("its worker is gone")
            self._waiting.appendleft(running.task)

    def _take(self, future: Any) -> Iterator[Done]:
        finished = future.status == "finished"
        outcome: Outcome | None = self._cluster.result(future, _FETCH) if finished else None
        if finished and outcome is None:
            # What it gave lay with its worker, and that may be gone: then the row is taken back.
            self._take_back()
            return
        running = self._running.pop(future)
        task, place = running.task, running.place
        place.busy -= 1
        if outcome is None:
            # The worker went, and with it what it was told.
            outcome = Outcome("gone", 0.0, f"The worker of {place.name} ended: {future.exception()!r}")
        if outcome.status == "away":
            place.pause(outcome.error)
            self._waiting.appendleft(task)
            return
        task.attempts += outcome.status != "busy"
        if outcome.status == "gone":
            task.gone += 1
            if finished:
                place.pause(outcome.error)
                self._cancel(running)
            if task.gone >= _BLAMED:
                yield Done(task, place.name, Outcome("failed", outcome.seconds, outcome.error))
            else:
                task.avoid.add(place.name)
                self._waiting.appendleft(task)
            return
        self._last_answer = time.monotonic()
        if outcome.status == "busy":
            self._waiting.appendleft(task)
            return
        if outcome.status == "done":
            place.succeeded()
            yield Done(task, place.name, outcome)
            return
        place.failures += 1
        if place.failures >= _FAILURES and len(self.places) > 1:
            # Its disk may be full; it must not be the one that all rows fail on because it is the fastest.
            place.pause(outcome.error)
        else:
            place.why = ""
        task.failed += 1
        task.avoid.add(place.name)
        others = {other.name for other in self.places} - task.avoid
        if task.failed <= self._retries and (others or "OutOfMemory" in outcome.error):
            self._waiting.append(task)
        else:
            yield Done(task, place.name, outcome)

    def _check_patience(self) -> None:
        if time.monotonic() - self._last_answer > self._patience:
            said = "; ".join(f"{place.name}: {place.why}" for place in self.places if place.why)
            raise UserError(
                f"No server has answered for {self._patience:.0f} seconds ({said}). What is done is kept: the same command goes "
                "on."
            )

    def _cancel(self, running: _Running) -> bool:
        """Leave nothing of a row in a queue; returns whether the server answers."""
        place = running.place
        try:
            self._cluster.call(cancel_job, place.address, running.job.prompt_id, worker=place.worker)
        except Exception:
            return False
        return True

    def _end(self) -> None:
        """Leave nothing of this batch in any queue."""
        deadline = time.monotonic() + _LAST_LOOK
        while self._running and time.monotonic() < deadline:
            silent: set[str] = set()
            for running in self._running.values():
                if running.place.name not in silent and not self._cancel(running):
                    silent.add(running.place.name)
            # Again, for one that was uploading pictures has put its graph in since.
            self._cluster.wait(self._running, _LOOK)
            self._running = {future: running for future, running in self._running.items() if not future.done()}
        for future in self._running:
            with contextlib.suppress(Exception):
                future.cancel()
        self._running.clear()
