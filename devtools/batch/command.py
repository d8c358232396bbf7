"""Runs every row of a table through a graph, on one or many ComfyUI servers:  python dev.py batch GRAPH JOBS [options]

GRAPH is in API format: one of workflows/api, or the editor's Export (API). JOBS is a table (.csv, .tsv, .jsonl, .parquet; its
pictures are named from its folder) or a folder with NAME.png, NAME.mask.png (white: the hole) and NAME.txt (the prompt).

A column is called as the input that it goes to, by the node's id or title ("12.text", "Load Image.image"), or --map says so.
Plain names are understood where they can mean but one input: image, mask (it goes into the picture's alpha), prompt, negative,
seed (every seed), or any other input's name. "name" names the results.

    python dev.py batch workflows/api/text_inpaint_sd15.json photos --servers http://127.0.0.1:8188 http://10.0.0.2:8188
    python dev.py batch workflows/api/try_without_downloads.json jobs.csv --local 2

The folder --out gets pictures/, results.jsonl (a line for each row, as it ends), results.csv and results.jpg. Ctrl-C loses
nothing: the same command goes on. Needs Dask: pip install "distributed".
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .. import program
from ..client import ServerGone
from ..options import positive
from ..pack import host_path, pack_module
from ..paths import UserError
from ..server import Server, side_by_side
from . import inputs
from .cluster import Cluster, open_cluster
from .console import Console
from .inputs import make_plan, read_graph
from .record import Record
from .rows import Batch, Metric
from .schedule import Place, Scheduler
from .table import Row, read_rows
from .work import DEEPEST, DEFAULT, SERVER, Limits, ask_nodes, own_server


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="dev.py batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("graph", type=Path, metavar="GRAPH", help="a graph in API format")
    parser.add_argument("jobs", type=Path, metavar="JOBS", help="a table, or a folder of pictures with masks")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--servers", nargs="+", type=address, metavar="URL", help=f"running ComfyUIs (default: {DEFAULT})"
    )
    where.add_argument("--local", type=positive, metavar="N", help="start N ComfyUIs here, and end them")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a Dask cluster that is there, such as tcp://10.0.0.1:8786. Its workers talk to --servers; without those each to "
        f"its own ComfyUI, which its variable {SERVER} names (default: {DEFAULT})",
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: batch-output/NAME OF JOBS)")
    parser.add_argument(
        "--map", nargs="+", default=[], type=mapping, metavar="COLUMN=NODE.INPUT", help="where columns go"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seeds for a table without them: row 1 gets N, row 2 N + 1 ..."
    )
    parser.add_argument("--retries", type=int, default=1, help="tries of a failed row on other servers (default: 1)")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds for a row (default: 3600)")
    parser.add_argument(
        "--answer", type=float, default=30, metavar="S", help="seconds after which a silent server is gone (30)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=300,
        metavar="S",
        help="seconds to wait when all servers are gone (default: 300)",
    )
    parser.add_argument(
        "--models", nargs="+", type=Path, default=[], help="with --local: folders laid out as ComfyUI's models"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["background", "demo"],
        metavar="NAME",
        help="figures of each result, where it can have them (default: background demo): background, demo (the demo world's "
        "classifier), clip, local-clip, aesthetic, detector, lpips; or none",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        type=named_path,
        metavar="NAME=PATH",
        help="of metrics: clip, aesthetic, detector, lpips",
    )
    options = parser.parse_args(arguments)
    options.metrics = [] if options.metrics == ["none"] else options.metrics
    if options.local and options.scheduler:
        parser.error("--local starts its own cluster: leave --scheduler out.")
    if options.servers and len(set(options.servers)) < len(options.servers):
        parser.error("--servers names a server twice.")
    if options.retries < 0 or min(options.timeout, options.answer, options.patience) <= 0:
        parser.error("--retries is 0 or more, --timeout, --answer and --patience are above 0.")
    return options


def address(text: str) -> str:
    """A server's address."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"'{text}' is no address such as {DEFAULT}")
    return text.rstrip("/")


def mapping(text: str) -> tuple[str, str]:
    """COLUMN=NODE.INPUT."""
    column, equals, target = text.partition("=")
    if not equals or not column or "." not in target:
        raise argparse.ArgumentTypeError(f"'{text}' is not COLUMN=NODE.INPUT, such as prompt=12.text")
    return column, target


