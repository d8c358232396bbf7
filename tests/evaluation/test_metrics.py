"""The benchmark's measures against literal versions and against pictures whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module

metrics = pack_module("evaluation.metrics")


@pytest.mark.parametrize(("successes", "count"), [(0, 20), (1, 20), (13, 37), (500, 500), (261, 500)])
def test_wilson_is_scipys(successes, count):
    expected = scipy.stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert metrics.wilson_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_needs_a_share(successes, count):
    with pytest.raises(ValueError, match="A share needs"):
        metrics.wilson_interval(successes, count)


def test_mean_interval_is_the_normal_approximation():
    values = [0.0, 1.0, 1.0, 0.5, 4.0]
    mean, low, high = metrics.mean_interval(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx(scipy.stats.norm.interval(0.95, mean, error), abs=1e-6)
    assert metrics.mean_interval([2.0]) == (2.0, 2.0, 2.0)


def test_background_error_sees_one_level_in_one_pixel_outside_only():
    scene = torch.rand(2, 3, 9, 7)
    hole = torch.zeros(2, 1, 9, 7)
    hole[:, :, 2:5, 3:6] = 1.0
    result = torch.where(hole > 0, torch.rand_like(scene), scene)
    assert metrics.background_error(result, scene, hole) == 0.0
    result[1, 2, 8, 0] += 1 / 255
    assert metrics.background_error(result, scene, hole) == pytest.approx(1.0, abs=1e-4)
    assert metrics.background_error(result, scene, torch.ones_like(hole)) == 0.0


def literal_seam(result: np.ndarray, scene: np.ndarray, hole: np.ndarray) -> float:
    """Pair by pair."""
    _, height, width = result.shape
    jumps = []
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0)):
                if y + dy < height and x + dx < width and hole[y, x] != hole[y + dy, x + dx]:
                    ours = np.abs(result[:, y, x] - result[:, y + dy, x + dx]).mean()
                    theirs = np.abs(scene[:, y, x] - scene[:, y + dy, x + dx]).mean()
                    jumps.append(255 * (ours - theirs))
    return float(np.mean(jumps))


def test_seam_visibility_is_the_literal_one():
    generator = torch.Generator().manual_seed(0)
    scene, made = (torch.rand(3, 3, 12, 10, generator=generator) for _ in range(2))
    hole = (torch.rand(3, 1, 12, 10, generator=generator) > 0.6).float()
    result = torch.where(hole > 0, made, scene)
    expected = [literal_seam(result[i].numpy(), scene[i].numpy(), hole[i, 0].numpy()) for i in range(3)]
    torch.testing.assert_close(
        metrics.seam_visibility(result, scene, hole), torch.tensor(expected), atol=1e-3, rtol=1e-4
    )


def test_seam_visibility_of_a_tone_shift_is_the_shift():
    scene, hole = torch.full((1, 3, 16, 16), 0.25), torch.zeros(1, 1, 16, 16)
    hole[:, :, 4:12, 4:12] = 1.0
    assert metrics.seam_visibility(scene, scene, hole).item() == 0.0
    shifted = scene + hole * 10 / 255
    assert metrics.seam_visibility(shifted, scene, hole).item() == pytest.approx(10.0, abs=1e-3)
    assert metrics.seam_visibility(scene, scene, torch.zeros_like(hole)).isnan().all()


@settings(deadline=None)
@given(st.data())
def test_the_square_holds_the_hole_and_lies_in_the_picture(data):
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    hole = torch.zeros(height, width)
    hole[top:bottom, left:right] = 1.0
    x, y, side = metrics.square_around(hole)
    assert 0 <= x and 0 <= y and x + side <= width and y + side <= height
    assert side == min(max(bottom - top, right - left), height, width)
    if side >= max(bottom - top, right - left):
        assert x <= left and y <= top and x + side >= right and y + side >= bottom


def test_the_square_is_centred_where_there_is_room():
    hole = torch.zeros(40, 60)
    hole[10:14, 20:32] = 1.0
    assert metrics.square_around(hole) == (20, 6, 12)
    with pytest.raises(ValueError, match="no hole"):
        metrics.square_around(torch.zeros(4, 4))
