"""The region benchmark's rows say what is true of pictures whose answer is known."""

from __future__ import annotations

import pytest

from devtools.pack import pack_module

bench = pack_module("evaluation.bench_region")


@pytest.fixture(scope="module")
def quality():
    return {(row["shift"], row["harmonize"]): row for row in bench.quality()}


def test_nothing_changes_outside_of_the_hole(quality):
    assert len(quality) == 12
    assert all(row["outside_max_error"] == 0.0 for row in quality.values())


def test_a_tone_shift_goes(quality):
    for shift in ("constant", "linear"):
        assert quality[shift, "off"]["inside_error"] > 2
        assert quality[shift, "poisson"]["inside_error"] < 0.1
    assert quality["constant", "color"]["inside_error"] < 0.1
    for shift in ("constant", "linear", "texture"):
        assert quality[shift, "both"]["seam"] < 0.1 * quality[shift, "off"]["seam"]


def test_an_unchanged_crop_comes_back():
    rows = bench.identity()
    assert rows[0]["scale"] == [1.0, 1.0] and rows[0]["max_error"] == 0.0
    for row in rows[1:]:
        assert row["outside_max_error"] == 0.0 and 0 < row["max_error"] < row["resampled_max_error"]


def test_an_edge_moves_by_as_many_pixels_as_asked_for():
    for row in bench.growth():
        assert row["along"] == row["pixels"]
        if row["method"] == "ours":
            assert abs(row["diagonal"] - row["pixels"]) < 2**0.5
        else:
            assert row["diagonal"] > 1.3 * row["pixels"]


def test_memory_goes_by_the_tile():
    rows = {row["tile"]: row for row in bench.upscaler_memory((512, 1024))}
    # The weights of the real upscaler in half precision: 473 M of the UNet (the rest is what a tile takes).
    weights = 2 * 473e6 / 2**30
    assert weights < rows[512]["sampling"] < rows[1024]["sampling"]
    assert rows[1024]["sampling"] > 3 * (rows[512]["sampling"] - weights)
    for row in rows.values():
        assert 0 < row["decoding"] < row["sampling"]
    assert bench.upscaler_memory((512,)) == [rows[512]]


def test_every_operation_is_timed(capsys):
    rows = bench.speed([64], 2, 1)
    assert {row["operation"] for row in rows} >= {"grow 16", "crop", "stitch", "poisson", "color"}
    assert all(row["seconds"] >= 0 and row["batch"] == 2 for row in rows)
    pack_module("evaluation.tables").show_table("Seconds", rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 3