def named_path(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=PATH, such as clip=models/clip-vit-large-patch14")
    return name, Path(path)


@contextlib.contextmanager
def local_servers(count: int, models: Sequence[Path]) -> Iterator[list[str]]:
    """ComfyUIs of our own; with several GPUs each gets one in turn."""
    host, gpus = host_path(), _gpus()
    if not gpus:
        # Else each takes all cores, and they wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    folders = [folder for folder in (host / "models", *models) if folder.is_dir()]
    servers = [
        Server(
            host,
            Path(sys.executable),
            models=folders,
            arguments=["--cuda-device", str(number % gpus)] if gpus > 1 else [],
            log_name=f"batch-{number + 1}",
        )
        for number in range(count)
    ]
    print(f"Starting ComfyUI, {count} times ..." if count > 1 else "Starting ComfyUI ...", flush=True)
    with side_by_side(servers):
        yield [server.address for server in servers]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def find_places(cluster: Cluster, servers: Sequence[str] | None) -> list[Place]:
    """Where rows can run. Raises UserError where a cluster has no workers."""
    if servers is not None:
        return [Place(server) for server in servers]
    found = cluster.of_each(own_server)
    if not found:
        raise UserError("The Dask cluster has no workers: start one on each machine that has a ComfyUI.")
    return [Place(server, worker) for worker, server in sorted(found.items())]


def _known_nodes(places: Sequence[Place], limits: Limits, cluster: Cluster) -> dict[str, Any]:
    """The nodes of the first server that answers. Raises UserError where none does."""
    said = []
    for place in places:
        try:
            if place.worker is None:
                return ask_nodes(place.address, limits.answer)
            return cluster.submit(ask_nodes, place.address, limits.answer, worker=place.worker).result()
        except Exception as error:
            said.append(str(error) if isinstance(error, ServerGone) else f"{place.name}: {error!r}")
    raise UserError("No server answers: " + " ".join(said))


def with_seeds(rows: Sequence[Row], first: int | None) -> list[Row]:
    """Rows with a seed each, where the table has none."""
    if first is None:
        return list(rows)
    if any(inputs.SEED in row.values for row in rows):
        raise UserError("--seed is for tables without seeds, and this one has the column 'seed'.")
    return [replace(row, values={**row.values, inputs.SEED: first + row.number - 1}) for row in rows]


def make_metrics(names: Sequence[str], weights: Mapping[str, Path]) -> dict[str, Metric]:
    """Metrics by name. Raises UserError for one that is not known, or that lacks its weights, before anything is run."""
    if not names:
        return {}
    module = pack_module("evaluation.picture_metrics")
    if unknown := [name for name in names if name not in module.METRICS]:
        raise UserError(f"There is no metric {unknown[0]!r}; there are {', '.join(module.METRICS)}.")
    try:
        return {name: module.make_metric(name, weights) for name in names}
    except ValueError as error:
        raise UserError(str(error)) from error


def work_through(options: argparse.Namespace) -> int:
    """Run a batch; returns 1 where a row failed."""
    metrics = make_metrics(options.metrics, dict(options.weights))
    graph, rows = read_graph(options.graph), with_seeds(read_rows(options.jobs), options.seed)
    folder = options.jobs if options.jobs.is_dir() else options.jobs.parent
    limits = Limits(options.answer, options.timeout)
    with contextlib.ExitStack() as stack:
        servers = options.servers
        if options.local:
            servers = stack.enter_context(local_servers(options.local, options.models))
        elif servers is None and options.scheduler is None:
            servers = [DEFAULT]
        cluster = stack.enter_context(open_cluster(options.scheduler, DEEPEST * len(servers or [0]), options.answer))
        places = find_places(cluster, servers)
        columns = list(dict.fromkeys(column for row in rows for column in row.values))
        plan = make_plan(graph, columns, dict(options.map), _known_nodes(places, limits, cluster))
        batch = Batch(graph, plan, rows, folder, Record(options.out or Path("batch-output") / options.jobs.stem))
        tasks = list(batch.tasks())
        if len(tasks) < len(rows):
            print(f"{len(rows) - len(tasks)} of {len(rows)} rows are done already.", flush=True)
        console = Console(len(tasks))
        scheduler = Scheduler(cluster, places, limits, options.retries, options.patience)
        try:
            for done in scheduler.run(tasks):
                console.show(batch.take(done), places)
            batch.measure(metrics, console.measuring)
        finally:
            away = [f"  {place.name} was left alone at last: {place.why}" for place in places if place.why]
            print("\n".join(["", *batch.finish(), *away]), flush=True)
    return int(any(result.status != "done" for result in batch.results.values()))


def main() -> int:
    """Run the command."""
    return work_through(parse())


if __name__ == "__main__":
    raise SystemExit(program.run(main))
