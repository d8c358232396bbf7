"""What has come of a batch's rows: results.jsonl, a line for each, the files it names, and metrics.jsonl.

A line is written, and on the disk, before the row counts as done; the same command again begins with what is there. A row that
failed is tried again then; so is one whose values, graph or pictures are not what they were.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..client import Graph
from ..paths import UserError
from .inputs import Plan, title
from .table import BETWEEN, Row, file_names
from .work import Picture

LINES = "results.jsonl"
FIGURES = "metrics.jsonl"
TABLE = "results.csv"
PICTURES = "pictures"
SHEET = "results.jpg"


@dataclass(frozen=True)
class Result:
    """The last word on a row. status: "done" or "failed". files: below the batch's folder."""

    number: int
    name: str
    key: str
    status: str
    seconds: float
    server: str
    attempts: int
    seed: int | None = None
    error: str = ""
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """What metrics say of a row's result: values by name. measured: the metrics, some of which may have had nothing to say."""

    key: str
    measured: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)


def row_key(row: Row, graph: Graph, plan: Plan, folder: Path) -> str:
    """Which row this is: another one if a value, the graph or a picture's file has changed."""
    files = []
    for column in [*plan.pictures, *([] if plan.hole is None else ["mask"])]:
        if column in row.values:
            try:
                state = (folder / str(row.values[column])).stat()
                files.append([state.st_size, state.st_mtime_ns])
            except OSError:
                files.append(None)
    said = json.dumps([row.name, row.values, graph, files], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


class Record:
    """The folder of a batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)

    def results(self) -> dict[str, Result]:
        """By key; of several the last. Raises UserError where the file holds anything else than lines, cut short or not."""
        return self._read(LINES, Result)

    def figures(self) -> dict[str, Figures]:
        """The same of metrics."""
        return self._read(FIGURES, Figures)

    def _read(self, name: str, kind: type[Any]) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        found = {}
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                entry = kind(**json.loads(line))
            except (ValueError, TypeError) as error:
                # A power cut left one unfinished, and the same command has gone on below it.
                begin = f'{{"{fields(kind)[0].name}":'.encode()
                if isinstance(error, ValueError) and begin.startswith(line[: len(begin)]):
                    continue
                raise UserError(f"{path}, line {number} is no result: remove it, or name another --out.") from error
            found[entry.key] = entry
        return found

    def is_done(self, result: Result | None) -> bool:
        """Whether nothing is left to do."""
        return result is not None and result.status == "done" and all((self.folder / f).is_file() for f in result.files)

    def save_pictures(self, row: Row, graph: Graph, pictures: Iterable[Picture]) -> list[str]:
        """Write a row's pictures, those of the graph's first node first; returns their names below the folder.

        A file is there whole or not at all.
        """
        # The host names nodes in the order in which they have ended, and some that others have made at work.
        order = {node: place for place, node in enumerate(graph)}
        pictures = sorted(pictures, key=lambda picture: (order.get(picture.node, len(order)), picture.number))
        nodes = list(dict.fromkeys(picture.node for picture in pictures))
        called = [title(graph, node) if node in graph else node for node in nodes]
        titles = dict(zip(nodes, file_names(called), strict=True))
        files = []
        for picture in pictures:
            parts = [row.name, *([titles[picture.node]] if len(nodes) > 1 else [])]
            if sum(other.node == picture.node for other in pictures) > 1:
                parts.append(str(picture.number))
            name = BETWEEN.join(parts) + picture.suffix
            path = self.folder / PICTURES / name
            partial = path.with_name(f".{os.getpid()}.partial")
            try:
                with partial.open("wb") as file:
                    file.write(picture.data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            files.append(f"{PICTURES}/{name}")
        return files

    def add(self, entry: Result | Figures) -> None:
        """Write a line, and see it onto the disk."""
        with (self.folder / (LINES if isinstance(entry, Result) else FIGURES)).open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def write_table(self, rows: Iterable[Row], results: dict[int, Result], figures: dict[str, Figures]) -> None:
        """results.csv: the table's columns, and what has come of each row."""
        rows = list(rows)
        columns = list(dict.fromkeys(column for row in rows for column in row.values))
        metrics = list(dict.fromkeys(name for entry in figures.values() for name in entry.values))
        own = ["status", "seconds", "server", "seed used", "attempts", "error", "files"]
        with (self.folder / TABLE).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "result", *own, *metrics, *columns])
            for row in rows:
                result = results.get(row.number)
                if result is None:
                    mine: list[Any] = ["open", *[""] * (len(own) - 1), *[""] * len(metrics)]
                else:
                    seconds = f"{result.seconds:.2f}"
                    files = "; ".join(result.files)
                    seed = "" if result.seed is None else result.seed
                    mine = [result.status, seconds, result.server, seed, result.attempts, result.error, files]
                    measured = figures.get(result.key, Figures(result.key)).values
                    mine += [measured.get(name, "") for name in metrics]
                writer.writerow([row.number, row.name, *mine, *(row.values.get(column, "") for column in columns)])
