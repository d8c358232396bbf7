"""The rows of a batch on their way: what is left to do, and what has come of the others."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..client import Graph
from ..pack import pack_module
from . import inputs
from .inputs import Plan, fill_in, seed_of
from .record import PICTURES, SHEET, TABLE, Figures, Record, Result, row_key
from .schedule import Done, Task
from .sheet import write_sheet
from .table import Row
from .work import Job, new_id

Metric = Callable[[Any], dict[str, float]]


class Batch:
    """The rows of a table, a graph, and the folder of what comes of them."""

    def __init__(self, graph: Graph, plan: Plan, rows: Sequence[Row], folder: Path, record: Record) -> None:
        self._graph, self._plan, self._folder, self._record = graph, plan, folder, record
        self._subfolder = f"truefill-batch-{uuid.uuid4().hex[:12]}"
        self._rows = {row.number: row for row in rows}
        self._keys = {row.number: row_key(row, graph, plan, folder) for row in rows}
        kept, figures = record.results(), record.figures()
        self.results = {number: kept[key] for number, key in self._keys.items() if record.is_done(kept.get(key))}
        self._figures = {key: figures[key] for key in self._keys.values() if key in figures}

    def tasks(self) -> Iterator[Task]:
        """The rows that are left."""
        for number in self._rows:
            if number not in self.results:
                yield Task(number, lambda number=number: self._job(number))

    def _job(self, number: int) -> Job:
        graph, uploads = fill_in(self._graph, self._plan, self._rows[number], self._folder)
        return Job(graph, uploads, new_id(), self._subfolder)

    def take(self, done: Done) -> Result:
        """Keep what has come of a row."""
        row, outcome = self._rows[done.task.number], done.outcome
        files, seed = [], None
        if outcome.status == "done":
            files = self._record.save_pictures(row, self._graph, outcome.pictures)
            graph, _ = fill_in(self._graph, replace(self._plan, targets=self._values()), row, self._folder)
            seed = seed_of(graph, self._plan)
        result = Result(
            row.number,
            row.name,
            self._keys[row.number],
            outcome.status,
            round(outcome.seconds, 3),
            done.server,
            done.task.attempts,
            seed,
            outcome.error,
            files,
        )
        self._record.add(result)
        self.results[row.number] = result
        # Figures of an earlier try are not of this one.
        if self._figures.pop(result.key, None) is not None:
            self._record.add(Figures(result.key))
        return result

    def _values(self) -> dict[str, list[inputs.Target]]:
        return {column: found for column, found in self._plan.targets.items() if column not in self._plan.pictures}

    def measure(self, metrics: Mapping[str, Metric], show: Callable[[int, int], None]) -> None:
        """Take figures of the results that have none yet."""
        done = [result for result in self.results.values() if result.status == "done" and result.files]
        left = [result for result in done if not set(metrics) <= set(self._of(result).measured)]
        for number, result in enumerate(left):
            show(number, len(left))
            sample, before = self._sample(result), self._of(result)
            values = dict(before.values)
            for name, metric in metrics.items():
                if name not in before.measured:
                    values |= {key: round(value, 6) for key, value in metric(sample).items()}
            self._figures[result.key] = Figures(result.key, sorted({*before.measured, *metrics}), values)
            self._record.add(self._figures[result.key])

    def _of(self, result: Result) -> Figures:
        return self._figures.get(result.key, Figures(result.key))

    def _sample(self, result: Result) -> Any:
        values = self._rows[result.number].values
        original = values.get(self._plan.hole or "image")
        places = {"original": original, "hole": values.get(inputs.MASK) if original else None}
        return pack_module("evaluation.picture_metrics").Sample(
            picture=self._record.folder / result.files[0],
            prompt=values.get("prompt"),
            **{name: None if value is None else self._folder / str(value) for name, value in places.items()},
        )

    def finish(self) -> list[str]:
        """Write the table and the contact sheet; returns lines for a person."""
        self._record.write_table(self._rows.values(), self.results, self._figures)
        ordered = [self.results[number] for number in sorted(self.results)]
        pictures = [(result.name, self._record.folder / file) for result in ordered for file in result.files[:1]]
        shown = write_sheet(self._record.folder / SHEET, pictures)
        failed = [result for result in ordered if result.status != "done"]
        lines = [
            f"{len(ordered) - len(failed)} done, {len(failed)} failed, {len(self._rows) - len(ordered)} left: "
            f"{self._record.folder / TABLE}"
        ]
        figures = [self._of(result).values for result in ordered]
        for name in dict.fromkeys(name for values in figures for name in values):
            values = [of_row[name] for of_row in figures if name in of_row]
            mean = sum(values) / len(values)
            lines.append(f"  {name}: {mean:.4g} ({min(values):.4g} to {max(values):.4g}, {len(values)} rows)")
        lines += [f"  row {result.number} ({result.name}): {result.error}" for result in failed[:10]]
        if len(failed) > 10:
            lines.append(f"  and {len(failed) - 10} more")
        if shown:
            lines.append(
                f"Pictures: {self._record.folder / PICTURES}; the first {shown}: {self._record.folder / SHEET}"
            )
        return lines
