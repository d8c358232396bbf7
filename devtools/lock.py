"""A lock between processes that the operating system drops when its holder dies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .paths import UserError

if os.name == "nt":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def exclusive(path: Path, timeout: float = 1800.0) -> Iterator[None]:
    """Hold the lock file at `path`; wait for another holder, and raise UserError after `timeout` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    # The file stays: removing it would let two processes lock two files of the same name.
    with path.open("a+b") as file:
        waiting = False
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise UserError(f"Another dev.py has been setting up for {timeout:.0f} seconds; wait for it or end it.")
            if not waiting:
                print("Waiting for another dev.py that is setting up ...", flush=True)
                waiting = True
            time.sleep(0.5)
        try:
            yield
        finally:
            _unlock(file)
