"""What a person sees of a batch while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from .record import Result
from .schedule import Place


class Console:
    """A line for a person: rewritten on a terminal, now and then in a log."""

    def __init__(self, total: int) -> None:
        self._total, self._started, self._said = total, time.monotonic(), 0.0
        self._terminal = sys.stdout.isatty()
        self._done = self._failed = 0

    def measuring(self, done: int, total: int) -> None:
        """Figures are taken of what has been made."""
        now = time.monotonic()
        if now - self._said >= (0.5 if self._terminal else 10.0):
            self._said = now
            print(
                f"\r{f'measuring {done}/{total}':<110}" if self._terminal else f"measuring {done}/{total}",
                end="",
                flush=True,
            )
            print(end="" if self._terminal else "\n", flush=True)

    def show(self, result: Result, places: Sequence[Place]) -> None:
        self._done += 1
        self._failed += result.status != "done"
        now = time.monotonic()
        last = self._done == self._total
        if now - self._said < (0.5 if self._terminal else 10.0) and not last:
            return
        self._said = now
        rate = self._done / max(now - self._started, 1e-9)
        left = round((self._total - self._done) / rate)
        away = "".join(f"  [{place.name} away]" for place in places if place.why)
        line = (
            f"{self._done}/{self._total}  {60 * rate:.1f} rows/min  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left  "
            f"{self._failed} failed{away}"
        )
        if self._terminal:
            print(f"\r{line:<110}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)
