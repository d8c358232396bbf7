"""PILOT's benchmark measures what it says: its literal form has our losses, on a small network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.small_models import CONTEXT_DIM, small_model

bench = pack_module("evaluation.bench_pilot")
full_size = pack_module("evaluation.full_size")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model("sd15", False)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = full_size.Scene(128)
    for side in found.sides:
        side[0][0] = side[0][0][..., : CONTEXT_DIM["sd15"]]
    monkeypatch.setattr(full_size, "Scene", lambda *_: found)
    return found


def test_the_literal_form_has_our_losses(model: Any, scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.check_losses(model, scene, torch.float32)
    background = bench.pilot.background_loss
    monkeypatch.setattr(bench.pilot, "background_loss", lambda *arguments: 1.01 * background(*arguments))
    with pytest.raises(AssertionError, match="background"):
        bench.check_losses(model, scene, torch.float32)


def test_every_form_has_a_row(model: Any, scene: Any) -> None:
    rows = bench.measure_size(model, 128, True, 1, CPU, torch.float32)
    assert [row["pass"] for row in rows] == ["conditional forward", "guided step", "record", "recompute", "literal"]
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[0]["x forward"] == 1.0 and rows[-1]["x literal"] == 1.0
    guided = rows[1]["seconds"]
    assert rows[2]["picture"] == pytest.approx(100 * rows[2]["seconds"] + 100 * guided)
