"""How fast `python dev.py batch` is on real servers with graphs that cost next to nothing, and what it takes itself.

Throughput: the same rows on 1, 2, 4 ... servers, each row's graph with a node that waits for so many seconds. At 0 the servers'
own work is the limit, of which a machine does as much at once as it has cores; with a wait, as with a GPU's work, what is left
is the batch's. The ratio is that of the rates.

Growth: tables of so many rows on one server. CPU is counted for the process of the batch and for the server alike, and so is the
time of the same command once more, which finds all rows done. A run that takes longer than `--limit` is interrupted, and goes by
the rows that it has done.

    python dev.py bench batch [--servers 2] [--jobs 200] [--seconds 0 0.25] [--rows 10 100 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from devtools import launch
from devtools.pack import host_path
from devtools.paths import ROOT
from devtools.server import Server, side_by_side

from .tables import show_table

SLOW_NODE = ROOT / "evaluation" / "slow_node"
"""A pack with a node that waits."""
LOOK = 0.05


@dataclass(frozen=True)
class Run:
    """What a call of the batch took. cpu: of its process, in seconds; peak: its memory, in bytes; rows: with a result."""

    seconds: float
    cpu: float
    peak: int
    rows: int


def graph(seconds: float) -> dict[str, Any]:
    """8 x 8 pixels of a row's color, shown after so long."""
    nodes: dict[str, Any] = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "TestingSlow", "inputs": {"image": ["1", 0], "seconds": seconds, "seed": 0}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2" if seconds else "1", 0]}},
    }
    return nodes if seconds else {key: nodes[key] for key in ("1", "3")}


def write_jobs(folder: Path, nodes: Mapping[str, Any], rows: int) -> list[str]:
    """A graph and a table in a folder; returns the arguments that name them. Each row has a color of its own."""
    # Of another table's colors the host would still have the pictures.
    first = random.randrange(2**24 - rows)
    folder.mkdir()
    (folder / "graph.json").write_text(json.dumps(nodes))
    with (folder / "jobs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "color"])
        table.writerows([f"row {number}", first + number] for number in range(rows))
    return [str(folder / name) for name in ("graph.json", "jobs.csv")]


def measured(jobs: Sequence[str], addresses: Sequence[str], out: Path, limit: float) -> Run:
    """Call the batch, and interrupt it after so many seconds. Raises RuntimeError where it fails by itself."""
    arguments = [*jobs, "--out", str(out), "--metrics", "none", "--servers", *addresses]
    started, cpu, peak, interrupted = time.monotonic(), 0.0, 0, False
    process = psutil.Popen(
        launch.command("-m", "devtools.batch.command", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None:
        try:
            with process.oneshot():
                times = process.cpu_times()
                cpu, peak = times.user + times.system, max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        if not interrupted and time.monotonic() - started > limit:
            process.terminate()
            interrupted = True
        time.sleep(LOOK)
    said, _ = process.communicate()
    if process.returncode and not interrupted:
        raise RuntimeError(f"The batch ended with code {process.returncode}: {said.decode(errors='replace')[-2000:]}")
    with (out / "results.jsonl").open("rb") as file:
        rows = sum(json.loads(line)["status"] == "done" for line in file)
    return Run(time.monotonic() - started, cpu, peak, rows)


def throughput(
    servers: Sequence[Server], jobs: int, seconds: float, folder: Path, limit: float
) -> list[dict[str, Any]]:
    """Rates on 1, 2, 4 ... of the servers, and their ratios to that on one."""
    found: list[dict[str, Any]] = []
    count = 1
    while count <= len(servers):
        place = folder / f"throughput-{seconds}-{count}"
        files = write_jobs(place, graph(seconds), jobs)
        addresses = [server.address for server in servers[:count]]
        run, again = (measured(files, addresses, place / "out", limit) for _ in range(2))
        rate = run.rows / (run.seconds - again.seconds)
        found.append(
            {
                "wait": seconds,
                "servers": count,
                "rows": run.rows,
                "rows per second": rate,
                "ratio": rate / found[0]["rows per second"] if found else 1.0,
            }
        )
        count *= 2
    return found


def growth(server: Server, rows: int, folder: Path, limit: float) -> dict[str, Any]:
    """What so many rows take on one server."""
    assert server.process is not None
    place = folder / f"growth-{rows}"
    files = write_jobs(place, graph(0), rows)
    times = psutil.Process(server.process.pid).cpu_times
    before = times()
    run = measured(files, [server.address], place / "out", limit)
    after = times()
    found: dict[str, Any] = {
        "rows": rows,
        "done": run.rows,
        "seconds": run.seconds,
        "ms per row": 1000 * run.seconds / run.rows,
        "batch's CPU ms": 1000 * run.cpu / run.rows,
        "server's CPU ms": 1000 * (after.user + after.system - before.user - before.system) / run.rows,
        "peak MB": run.peak / 2**20,
    }
    if run.rows == rows:
        again = measured(files, [server.address], place / "out", limit)
        found |= {"again seconds": again.seconds, "again peak MB": again.peak / 2**20}
    return found


@contextmanager
def running(count: int) -> Iterator[list[Server]]:
    """So many servers, started side by side."""
    servers = [
        Server(host_path(), Path(sys.executable), beside=[SLOW_NODE], log_name=f"bench-batch-{number + 1}")
        for number in range(count)
    ]
    with side_by_side(servers):
        yield servers


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python dev.py bench batch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--servers", type=int, default=2, help="at most so many (default: 2)")
    parser.add_argument("--jobs", type=int, default=200, help="rows of the throughput (default: 200)")
    parser.add_argument("--seconds", nargs="*", type=float, default=[0.0, 0.25], help="waits (default: 0 and 0.25)")
    parser.add_argument(
        "--rows", nargs="*", type=int, default=[10, 100, 1000], help="sizes of tables (default: 10 100 1000)"
    )
    parser.add_argument("--limit", type=float, default=360, help="seconds for a call (default: 360)")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"throughput": [], "growth": []}
    with running(options.servers) as servers, tempfile.TemporaryDirectory() as folder:
        for seconds in options.seconds:
            found["throughput"] += throughput(servers, options.jobs, seconds, Path(folder), options.limit)
        if options.seconds:
            show_table("Throughput.", found["throughput"])
        for rows in options.rows:
            found["growth"].append(growth(servers[0], rows, Path(folder), options.limit))
        if options.rows:
            show_table("Growth, one server.", found["growth"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0
