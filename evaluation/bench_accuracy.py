"""Generation accuracy, background change, seams and time of plain inpainting, PAIntA, RASG, SBC and PILOT on the demo model.

HD-Painter's measure (section 4.2) on a world in which it costs nothing: for triplets of a scene, a hole and a prompt that the
scene does not suggest, does a classifier find the asked-for shape and colour in the hole? Every picture is made by the host's
nodes in the order of the shipped graphs, with the same noise for every method. Intervals are 95 %: Wilson's for accuracy, the
normal approximation for the rest and for the paired difference to plain, or to the row of the same model that `--against` names.
The triplets come from seeds that no training saw.
"before" is how much the background changes before the original's is put back.

    python dev.py bench accuracy [--triplets 500] [--seed 0] [--json FILE] [--grid FILE.png]
    python dev.py bench accuracy --split dev --triplets 200 --etas 0.01 0.03 0.1 0.25      # to choose the default eta on
    python dev.py bench accuracy --captions 500                                            # text-to-image: no hole

500 triplets take hours on two cores. With `--outcomes FILE` every picture's outcome is written there at once, and those that are
there are not made again: the same command goes on where it was stopped. `--again N` makes those of the first N triplets anew,
writes none of them, and fails where they say something else: are the figures that were counted still those of this code?
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import comfy.utils
import numpy as np
import torch
from PIL import Image

from devtools.batch.checkout import CHECKOUT, in_checkout
from devtools.batch.cluster import open_cluster
from devtools.launch import command
from devtools.paths import ROOT

from ..model_patches.hd_painter.rasg import RASG
from ..training.demo.samples import grid
from ..training.world.triplets import make_triplet
from ..weights.demo_dit import FILE as DIT_FILE
from ..weights.demo_model import FILES, FOLDER
from . import accuracy
from .accuracy_table import PAPER, PLAIN, cells, compared, summary, worse_than_plain
from .judge import Judge
from .outcomes import weights_digest
from .tables import show_table

MODULE = "evaluation.bench_accuracy"
GRID_TRIPLETS = 8
LOG_LINES = 15


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    models = [*accuracy.MODELS, accuracy.TRANSFORMER]
    known = list(dict.fromkeys(row.name for row in accuracy.methods(models, [0.0])))
    parser = argparse.ArgumentParser(prog="python dev.py bench accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--triplets", type=int, default=500, metavar="N", help="how many (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first triplet (default: 0)")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="default: test")
    parser.add_argument("--models", nargs="+", choices=models, default=list(accuracy.MODELS), help="default: the UNets")
    parser.add_argument("--methods", nargs="+", choices=known, default=list(PAPER), help="default: those of HD-Painter")
    parser.add_argument("--against", choices=known, default=PLAIN, metavar="METHOD", help="default: plain")
    parser.add_argument("--etas", type=float, nargs="+", help="etas for RASG (default: the node's)")
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--cfg", type=float, default=7.5, help="default: 7.5")
    parser.add_argument("--captions", type=int, default=0, metavar="N", help="text-to-image instead, on N captions")
    parser.add_argument(
        "--weights", type=Path, default=FOLDER, help="folder of the demo model's files (default: weights/demo)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="processes of one thread; 1 is this one, with torch's threads (default: one a core; 1 on a GPU)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a Dask cluster to run on instead; its machines have this checkout, where this one has it or where their variable "
        f"{CHECKOUT} says",
    )
    parser.add_argument("--outcomes", type=Path, help="file to keep the outcomes in, and to go on from")
    parser.add_argument(
        "--again",
        type=int,
        default=0,
        metavar="N",
        help="make the first N triplets anew, and fail where they differ from those in --outcomes by more than rounding",
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--grid", type=Path, help=f"write the pictures of the first {GRID_TRIPLETS} triplets here")
    parser.add_argument(
        "--check", action="store_true", help="fail where PAIntA + RASG is below plain by more than noise"
    )
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.scheduler and (options.grid or options.workers):
        parser.error("--scheduler has workers of its own, and no --grid.")
    if options.check and options.against != PLAIN:
        parser.error("--check compares with plain: leave --against out.")
    if options.grid and options.outcomes:
        parser.error("--grid draws pictures that --outcomes does not keep: run it by itself, with few triplets.")
    if options.again and not options.outcomes:
        parser.error("--again compares with what --outcomes has: name that file, too.")
    if options.again and options.captions:
        parser.error("--again is for triplets: leave --captions out.")
    if not 0 <= options.again <= options.triplets:
        parser.error("--again is 0 or more, and no more than --triplets.")
    if min(options.triplets, options.steps) < 1 or min(options.captions, options.seed) < 0:
        parser.error("--triplets and --steps are 1 or more, --captions and --seed 0 or more.")
    return options


def tasks(options: argparse.Namespace) -> list[Any]:
    """The rows that are asked for; None stands for text-to-image."""
    if options.captions:
        return [None]
    found = accuracy.methods(options.models, options.etas or [RASG().eta])
    return [method for method in found if method.name in options.methods]


def numbers(options: argparse.Namespace) -> range:
    """The indices of the triplets, or captions, of this run."""
    return range(options.seed, options.seed + (options.captions or options.triplets))


def known_outcomes(options: argparse.Namespace, rows: Sequence[Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """The outcomes of `--outcomes` that belong to this run, as the workers would report them, by row and index."""
    if options.outcomes is None or not options.outcomes.exists():
        return {}
    wanted = {json.dumps(settings(options, row)): number for number, row in enumerate(rows)}
    found = {}
    for line in options.outcomes.read_text().splitlines():
        outcome = json.loads(line)
        number = wanted.get(json.dumps(outcome.pop("settings")))
        if number is not None and outcome["index"] in numbers(options):
            found[number, outcome["index"]] = {"row": number, **outcome}
    return found


def anew(options: argparse.Namespace) -> range:
    """The indices whose pictures are made again."""
    return numbers(options)[: options.again]


def kept(options: argparse.Namespace, known: Mapping[tuple[int, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the known outcomes that need not be made."""
    return [outcome for (_, index), outcome in known.items() if index not in anew(options)]


