"""Files of outcomes, a line of JSON each: benchmarks write every picture's at once, and make none again that is there."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..weights.demo_model import FILES

Key = tuple[Any, ...]


@functools.cache
def weights_digest(folder: Path) -> str:
    """Which weights of the demo model a folder has."""
    found = hashlib.sha256()
    for name in sorted(FILES.values()):
        found.update((folder / name).read_bytes())
    return found.hexdigest()[:12]


def kept_outcomes(
    path: Path | None, names: Sequence[str], settings_of: Callable[[dict[str, Any]], Any]
) -> dict[Key, dict[str, Any]]:
    """The outcomes in a file that belong to a run, by what a line has under `names` and the outcome's index.

    `settings_of` says what the run's settings are for a line; a line with others is none of its own.
    """
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (*(line[name] for name in names), line["outcome"]["index"]): line["outcome"]
        for line in lines
        if line["settings"] == settings_of(line)
    }


def keep_outcome(path: Path | None, settings: Any, outcome: dict[str, Any], **names: Any) -> None:
    """Adds a line to a file, where there is one."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"settings": settings, **names, "outcome": outcome}) + "\n")
