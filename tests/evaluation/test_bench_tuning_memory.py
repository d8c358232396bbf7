"""The benchmark of what tuning a subject holds: both of its tables, on small networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devtools.pack import pack_module
from truefill_testing.small_models import small_model

import comfy.ldm.modules.attention  # isort: skip

bench = pack_module("evaluation.bench_tuning_memory")


def test_both_tables_have_a_row_for_each_size_and_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {**bench.full_size.SD15, "model_channels": 32, "num_heads": 2, "context_dim": 64}
    model = small_model("sd15", False)
    monkeypatch.setattr(bench.full_size, "FAMILIES", {"small": (None, small)})
    monkeypatch.setattr(bench.full_size, "full_size_model", lambda *_, **__: model)
    # It takes another for the whole process.
    attention = comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "optimized_attention", attention.optimized_attention)
    file = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["bench", "--sizes", "64", "128", "--measure", "64", "--json", str(file)])
    bench.main()
    found = json.loads(file.read_text())
    said = {(row["pixels"], row["save_memory"]): row["step"] for row in found["said"]}
    assert set(said) == {(64, "on"), (64, "off"), (128, "on"), (128, "off")}
    assert all(said[128, saved] > 2.5 * said[64, saved] for saved in ("on", "off"))
    assert all(said[pixels, "off"] > said[pixels, "on"] for pixels in (64, 128))
    assert all(row["with the weights"] > row["step"] for row in found["said"])
    assert [(row["pixels"], row["save_memory"]) for row in found["here"]] == [(64, "on"), (64, "off")]
    assert all(row["said"] > 0.0 and row["here"] >= 0.0 for row in found["here"])
