"""The benchmarks' tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows below a title; a row may lack columns that others have. Numbers with a fraction have three digits of it."""
    print(f"\n{title}")
    lines = [
        {name: f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in row.items()}
        for row in rows
    ]
    names = list(dict.fromkeys(name for line in lines for name in line))
    widths = {name: max(len(name), *(len(line.get(name, "")) for line in lines)) for name in names}
    for line in [{name: name for name in names}, *lines]:
        print("  ".join(line.get(name, "").rjust(width) for name, width in widths.items()).rstrip())
