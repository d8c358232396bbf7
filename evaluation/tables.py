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


def with_interval(row: Mapping[str, Any], key: str, scale: float = 100.0, digits: int = 1) -> str:
    """A figure of a row and its interval, which lies beside it as `key`_ci95; "" where the row has none."""
    if key not in row:
        return ""
    low, high = (scale * of for of in row[f"{key}_ci95"])
    return f"{scale * row[key]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
