"""The benchmark of photographs measures what is known of made-up pictures, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.pack import pack_module

bench = pack_module("evaluation.bench_photos")
texture = pack_module("evaluation.bench_region").texture


@pytest.fixture(scope="module")
def scene() -> torch.Tensor:
    return texture(96, 1)


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    return bench.ellipse(96, 96)


def test_detail_is_a_ratio_to_the_truth(scene: torch.Tensor, mask: torch.Tensor) -> None:
    assert float(mask.mean()) == pytest.approx(0.25, abs=0.01)
    assert bench.detail(scene, scene, mask) == 1.0
    assert bench.detail(0.5 * scene, scene, mask) == pytest.approx(0.25)
    elsewhere = torch.where(mask > 0, scene, 0.0)
    assert bench.detail(elsewhere, scene, mask) == 1.0


def test_upscaling_is_told_from_bicubic(scene: torch.Tensor) -> None:
    class Nearest:
        """An upscale model that repeats pixels."""

    rows = []
    made: dict[str, torch.Tensor] = {}

    def upscale(pictures: torch.Tensor, low: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        made["picture"], made["low"] = pictures, low
        return scene.movedim(1, -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "upscale_hole", upscale)
        for row, _ in bench.upscaled("noise", scene, Nearest(), bench.POISSON):
            rows.append(row)
    bicubic, perfect = rows
    assert made["low"].shape == (1, 24, 24, 3)
    # The hole of what the node is given holds nothing of the truth.
    assert float(made["picture"][0, 40:56, 40:56].std()) == 0.0
    assert (perfect["detail"], perfect["error"], perfect["seam"]) == (1.0, 0.0, 0.0)
    assert bicubic["error"] > 0 and bicubic["outside"] == perfect["outside"] == 0


def test_large_pictures_are_photographs_and_their_mirror_images() -> None:
    picture = texture(96, 2)[0, :, :60]
    large = bench.mirrored_to(picture, 256)
    assert large.shape == (1, 3, 256, 256) and torch.equal(large[0, :, :60, :96], picture)
    padded = torch.nn.functional.pad(picture[None], (0, 60, 0, 36), mode="reflect")
    assert torch.equal(large[..., :96, :156], padded)
    # Again from its beginning, after once there and back.
    assert torch.equal(large[..., 118:178, 190:256], picture[None, ..., :66])
    assert float(bench.ellipse(256, 256, 0.01).mean()) == pytest.approx(0.01, abs=0.001)


def test_what_the_node_makes_is_compared_with_all_at_once(scene: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nearest:
        """An upscale model that repeats pixels."""

        patcher = None

        def __call__(self, picture: torch.Tensor) -> torch.Tensor:
            return picture.repeat_interleave(4, -2).repeat_interleave(4, -1)

    def upscale(pictures: torch.Tensor, low: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        made = torch.where(bench.widened(hole, bench.LAYOUT.expand)[..., None] > 0, 10 / 255, 0.0)
        return repeated + made

    hole = bench.ellipse(96, 96, 0.09)
    monkeypatch.setattr(bench.comfy.model_management, "load_models_gpu", lambda *_: None)
    monkeypatch.setattr(bench, "upscale_hole", upscale)
    low = bench.resampled(scene, (24, 24), "bicubic").clamp(0, 1)
    made_anew = bench.widened(hole, bench.LAYOUT.expand)[:, None]
    repeated = torch.where(made_anew > 0, Nearest()(low), scene).movedim(1, -1)
    *_, row = (row for row, _ in bench.upscaled("noise", scene, Nearest(), bench.ONLY_BLEND, 0.09, at_once=True))
    assert row["method"] == "all at once" and row["outside"] == 0
    assert row["difference"] == pytest.approx(10, abs=0.01) and row["at most"] == pytest.approx(10, abs=0.01)


def test_a_pasted_object_is_taken_from_the_hole_alone(scene: torch.Tensor, mask: torch.Tensor) -> None:
    case = bench.pasted(scene, mask, 0)
    known = (case.weight == 0).expand_as(scene)
    assert torch.equal(case.wanted[known], scene[known])
    assert float(case.weight.mean()) == pytest.approx(0.25 / 4, abs=0.01)
    rows = {(row["tone"], row["harmonize"]): row for row, _ in bench.harmonized(case)}
    assert len(rows) == 5 * len(bench.HARMONIES)
    assert all(row["outside"] == 0 for row in rows.values())
    assert all(rows["as it was", name]["error"] < 0.01 for name in bench.HARMONIES)
    assert rows["offset", "off"]["error"] > 7 and rows["offset", "both"]["error"] < 0.1
    assert rows["contrast", "both, covariance"]["error"] < 0.5 * rows["contrast", "both"]["error"]


@pytest.mark.parametrize("at_the_border", [False, True])
def test_only_the_box_blurs_see_an_object_and_only_at_the_border(
    scene: torch.Tensor, mask: torch.Tensor, at_the_border: bool
) -> None:
    mask = (torch.arange(96) < 48).expand(1, 1, 96, 96).float() if at_the_border else mask
    for row, removed in bench.filled(bench.pasted(scene, mask, 0), mask):
        assert removed.shape == scene.shape
        assert (row["of the object"] > 0.01) == (row["fill"] == "box blurs" and at_the_border), row


def test_a_crop_comes_back(scene: torch.Tensor, mask: torch.Tensor) -> None:
    for row in bench.cropped(scene, mask):
        assert row["outside"] == 0 and row["laid over: outside"] > 0


def test_means_add_up_what_is_outside() -> None:
    rows = [{"way": "a", "error": 1.0, "outside": 2, "outside, most": 3.0}] * 2
    assert bench.means(rows, "way") == [{"way": "a", "n": 2, "error": 1.0, "outside": 4, "outside, most": 3.0}]


def test_the_grid_is_as_wide_as_its_longest_row(scene: torch.Tensor, tmp_path: Path) -> None:
    bench.write_grid(tmp_path / "grid.png", [[scene[0]], [scene[0], scene[0]]])
    planes = np.asarray(Image.open(tmp_path / "grid.png"))
    assert planes.shape == (2 * bench.CELL, 2 * bench.CELL, 3) and (planes[: bench.CELL, bench.CELL :] == 255).all()