def settings(options: argparse.Namespace, row: Any) -> dict[str, Any]:
    """What an outcome depends on besides its index, for the line in which it is kept."""
    common = {
        "weights": weights_digest(options.weights),
        "split": options.split,
        "steps": options.steps,
        "cfg": options.cfg,
    }
    if row is not None and row.model == accuracy.TRANSFORMER:
        common["weights"] += f"-{hashlib.sha256((options.weights / DIT_FILE).read_bytes()).hexdigest()[:12]}"
    return common | ({"captions": True} if row is None else {"model": row.model, "method": row.name, "eta": row.eta})


def keep(
    options: argparse.Namespace, rows: Sequence[Any], outcomes: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Hands the outcomes on, each after it was written to `--outcomes`; a run with `--again` writes nothing."""
    if options.outcomes is None or options.again:
        yield from outcomes
        return
    with options.outcomes.open("a") as file:
        for outcome in outcomes:
            line = {"settings": settings(options, rows[outcome["row"]]), **outcome}
            del line["row"]
            file.write(json.dumps(line) + "\n")
            file.flush()
            yield outcome


class Incomplete(RuntimeError):
    """A run that did not make all of its pictures, and why."""


class Worker:
    """What makes the pictures of a run, with its models loaded once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._rows = options, tasks(options)
        self._judge, self._models = Judge(options.weights), accuracy.Models(options.weights)
        self._sampling = accuracy.KSampling(steps=options.steps, cfg=options.cfg)

    def outcomes(self, index: int, skip: Collection[int]) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """A triplet's outcomes and pictures [1, H, W, 3], under every method but those of these numbers."""
        split, task = self._options.split, None
        for number, method in enumerate(self._rows):
            if number in skip:
                continue
            if method is None:
                outcome, picture = accuracy.attempt_caption(self._models, split, index, self._sampling, self._judge)
            else:
                if task is None or task.model != method.model:
                    task = accuracy.prepare(self._models, method.model, make_triplet(split, index))
                outcome, picture = accuracy.attempt(self._models, method, task, index, self._sampling, self._judge)
            yield {"row": number, **asdict(outcome)}, picture


def share_of(options: argparse.Namespace, number: int, shares: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Makes a worker's share of the triplets under every method; the grid's pictures go to `folder`."""
    worker, done = Worker(options), rows_done(kept(options, known_outcomes(options, tasks(options))))
    for place, index in enumerate(numbers(options)):
        if place % shares != number:
            continue
        for outcome, picture in worker.outcomes(index, done.get(index, ())):
            if place < GRID_TRIPLETS and options.grid:
                pixels = (picture[0] * 255).round().to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{place}-{outcome['row']}.png")
            yield outcome


@contextmanager
def without_bars() -> Iterator[None]:
    """The host draws no bar for each picture, between the lines of `progress`."""
    before = comfy.utils.PROGRESS_BAR_ENABLED
    comfy.utils.set_progress_bar_enabled(False)
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_enabled(before)


def work(options: argparse.Namespace) -> None:
    """One worker: a line of JSON for each picture of its share."""
    number, shares, folder = options.share.split("/", 2)
    for outcome in share_of(options, int(number), int(shares), Path(folder)):
        print(json.dumps(outcome), flush=True)


def rows_done(found: Iterable[dict[str, Any]]) -> dict[int, set[int]]:
    """The rows of outcomes, by index."""
    done: dict[int, set[int]] = {}
    for outcome in found:
        done.setdefault(outcome["index"], set()).add(outcome["row"])
    return done


_ONE_AT_A_TIME = threading.Lock()


@functools.lru_cache(maxsize=1)
def _worker(arguments: tuple[str, ...]) -> Worker:
    if not torch.cuda.is_available():
        # As the processes of a run on one machine.
        torch.set_num_threads(1)
    return Worker(parse(arguments))


def outcomes_of(arguments: tuple[str, ...], index: int, skip: Collection[int]) -> list[dict[str, Any]]:
    """A triplet's outcomes, on a machine of a cluster; `arguments` are the command line's."""
    # The host has one model at work at a time.
    with _ONE_AT_A_TIME:
        return [outcome for outcome, _ in _worker(arguments).outcomes(index, skip)]


def outcomes_of_cluster(options: argparse.Namespace, done: dict[int, set[int]]) -> Iterator[dict[str, Any]]:
    """The outcomes that are left, from a Dask cluster; raises Incomplete where one fails."""
    everything = set(range(len(tasks(options))))
    left = iter([index for index in numbers(options) if done.get(index, set()) < everything])
    arguments = tuple(sys.argv[1:])
    with open_cluster(options.scheduler, 1, 20.0) as cluster:
        running: set[Any] = set()
        while True:
            # A machine that goes takes little with it, and its rows go to another; none waits for its next.
            for index in islice(left, max(0, 2 * cluster.threads() - len(running))):
                call = (str(ROOT), MODULE, "outcomes_of", arguments, index, done.get(index, set()))
                running.add(cluster.submit(in_checkout, *call))
            if not running:
                return
            cluster.wait(running, 1.0)
            for future in [future for future in running if future.done()]:
                running.remove(future)
                if future.status != "finished":
                    raise Incomplete(f"The cluster failed: {future.exception()}")
                yield from future.result()


def outcomes(workers: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Starts the workers and hands on their lines; raises Incomplete where one fails."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    lines: list[str] = []
    ready = threading.Condition()

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with ready:
                lines.append(line)
                ready.notify()

    started: list[tuple[subprocess.Popen[str], threading.Thread, Path]] = []
    try:
        for number in range(workers):
            errors = folder / f"worker-{number}.log"
            with errors.open("w") as log:
                process = subprocess.Popen(
                    command("--tied", "-p", MODULE, *sys.argv[1:], "--share", f"{number}/{workers}/{folder}"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=variables,
                )
            reader = threading.Thread(target=read, args=(process,), daemon=True)
            reader.start()
            started.append((process, reader, errors))
        while True:
            with ready:
                ready.wait_for(lambda: lines, timeout=0.5)
                waiting, lines[:] = list(lines), []
            for line in waiting:
                # The host's own output goes the same way.
                if line.startswith("{"):
                    yield json.loads(line)
            for process, _, errors in started:
                if code := process.poll():
                    tail = "\n".join(errors.read_text().splitlines()[-LOG_LINES:]) or "(nothing)"
                    raise Incomplete(f"A worker failed with exit status {code}; the end of what it said:\n{tail}")
            if not waiting and all(not reader.is_alive() for _, reader, _ in started) and not lines:
                return
    finally:
        for process, _, _ in started:
            process.kill()
            process.wait()


def progress(found: Iterable[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    """Collects everything and says how far it is."""
    collected: list[dict[str, Any]] = []
    started = said = time.monotonic()
    for outcome in found:
        collected.append(outcome)
        now = time.monotonic()
        if now - said > 30 or len(collected) == total:
            said = now
            left = (now - started) * (total - len(collected)) / len(collected)
            print(f"  {len(collected)}/{total} pictures, {left / 60:.0f} min left", file=sys.stderr, flush=True)
    if len(collected) != total:
        raise Incomplete(f"{len(collected)} of {total} pictures came back.")
    return collected


def write_grid(options: argparse.Namespace, rows: Sequence[Any], folder: Path) -> None:
    """The first triplets: scene, hole, and what each method made of it."""
    lines, captions = [], []
    for place, index in list(enumerate(numbers(options)))[:GRID_TRIPLETS]:
        made = [np.asarray(Image.open(folder / f"{place}-{number}.png")) for number in range(len(rows))]
        if options.captions:
            lines.append(made)
            captions.append([accuracy.make_caption(options.split, index).text])
            continue
        triplet = make_triplet(options.split, index)
        hole = np.where(triplet.hole[..., None], np.uint8(128), triplet.scene.picture)
        lines.append([triplet.scene.picture, hole, *made])
        names = [
            f"{method.model} {method.name}" + ("" if method.eta is None else f", eta {method.eta:g}") for method in rows
        ]
        captions.append([triplet.kind, triplet.prompt, *names])
    grid(lines, captions).save(options.grid, optimize=True)


def main() -> int:
    """Run the benchmark."""
    options = parse()
    if options.share:
        work(options)
        return 0
    missing = [name for name in FILES.values() if not (options.weights / name).is_file()]
    if missing:
        print(
            f"bench accuracy: {options.weights} has no {missing[0]}: name a folder that `dev.py train export` has written.",
            file=sys.stderr,
        )
        return 1
    cuda = torch.cuda.is_available()
    workers = options.workers or (1 if cuda else os.cpu_count() or 1)
    workers = min(workers, len(numbers(options)))
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    machine = f"{where}, {workers} process{'es' if workers > 1 else ''}, torch {torch.__version__}"
    if options.scheduler:
        machine = f"a Dask cluster at {options.scheduler}"
    rows = tasks(options)
    print(f"{machine}; {options.split} split, {options.steps} steps of euler, CFG {options.cfg:g}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = known_outcomes(options, rows)
        again = [(row, index) for index in anew(options) for row in range(len(rows))]
        if lacking := [key for key in again if key not in before]:
            row, index = lacking[0]
            print(
                f"bench accuracy: {options.outcomes} has no outcome of {rows[row].model} {rows[row].name}, triplet {index}, with "
                f"these weights and settings: run the same command without --again first.",
                file=sys.stderr,
            )
            return 1
        done = kept(options, before)
        left = len(rows) * len(numbers(options)) - len(done)
        try:
            if options.scheduler:
                of = outcomes_of_cluster(options, rows_done(done))
            else:
                of = outcomes(workers, folder) if workers > 1 else share_of(options, 0, 1, folder)
            made = keep(options, rows, of) if left else ()
            with without_bars():
                found = done + progress(made, left)
        except Incomplete as error:
            print(f"bench accuracy: {error}", file=sys.stderr)
            return 1
        if options.grid:
            write_grid(options, rows, folder)
    by_row = [sorted((o for o in found if o["row"] == number), key=lambda o: o["index"]) for number in range(len(rows))]
    against = {row.model: mine for row, mine in zip(rows, by_row, strict=True) if row and row.name == options.against}
    results = [
        summary(row, mine, against.get(row.model) if row else None) for row, mine in zip(rows, by_row, strict=True)
    ]
    show_table("Shares are in percent.", [cells(result, options.against) for result in results])
    if options.json:
        common = {"machine": machine, "split": options.split, "steps": options.steps, "cfg": options.cfg}
        options.json.write_text(json.dumps([common | result for result in results], indent=1))
    worse = worse_than_plain(results) if options.check else []
    complaints = [f"{row['model']}: PAIntA + RASG is below plain by more than noise." for row in worse]
    if again:
        now = {(outcome["row"], outcome["index"]): outcome for outcome in found}
        said, same = compared(rows, [(now[key], before[key]) for key in again])
        print(said)
        if not same:
            complaints.append("The figures above are no longer those of this code.")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0
