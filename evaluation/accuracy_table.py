"""What the accuracy benchmark's outcomes say: a row for each method, beside another, and beside what they said before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .metrics import mean_interval, wilson_interval

# HD-Painter, table 2: Stable Inpainting 2.0 on 10,000 triplets of MSCOCO, in percent.
PAPER = {"plain": 51.9, "PAIntA": 52.2, "RASG": 62.0, "PAIntA + RASG": 61.4}
PLAIN = "plain"
# What rounding on another processor may do: the share of answers that turn, and how much a method's seams change in the mean, in
# levels.
TURNED, MOVED = 0.1, 0.2


def summary(method: Any, found: list[dict[str, Any]], against: list[dict[str, Any]] | None) -> dict[str, Any]:
    """One row of the table; `against` are the outcomes to compare with, of the same triplets in the same order."""
    count = len(found)
    right = sum(outcome["right"] for outcome in found)
    row: dict[str, Any] = {
        "method": "text-to-image" if method is None else method.name,
        "model": "4-channel" if method is None else method.model,
        "eta": None if method is None else method.eta,
        "n": count,
        "accuracy": right / count,
        "ci95": wilson_interval(right, count),
        "nothing": sum(outcome["empty"] for outcome in found) / count,
        "seconds": mean_interval([outcome["seconds"] for outcome in found])[0],
    }
    if method is None:
        return row
    seam, low, high = mean_interval([outcome["seam"] for outcome in found])
    row |= {
        "background_max_error": max(outcome["background_error"] for outcome in found),
        "seam": seam,
        "seam_ci95": (low, high),
        "paper": PAPER.get(method.name),
    }
    changes = [outcome["change_before"] for outcome in found if "change_before" in outcome]
    if len(changes) == count:
        row["background_before"] = sum(changes) / count
    if against is not None and against is not found:
        pairs = list(zip(found, against, strict=True))
        gain, low, high = mean_interval([float(ours["right"]) - float(theirs["right"]) for ours, theirs in pairs])
        row |= {"gain": gain, "gain_ci95": (low, high)}
        rise, low, high = mean_interval([ours["seam"] - theirs["seam"] for ours, theirs in pairs])
        row |= {"seam_rise": rise, "seam_rise_ci95": (low, high)}
    return row


def worse_than_plain(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of PAIntA + RASG whose whole interval of the difference to plain lies below 0."""
    return [row for row in results if row["method"] == "PAIntA + RASG" and row.get("gain_ci95", (0.0, 0.0))[1] < 0]


def compared(rows: Sequence[Any], pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[str, bool]:
    """What pictures that were made again say beside what they said before, and whether no more than rounding is between them."""
    turned = [now for now, then in pairs if (now["right"], now["empty"]) != (then["right"], then["empty"])]
    names = ", ".join(f"{rows[now['row']].model} {rows[now['row']].name} {now['index']}" for now in turned)
    moved: dict[int, list[float]] = {}
    for now, then in pairs:
        moved.setdefault(now["row"], []).append(abs(now["seam"] - then["seam"]))
    most = max(sum(by) / len(by) for by in moved.values())
    said = f"{len(pairs)} pictures made again: {len(turned)} answers differ{f' ({names})' if names else ''}, "
    said += f"a method's seams by {most:.2f} levels in the mean at most."
    return said, len(turned) <= TURNED * len(pairs) and most <= MOVED


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def cells(row: dict[str, Any], against: str = PLAIN) -> dict[str, str]:
    """One row of the table as text, by column; shares are in percent. `against` is what it was compared with."""
    shown = {
        "model": row["model"],
        "method": row["method"],
        "eta": "" if row["eta"] is None else f"{row['eta']:g}",
        "n": str(row["n"]),
        "accuracy": percent(row["accuracy"]),
        "95 %": " - ".join(map(percent, row["ci95"])),
        f"to {against}": "",
        "nothing": percent(row["nothing"]),
    }
    if "gain" in row:
        low, high = row["gain_ci95"]
        shown[f"to {against}"] = f"{100 * row['gain']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    if "seam" in row:
        low, high = row["seam_ci95"]
        shown["background"] = f"{row['background_max_error']:g}"
        shown["seam"] = f"{row['seam']:.2f} ({low:.2f} to {high:.2f})"
        if against != PLAIN:
            rise = row.get("seam_rise")
            low, high = row.get("seam_rise_ci95", (0.0, 0.0))
            shown[f"seam to {against}"] = "" if rise is None else f"{rise:+.2f} ({low:+.2f} to {high:+.2f})"
        shown["paper"] = "" if row["paper"] is None else f"{row['paper']:.1f}"
    if "background_before" in row:
        shown["before"] = f"{row['background_before']:.1f}"
    return shown | {"seconds": f"{row['seconds']:.2f}"}
