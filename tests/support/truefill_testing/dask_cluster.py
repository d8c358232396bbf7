"""A Dask cluster in processes of its own, which know nothing of this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def dask_cluster(
    folder: Path, workers: int = 1, threads: int = 1, variables: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The scheduler's address; all workers have come."""
    from distributed import Client

    place = folder / "scheduler.json"
    loopback = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(place)]
    own = {**os.environ, **(variables or {})}
    own.pop("PYTHONPATH", None)

    def start(program: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"distributed.cli.{program}", *loopback, *arguments]
        process = subprocess.Popen(command, cwd=folder, env=own, stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)

    with ExitStack() as stack:
        start("dask_scheduler", "--port", "0")
        for _ in range(workers):
            start("dask_worker", "--no-nanny", "--nthreads", str(threads))
        deadline = time.monotonic() + 60
        while not place.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        address = json.loads(place.read_text())["address"]
        with Client(address, timeout=30) as client:
            client.wait_for_workers(workers, timeout=60)
        yield address
