"""The benchmark of edits: its cases are what they say, and its figures those of pictures whose answer is known."""

from __future__ import annotations

import pytest
import torch

from devtools.pack import pack_module

bench = pack_module("evaluation.bench_edits")
alignment = pack_module("imaging.alignment")


@pytest.fixture(scope="module")
def case():
    original = bench.load_pictures(1, 256)[0]
    return bench.drifted(original, original.flip(-1), 4)


def test_a_case_lies_over_its_original_where_its_drift_says(case):
    known = alignment.Alignment(case.scale, case.shift)
    moved, inside = alignment.aligned(case.edited, known, tuple(case.original.shape[-2:]))
    far = inside & ~case.changed
    here, before = (
        torch.corrcoef(torch.stack((of.mean(dim=0)[far], case.original.mean(dim=0)[far])))[0, 1]
        for of in (moved, case.edited)
    )
    assert here > 0.99 > before


def test_its_figures(case):
    found = {method: figures for method, figures, _ in bench.measure(case)}
    assert set(found) == set(bench.METHODS)
    assert found["the edit"]["touched"] > 90 and found["the edit"]["missed"] == 0
    assert found["Align Edit"]["off by"] < 0.2 and found["Align Edit"]["tone"] < 1
    assert found["Align Edit"]["touched"] == 0 == found["Align Edit"]["by"]
    assert found["Align Edit"]["missed"] < 1
