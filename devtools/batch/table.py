"""The rows of a batch: a CSV, TSV, JSONL or Parquet table, or a folder of pictures with masks.

In a folder, NAME.mask.png belongs to NAME.png (or .jpg, .jpeg, .webp), NAME.txt beside it is the prompt, and NAME_0.mask.png,
NAME_1.mask.png ... are several holes in NAME.png, as Save Subjects writes them.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..paths import UserError

NAME = "name"
"""The column that names a row's results; without it they are numbered."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_MASK = ".mask.png"
BETWEEN = "~"
"""Parts a row's name from what its files are called besides, and is in neither: no two rows can mean the same file."""
_NOT_IN_NAMES = re.compile(r'[<>:"/\\|?*~\x00-\x1f\x7f]')
_WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST = 120


@dataclass(frozen=True)
class Row:
    """number: from 1, as a person counts them. name: of its files, unlike any other row's.

    values: by column, without empty ones.
    """

    number: int
    name: str
    values: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a table or a folder. Raises UserError in a sentence where there are none, or it can't be read."""
    if path.is_dir():
        found = _of_folder(path)
    elif not path.is_file():
        raise UserError(f"There is no table or folder {path}.")
    else:
        readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"{path.name} is no table that can be read: it has to end in {', '.join(readers)}.")
        try:
            found = reader(path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path.name} is not text in UTF-8: save it as UTF-8 ({error.reason}).") from error
    if not found:
        raise UserError(f"{path} has no rows.")
    given = ["" if values.get(NAME) is None else str(values[NAME]) for values in found]
    names = file_names([name or f"{number:05d}" for number, name in enumerate(given, 1)])
    return [
        Row(number, name, {column: value for column, value in values.items() if value not in (None, "")})
        for number, (name, values) in enumerate(zip(names, found, strict=True), 1)
    ]


def _csv(path: Path) -> list[dict[str, Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise UserError(f"{path.name} has a column twice: {', '.join(columns)}.")
        try:
            rows = list(reader)
        except csv.Error as error:
            raise UserError(f"{path.name}, line {reader.line_num}: {error}.") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(
                f"{path.name}, row {number}: it has another number of cells than the {len(columns)} columns."
            )
    return [{column.strip(): value for column, value in row.items()} for row in rows]


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path.name}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path.name}, line {number} is no object with columns: {line[:60]}.")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise UserError(
            "Parquet needs pyarrow, which is not installed: `pip install pyarrow`, or save the table as .csv."
        ) from None
    try:
        return parquet.read_table(path).to_pylist()
    except arrow.ArrowException as error:
        raise UserError(f"{path.name} is no Parquet table: {error}.") from error


def _of_folder(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for mask in sorted(folder.glob(f"*{_MASK}")):
        name = mask.name.removesuffix(_MASK)
        stems = (name, re.sub(r"_\d+$", "", name))
        pictures = [folder / f"{stem}{suffix}" for stem in stems for suffix in _PICTURES]
        picture = next((path for path in pictures if path.is_file()), None)
        if picture is None:
            raise UserError(f"{mask} has no picture: the mask of {name}.png or {name}.jpg is called {mask.name}.")
        text = folder / f"{name}.txt"
        prompt = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        rows.append({NAME: name, "image": picture.name, "mask": mask.name, "prompt": prompt})
    if not rows:
        raise UserError(f"The folder {folder} has no pairs: it needs pictures such as 1.png with 1.mask.png.")
    return rows


def file_names(names: Sequence[str]) -> list[str]:
    """Names of files on any system, in one folder, each of another spelling: for "a", "A", "../a" that is "a", "A-2", "a-3"."""
    taken: set[str] = set()
    found = []
    for name in names:
        plain = (
            _NOT_IN_NAMES.sub("_", unicodedata.normalize("NFC", name)).strip(" .").lstrip("_. ")[:_LONGEST].rstrip(" .")
        )
        if not plain or _WINDOWS.fullmatch(plain):
            plain = f"row {plain}".strip()
        unique, number = plain, 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{plain}-{number}"
        taken.add(unique.casefold())
        found.append(unique)
    return found
