"""DreamMix's literal form against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from truefill_testing.literal_dreammix import (
    box_blur,
    composite_weight,
    local_box,
    pooled_mask,
    released_fill,
    substituted,
    substituted_pooled,
    two_stages,
    weighted_loss,
)

pytestmark = pytest.mark.quick


def _hole(size: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    hole = np.zeros(size, dtype=bool)
    hole[rows, columns] = True
    return hole


@pytest.mark.parametrize(
    ("size", "rows", "columns", "k", "box"),
    [
        # 19 rows on, so int(1.15 * 9) = 10 about 49.
        pytest.param((100, 100), slice(40, 60), slice(45, 55), 0.0, (39, 39, 60, 60), id="middle"),
        # From 21 by 21 in turns to 49 by 49; then the width, then the height.
        pytest.param((100, 100), slice(40, 60), slice(45, 55), 0.5, (24, 24, 75, 75), id="middle-grown"),
        # 21 by 21 is 0.21; 0.22 takes the width to 23 first.
        pytest.param((50, 100), slice(10, 30), slice(45, 55), 0.22, (38, 9, 61, 30), id="tie-width"),
        # int(1.15 * 4) = 4 about row 4 would lose row 9.
        pytest.param((40, 100), slice(0, 10), slice(0, 5), 0.0, (0, 0, 7, 10), id="corner"),
        # The right edge alone, a pixel at a time; at 40 by 40 the height is full.
        pytest.param((40, 100), slice(0, 10), slice(0, 5), 0.5, (0, 0, 50, 40), id="corner-grown"),
        pytest.param((40, 100), slice(0, 10), slice(0, 5), 1.0, (0, 0, 100, 40), id="whole"),
        pytest.param((20, 20), slice(10, 12), slice(7, 8), 0.0, (7, 10, 8, 12), id="two-pixels"),
        pytest.param((20, 20), slice(19, 20), slice(19, 20), 0.1, (18, 18, 20, 20), id="last-pixel"),
    ],
)
def test_box(size: tuple[int, int], rows: slice, columns: slice, k: float, box: tuple[int, int, int, int]) -> None:
    assert local_box(_hole(size, rows, columns), k) == box


def test_box_holds_the_hole_and_its_share() -> None:
    for rows in range(1, 18):
        for top in (0, 3, 30 - rows):
            left, upper, right, lower = local_box(_hole((30, 40), slice(top, top + rows), slice(5, 9)), 0.3)
            assert upper <= top and lower >= top + rows and left <= 5 and right >= 9
            assert lower - upper >= 0.3 * 30 and right - left >= 0.3 * 40
            assert 0 <= left and 0 <= upper and right <= 40 and lower <= 30


def test_weight_falls_over_the_feather() -> None:
    weight = composite_weight(_hole((40, 40), slice(0, 1), slice(0, 1)), 32)
    for d, expected in ((0, 255), (1, 248), (2, 240), (31, 8), (32, 0), (33, 0)):
        assert weight[0, d] == weight[d, 0] == weight[d, d] == expected / 255
    assert weight[3, 7] == (256 - 56) / 255
    weight = composite_weight(_hole((1, 12), slice(0, 1), slice(4, 6)), 4)
    np.testing.assert_allclose(weight[0] * 255, [0, 64, 128, 192, 255, 255, 192, 128, 64, 0, 0, 0])
    assert composite_weight(np.zeros((3, 3), dtype=bool), 32).sum() == 0
    for feather in (0, 1):
        hole = _hole((5, 6), slice(1, 3), slice(2, 4))
        assert (composite_weight(hole, feather) == hole).all()


def test_blur_repeats_the_edge() -> None:
    line = np.array([0.0, 3.0, 6.0])[None, :, None]
    np.testing.assert_allclose(box_blur(line, 1)[0, :, 0], [1, 3, 5])
    np.testing.assert_allclose(box_blur(line, 2)[0, :, 0], [9 / 5, 3, 21 / 5])
    square = np.zeros((3, 3, 1))
    square[0, 0] = 9
    np.testing.assert_allclose(box_blur(square, 1)[:, :, 0], [[4, 2, 0], [2, 1, 0], [0, 0, 0]])


def test_fill_knows_its_surroundings_and_forgets_the_hole() -> None:
    picture = np.tile(np.array([0.25, 0.5, 1.0]), (9, 12, 1))
    hole = _hole((9, 12), slice(3, 6), slice(4, 9))
    with_rubbish = picture.copy()
    with_rubbish[hole] = 7.0
    np.testing.assert_allclose(released_fill(with_rubbish, hole), picture, atol=1e-3)
    assert (released_fill(with_rubbish, hole)[~hole] == picture[~hole]).all()
    # A picture that is all hole is only blurred.
    assert (released_fill(with_rubbish, np.zeros((9, 12), dtype=bool)) == with_rubbish).all()


def test_pool_takes_any_pixel() -> None:
    hole = _hole((17, 20), slice(7, 9), slice(16, 17))
    assert pooled_mask(hole).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert pooled_mask(_hole((17, 20), slice(16, 17), slice(3, 4))).tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert pooled_mask(hole, 1).tolist() == hole.tolist()


def test_substitution_in_the_plane() -> None:
    tokens = np.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    along_x, diagonal, nothing = np.array([2.0, 0.0]), np.array([1.0, 1.0]), np.zeros(2)
    assert substituted(tokens, [1], [along_x], 1.0, False).tolist() == [[3, 4], [0, 4], [3, 4]]
    assert substituted(tokens, [1], [along_x], 0.5, False)[1].tolist() == [1.5, 4]
    # (3, 4) -> (0, 4) -> (-2, 2) one after another; the other way (-0.5, 0.5) -> (0, 0.5); the plane is all there is.
    np.testing.assert_allclose(substituted(tokens, [1], [along_x, diagonal], 1.0, False)[1], [-2, 2])
    np.testing.assert_allclose(substituted(tokens, [1], [diagonal, along_x], 1.0, False)[1], [0, 0.5])
    np.testing.assert_allclose(substituted(tokens, [1], [along_x, diagonal], 1.0, True)[1], [0, 0], atol=1e-12)
    np.testing.assert_allclose(substituted(tokens, [1], [along_x, diagonal], 0.5, True)[1], [1.5, 2])
    for jointly in (False, True):
        for attributes in ([], [nothing]):
            assert (substituted(tokens, [0, 1, 2], attributes, 1.0, jointly) == tokens).all()
        assert substituted(tokens, [0], [nothing, along_x], 1.0, jointly)[0] == pytest.approx([0, 4])
    assert substituted_pooled(tokens[0], along_x, 1.0).tolist() == [0, 4]


def test_substitution_is_orthogonal() -> None:
    random = np.random.default_rng(0)
    tokens, e = random.normal(size=(5, 8)), random.normal(size=(3, 8))
    one = substituted(tokens, range(1, 4), [e[0]], 1.0, False)
    np.testing.assert_allclose(one[1:4] @ e[0], 0, atol=1e-12)
    assert (one[[0, 4]] == tokens[[0, 4]]).all()
    # Of three attributes one depends on the others.
    attributes = [e[0], e[1], 3 * e[0] - e[1]]
    joint = substituted(tokens, range(1, 4), attributes, 1.0, True)
    np.testing.assert_allclose(joint[1:4] @ np.stack(attributes).T, 0, atol=1e-12)
    np.testing.assert_allclose(joint, substituted(tokens, range(1, 4), attributes[:2], 1.0, True), atol=1e-12)
    last = substituted(tokens, range(1, 4), attributes, 1.0, False)
    np.testing.assert_allclose(last[1:4] @ attributes[-1], 0, atol=1e-12)


def test_loss_weighs_the_hole() -> None:
    error = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert float(weighted_loss(error, mask)) == pytest.approx((1.5 * 4 + 0.7 * 6) / 4)
    assert float(weighted_loss(error, mask, inside=1.0, outside=0.0)) == 1.0


class World:
    """A latent is the mean of each cell, an x0 the stage's number; the calls are kept."""

    def __init__(self) -> None:
        self.height, self.width = 20, 12
        self.picture = torch.rand(20, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        # In the whole picture it touches cells of rows 0 and 1, in the crop, of twice the size, rows 0 to 2.
        self.hole = torch.from_numpy(_hole((20, 12), slice(6, 10), slice(2, 6)))
        self.box = (1, 4, 11, 15)
        self.crop_size = (22, 20)
        self.noises = (torch.full((3, 3, 3), 0.5).double(), torch.full((3, 3, 2), -0.25).double())
        self.calls: list[tuple[torch.Tensor, float, str]] = []

    @staticmethod
    def encode(picture: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(picture.permute(2, 0, 1), 8)

    @staticmethod
    def decode(latent: torch.Tensor) -> torch.Tensor:
        return latent.repeat_interleave(8, 1).repeat_interleave(8, 2).permute(1, 2, 0)

    @staticmethod
    def resize(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(picture.permute(2, 0, 1)[None], size=size, mode="nearest")[0].permute(1, 2, 0)

    def denoise(self, x: torch.Tensor, sigma: float, stage: str) -> torch.Tensor:
        self.calls.append((x, sigma, stage))
        return torch.full_like(x, 2.0 if stage == "local" else 3.0)

    @staticmethod
    def euler(x: torch.Tensor, x0: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        return x + (x - x0) / sigma * (following - sigma)

    @staticmethod
    def fill(picture: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
        return picture.masked_fill(hole[:, :, None], 0.5)

    def run(
        self, switch: int, feather: int = 0, background: str = "intermediate"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls.clear()
        return two_stages(
            self.picture,
            self.hole,
            self.box,
            self.crop_size,
            self.encode,
            self.decode,
            self.resize,
            self.denoise,
            [4.0, 2.0, 1.0, 0.0],
            switch,
            self.noises,
            self.euler,
            feather,
            background,
            self.fill,
        )


@pytest.mark.parametrize("switch", [0, 1, 2, 3])
def test_stages_share_the_steps(switch: int) -> None:
    world = World()
    final, intermediate = world.run(switch)
    stages = ["local"] * switch + ["global"] * (3 - switch)
    assert [(sigma, stage) for _, sigma, stage in world.calls] == list(zip([4.0, 2.0, 1.0], stages, strict=True))
    assert [x.shape for x, _, stage in world.calls if stage == "local"] == [(3, 3, 3)] * switch
    assert (final[~world.hole] == world.picture[~world.hole]).all()
    torch.testing.assert_close(
        final[world.hole], torch.full_like(final[world.hole], 2.0 if switch == 3 else 3.0), rtol=0, atol=1e-12
    )
    if switch == 0:
        assert intermediate is None
    else:
        assert intermediate is not None
        assert (intermediate[~world.hole] == world.picture[~world.hole]).all()
        # x0, not x: nothing of the noise is left.
        assert (intermediate[world.hole] == 2.0).all()


def test_local_stage_starts_at_the_filled_crop() -> None:
    world = World()
    world.run(2)
    # The 11 by 10 crop doubled to 22 by 20 and continued to 24 by 24; its hole is rows 4 to 11, columns 2 to 9.
    crop = world.picture[4:15, 1:11].clone()
    crop[2:6, 1:5] = 0.5
    crop = crop.repeat_interleave(2, 0).repeat_interleave(2, 1)
    crop = torch.cat([crop, crop[-1:], crop[-1:]], dim=0)
    crop = torch.cat([crop, *[crop[:, -1:]] * 4], dim=1)
    z = World.encode(crop)
    first, second = world.calls[0][0], world.calls[1][0]
    torch.testing.assert_close(first, z + 4 * 0.5)
    # The hole's cells half the way from there to 2, the others at half the noise.
    hole = torch.zeros(3, 3, dtype=torch.bool)
    hole[:2, :2] = True
    torch.testing.assert_close(second, torch.where(hole, (z + 2 + 2) / 2, z + 2 * 0.5))


@pytest.mark.parametrize("background", ["intermediate", "original"])
@pytest.mark.parametrize("switch", [0, 1, 2])
def test_background_of_the_global_stage(background: str, switch: int) -> None:
    world = World()
    _, intermediate = world.run(switch, feather=8, background=background)
    start = world.fill(world.picture, world.hole) if intermediate is None else intermediate

    def latent(picture: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([picture, *[picture[-1:]] * 4], dim=0)
        return World.encode(torch.cat([whole, *[whole[:, -1:]] * 4], dim=1))

    sigma = [4.0, 2.0, 1.0][switch]
    hole = torch.tensor([[True, False], [True, False], [False, False]])
    known = latent(start if background == "intermediate" else world.picture)
    torch.testing.assert_close(
        world.calls[switch][0], torch.where(hole, latent(start), known) + sigma * world.noises[1]
    )
    # Switched, the feather has changed pixels of known cells, so the two backgrounds differ.
    assert torch.equal(latent(start)[:, ~hole], latent(world.picture)[:, ~hole]) == (switch == 0)


@pytest.mark.parametrize("switch", [1, 3])
def test_composite_is_feathered_in_the_box(switch: int) -> None:
    world = World()
    _, intermediate = world.run(switch, feather=4)
    assert intermediate is not None
    # Left of the hole, at column 2, the box ends at column 1. Row 8's cell of the crop is the hole's, 2.
    row, original = intermediate[8], world.picture[8]
    w = 192 / 255
    torch.testing.assert_close(row[1], 2 * w + original[1] * (1 - w))
    assert torch.equal(row[0], original[0])
    assert torch.equal(intermediate[:4], world.picture[:4]) and torch.equal(intermediate[13:], world.picture[13:])
