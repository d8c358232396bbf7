"""The benchmark of joint attention measures a step of each family with each method, and the methods act in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from devtools.pack import pack_module

bench = pack_module("evaluation.bench_joint")

NARROW = {
    "flux": {"hidden_size": 128, "context_in_dim": 32, "num_heads": 1},
    "qwen_image": {
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (8, 12, 12),
    },
    "z_image": {"dim": 256, "cap_feat_dim": 32, "n_heads": 2, "n_kv_heads": 2},
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, config in NARROW.items():
        config_class, real = bench.STACKS[family]
        monkeypatch.setitem(bench.STACKS, family, (config_class, {**real, **config}))
        monkeypatch.setitem(bench.TEXTS, family, (bench.TEXTS[family][0], 32))


@pytest.mark.parametrize("family", list(NARROW))
@pytest.mark.usefixtures("narrow")
def test_each_row_samples_with_its_methods(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bench.model_of(family, torch.device("cpu"), torch.float32)
    scene, made = bench.Scene(family, 128), {}
    sampled = bench.comfy.sample.sample_custom
    for name, step in bench.variants(model, scene).items():
        monkeypatch.setattr(
            bench.comfy.sample,
            "sample_custom",
            lambda *args, name=name, **kw: made.update({name: sampled(*args, **kw)}),
        )
        with torch.inference_mode():
            step()
    assert list(made) == ["plain", "SBC", "PAIntA", "SBC + PAIntA"]
    for one in made:
        for other in made:
            assert one == other or not torch.equal(made[one], made[other])


@pytest.mark.usefixtures("narrow")
def test_the_rows_are_shown_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--families", "flux", "z_image", "--sizes", "64", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench joint", *arguments])
    bench.main()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["family"], row["size"], row["variant"]) for row in rows] == [
        (family, 64, name) for family in ("flux", "z_image") for name in ("plain", "SBC", "PAIntA", "SBC + PAIntA")
    ]
    assert all(row["seconds"] > 0 for row in rows) and rows[0]["time_ratio"] == rows[4]["time_ratio"] == 1
    assert "z_image's width" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--sizes", "100"], ["--rounds", "0"], ["--families", "sd15"]])
def test_bad_options_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench joint", *arguments])
    with pytest.raises(SystemExit):
        bench.main()
