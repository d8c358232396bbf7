"""The benchmark of what a graph keeps counts what the backward pass needs, and fails where PILOT expects less."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.small_models import CONTEXT_DIM, small_model

bench = pack_module("evaluation.bench_graph")


def test_what_a_layer_more_keeps_is_counted_once_and_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_model("sd15", False).model.diffusion_model.requires_grad_(False)
    config = {"adm_in_channels": None, "context_dim": CONTEXT_DIM["sd15"]}

    class Cubes(torch.nn.Module):
        """x^3 w keeps x and x^2 for the backward pass, besides the weights."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.weight = inner, torch.nn.Parameter(torch.ones(1, 4, 16, 16), requires_grad=False)
            self.dtype = inner.dtype

        def forward(self, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            squared = x * x
            return self.inner((squared * x) * self.weight, *arguments, **named)

    plain, places = bench.kept(unet, config, 16), bench.unets.transformer_places(unet)
    monkeypatch.setattr(bench.unets, "transformer_places", lambda _: places)
    assert bench.kept(Cubes(unet), config, 16) - plain == pytest.approx(2 * 4)


def test_it_fails_where_a_unet_keeps_more_than_pilot_expects(monkeypatch, tmp_path, capsys) -> None:
    sd15 = bench.full_size.SD15
    small = {**sd15, "model_channels": 32, "num_heads": 2, "context_dim": 64}
    monkeypatch.setattr(bench, "FAMILIES", {"SD": (small, torch.float32)})
    codes = []
    for limit in (10**9, 1):
        monkeypatch.setitem(bench.pilot.GRAPH_ELEMENTS, "SD", limit)
        monkeypatch.setattr("sys.argv", ["bench_graph.py", "--families", "SD", "--json", str(tmp_path / "rows.json")])
        codes.append(bench.main())
    assert codes == [0, 1]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["cells"] for row in rows] == [16, 32] and all(row["kept"] > 1000 for row in rows)
