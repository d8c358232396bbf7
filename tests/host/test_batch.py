"""A batch on two real ComfyUI processes, one of which hangs for a while and the other of which is killed."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from devtools.batch import command, schedule
from devtools.batch.console import Console
from devtools.batch.record import Result
from devtools.batch.schedule import Place
from devtools.pack import host_path
from devtools.server import Server, side_by_side
from truefill_testing.graphs import node
from truefill_testing.stand_ins import SLOW_NODE

ROWS = 50
SIDE = 12
SECONDS = 0.2
"""Of each row, without which all would be done before a server is missed."""
NAMES = ("Äpfel & Birnen", "\u65e5\u672c \u8a9e", "a b", "A B", "../oben")


def graph() -> dict[str, Any]:
    """The picture's negative, with the picture itself where its mask is; and the mask."""
    nodes = {
        "1": node("LoadImage", image="example.png"),
        "2": node("TestingSlow", image=["1", 0], seconds=SECONDS, seed=0),
        "3": node("ImageInvert", image=["2", 0]),
        "4": node(
            "ImageCompositeMasked",
            destination=["3", 0],
            source=["1", 0],
            mask=["1", 1],
            x=0,
            y=0,
            resize_source=False,
        ),
        "5": node("SaveImage", images=["4", 0], filename_prefix="batch/composite"),
        "6": node("MaskToImage", mask=["1", 1]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="batch/mask"),
    }
    nodes["5"]["_meta"], nodes["7"]["_meta"] = {"title": "Composite"}, {"title": "Its Mask"}
    return nodes


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    both = [Server(host_path(), Path(sys.executable), beside=[SLOW_NODE], log_name=f"test-batch-{n}") for n in (1, 2)]
    with side_by_side(both):
        yield both


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """A table in a folder with the pictures and masks of its rows; the first two rows are the same but for their seed."""
    folder = tmp_path / "Meine Bilder ü"
    (folder / "Masken").mkdir(parents=True)
    generator = np.random.default_rng(0)
    with (folder / "jobs.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "image", "mask", "seed"])
        for number in range(1, ROWS + 1):
            of = max(number, 2)
            picture = generator.integers(0, 256, (SIDE, SIDE + of % 3, 3), dtype=np.uint8)
            mask = generator.choice([0, 90, 255], picture.shape[:2]).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"Bild {of} ß.png")
            Image.fromarray(mask).save(folder / "Masken" / f"maske {of}.png")
            table.writerow([NAMES[number % len(NAMES)], f"Bild {of} ß.png", f"Masken/maske {of}.png", number])
    return folder / "jobs.csv"


class Trouble:
    """Stops the first server early on; lets it go on when that has been seen; kills the other when the first is back."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers, self._number = servers, 0
        self._done: Counter[str] = Counter()
        self.happened: list[str] = []

    def show(self, console: Console, result: Result, places: Sequence[Place]) -> None:
        """In place of the console's, after each row."""
        self._done[result.server] += 1
        first, other = self._servers
        if not self.happened and min(self._done[server.address] for server in self._servers) >= 3:
            self._send(first, "SIGSTOP")
        elif self.happened == ["SIGSTOP"] and places[0].why:
            self._before = self._done[first.address]
            self._send(first, "SIGCONT")
        elif self.happened == ["SIGSTOP", "SIGCONT"] and self._done[first.address] >= self._before + 4:
            self._send(other, "SIGKILL")

    def _send(self, server: Server, name: str) -> None:
        assert server.process is not None
        if os.name != "nt":
            os.killpg(server.process.pid, getattr(signal, name))
        self.happened.append(name)


def expected(folder: Path, row: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """The composite and the mask, computed here."""
    picture = np.asarray(Image.open(folder / row["image"]), dtype=np.float64)
    mask = np.asarray(Image.open(folder / row["mask"]), dtype=np.float64)
    share = mask[..., None] / 255
    return share * picture + (1 - share) * (255 - picture), mask


def test_each_row_has_its_result_whatever_servers_do(
    servers: list[Server], jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "_REST", 0.2)
    trouble = Trouble(servers)
    monkeypatch.setattr(Console, "show", lambda *given: trouble.show(*given))
    (tmp_path / "graph.json").write_text(json.dumps(graph()))
    out = tmp_path / "out"
    addresses = [server.address for server in servers]
    files = [str(path) for path in (tmp_path / "graph.json", jobs, "--out", out)]
    arguments = [*files, "--servers", *addresses, "--answer", "3", "--metrics", "none"]
    assert command.work_through(command.parse(arguments)) == 0

    if os.name != "nt":
        assert trouble.happened == ["SIGSTOP", "SIGCONT", "SIGKILL"]
        assert servers[1].process is not None and servers[1].process.wait(10) == -signal.SIGKILL
    assert servers[0].client.waiting() == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["number"] for line in lines) == list(range(1, ROWS + 1))
    with (out / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"done"} and {row["server"] for row in rows} == set(addresses)
    kept = [name for row in rows for name in row["files"].split("; ")]
    assert sorted(kept) == sorted(f"pictures/{path.name}" for path in (out / "pictures").iterdir())
    assert len(set(kept)) == 2 * ROWS and "pictures/Äpfel & Birnen~Composite.png" in kept
    for row in rows:
        composite, mask = (out / name for name in row["files"].split("; "))
        assert (composite.stem, mask.stem) == (f"{row['result']}~Composite", f"{row['result']}~Its Mask")
        for path, wanted in zip((composite, mask), expected(jobs.parent, row), strict=True):
            with Image.open(io.BytesIO(path.read_bytes())) as picture:
                made = np.asarray(picture.convert("RGB" if wanted.ndim == 3 else "L"), dtype=np.float64)
                settings = json.loads(picture.text["prompt"])
            # The host cuts fractions off.
            assert made.shape == wanted.shape and np.abs(made - wanted).max() <= 1.01
            assert settings["1"]["inputs"]["image"].startswith("truefill-batch-")
            # The host does not save the mask that two rows share twice.
            if path == composite:
                assert settings["2"]["inputs"] == {"image": ["1", 0], "seconds": SECONDS, "seed": int(row["seed"])}
