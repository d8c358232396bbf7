"""Morphology of masks against literal definitions: every pixel against every pixel. No host needed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from devtools.pack import pack_module

morphology = pack_module("imaging.morphology")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "grow": lambda mask: morphology.grow(mask, 2.3),
    "grow by nothing": lambda mask: morphology.grow(mask, 0),
    "shrink": lambda mask: morphology.shrink(mask, 1.5),
    "feather inside": lambda mask: morphology.feather(mask, 3, "inside"),
    "feather outside": lambda mask: morphology.feather(mask, 3, "outside", "smooth"),
    "feather centered": lambda mask: morphology.feather(mask, 3, "centered"),
    "feather nothing": lambda mask: morphology.feather(mask, 0),
    "opening": lambda mask: morphology.opening(mask, 1),
    "closing": lambda mask: morphology.closing(mask, 1.5),
    "stabilise": lambda mask: morphology.stabilise(mask, 1),
    "fill_holes": lambda mask: morphology.fill_holes(mask, 4),
    "remove_specks": lambda mask: morphology.remove_specks(mask, 3),
    "box": lambda mask: morphology.box(mask, 1),
    "convex_hull": lambda mask: morphology.convex_hull(mask),
    "distance_to_hole": lambda mask: morphology.distance_to_hole(mask, 3),
    "distance_to_known": lambda mask: morphology.distance_to_known(mask, 3),
    "bounding_boxes": lambda mask: morphology.bounding_boxes(mask),
}
FROM_MASK_TO_MASK = [name for name in OPERATIONS if not name.startswith(("distance", "bounding"))]

shapes = st.one_of(
    st.sampled_from([(1, 1), (1, 17), (17, 1), (7, 13), (13, 2)]), st.tuples(st.integers(1, 12), st.integers(1, 12))
)
radii = st.one_of(st.floats(0, 9), st.integers(0, 60).map(math.sqrt))


@st.composite
def binary_masks(draw: st.DrawFn, batch: int | None = None) -> torch.Tensor:
    pictures = batch or draw(st.integers(1, 3))
    height, width = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.03, 0.3, 0.7, 0.97, 1.0]))
    return (torch.rand(pictures, 1, height, width, generator=generator) < density).float()


@st.composite
def grey_masks(draw: st.DrawFn, batch: int | None = None) -> torch.Tensor:
    mask = draw(binary_masks(batch))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = torch.randint(0, 5, mask.shape, generator=generator) / 4.0
    return torch.where(torch.rand(mask.shape, generator=generator) < 0.5, mask, levels)


def squares_between(height: int, width: int) -> np.ndarray:
    """[H, W, H, W]: the squared distance of each pixel from each."""
    y, x = np.mgrid[:height, :width]
    return (y[:, :, None, None] - y) ** 2 + (x[:, :, None, None] - x) ** 2


def literal_distance(members: torch.Tensor) -> torch.Tensor:
    """For bool [B, 1, H, W]."""
    squares = squares_between(*members.shape[-2:]).astype(float)
    pictures = [np.where(picture, squares, np.inf).min(axis=(2, 3)) for picture in members[:, 0].numpy()]
    return torch.from_numpy(np.sqrt(np.stack(pictures))[:, None]).float()


def literal_grow(mask: torch.Tensor, pixels: float) -> torch.Tensor:
    near = np.sqrt(squares_between(*mask.shape[-2:])) <= abs(pixels)
    if pixels < 0:
        pictures = [np.where(near, picture, np.inf).min(axis=(2, 3)) for picture in mask[:, 0].numpy()]
    else:
        pictures = [np.where(near, picture, -np.inf).max(axis=(2, 3)) for picture in mask[:, 0].numpy()]
    return torch.from_numpy(np.stack(pictures)[:, None]).float()


def literal_parts(members: np.ndarray, diagonal: bool) -> list[set[tuple[int, int]]]:
    left = {(int(y), int(x)) for y, x in np.argwhere(members)}
    parts = []
    while left:
        part, front = set(), [left.pop()]
        while front:
            y, x = front.pop()
            part.add((y, x))
            for step_y in (-1, 0, 1):
                for step_x in (-1, 0, 1):
                    neighbour = (y + step_y, x + step_x)
                    if neighbour in left and (diagonal or 0 in (step_y, step_x)):
                        left.remove(neighbour)
                        front.append(neighbour)
        parts.append(part)
    return parts


def literal_hull(picture: np.ndarray) -> np.ndarray:
    """A pixel is outside if all others lie in less than half a turn, seen from it."""
    points = np.argwhere(picture > 0)
    hull = np.zeros(picture.shape)
    for y, x in np.ndindex(*picture.shape):
        rays = points - (y, x)
        cross = rays[:, None, 0] * rays[None, :, 1] - rays[:, None, 1] * rays[None, :, 0]
        dot = rays @ rays.T
        alone = ((cross > 0) | ((cross == 0) & (dot > 0))).all(axis=1).any()
        hull[y, x] = len(points) > 0 and not alone
    return hull


def picture_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[{"#": 1.0, ".": 0.0}[sign] for sign in row] for row in rows])[None, None]


@settings(max_examples=150, deadline=None)
@given(binary_masks(), st.one_of(radii, st.just(math.inf)))
def test_distances_are_exact_up_to_the_limit_and_infinite_beyond(mask: torch.Tensor, limit: float) -> None:
    for distance, members in (
        (morphology.distance_to_hole(mask, limit), mask > 0),
        (morphology.distance_to_known(mask, limit), mask == 0),
    ):
        expected = literal_distance(members)
        # Rounded to float32, a root may pass a limit that is that very root.
        beyond = (expected.double().square().round().sqrt() > limit) | expected.isinf()
        expected[beyond] = math.inf
        torch.testing.assert_close(distance, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("limit", [0.0, 1.0, 126.9, 127.0, 128.0, 300.0, math.inf])
def test_distances_in_a_large_picture_are_scipys(limit: float) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(2, 1, 331, 420)
    mask[0, 0, 40:60, 210:] = 1.0
    mask[1] = (torch.rand(1, 331, 420, generator=generator) < 0.0003).float()
    expected = np.stack([ndimage.distance_transform_edt(picture == 0) for picture in mask[:, 0].numpy()])[:, None]
    expected[expected > limit] = math.inf
    torch.testing.assert_close(morphology.distance_to_hole(mask, limit), torch.from_numpy(expected).float())
    known = morphology.distance_to_known(1.0 - mask, limit)
    torch.testing.assert_close(known, torch.from_numpy(expected).float())


def test_a_picture_without_hole_is_infinitely_far_from_one_and_the_border_is_not_known() -> None:
    empty, full = torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    assert morphology.distance_to_hole(empty).isinf().all()
    assert (morphology.distance_to_known(empty) == 0).all()
    assert morphology.distance_to_known(full).isinf().all()
    assert (morphology.distance_to_hole(full) == 0).all()


@settings(max_examples=150, deadline=None)
@given(binary_masks(), radii)
def test_growing_and_shrinking_a_binary_mask_is_the_literal_definition(mask: torch.Tensor, pixels: float) -> None:
    assert torch.equal(morphology.grow(mask, pixels), literal_grow(mask, pixels))
    assert torch.equal(morphology.grow(mask, -pixels), literal_grow(mask, -pixels))
    assert torch.equal(morphology.shrink(mask, pixels), literal_grow(mask, -pixels))


@settings(max_examples=150, deadline=None)
@given(grey_masks(), radii)
def test_growing_and_shrinking_a_grey_mask_is_the_literal_definition(mask: torch.Tensor, pixels: float) -> None:
    assert torch.equal(morphology.grow(mask, pixels), literal_grow(mask, pixels))
    assert torch.equal(morphology.shrink(mask, pixels), literal_grow(mask, -pixels))


@settings(max_examples=60, deadline=None)
@given(binary_masks(batch=1), radii)
def test_the_way_for_grey_masks_agrees_with_the_way_for_binary_ones(mask: torch.Tensor, pixels: float) -> None:
    # One grey pixel in another picture of the batch sends all of it the way of grey masks.
    grey = torch.zeros_like(mask)
    grey[..., 0, 0] = 0.5
    together = torch.cat((mask, grey))
    assert torch.equal(morphology.grow(together, pixels)[:1], morphology.grow(mask, pixels))
    assert torch.equal(morphology.shrink(together, pixels)[:1], morphology.shrink(mask, pixels))


@pytest.mark.parametrize(
    ("radius", "count"),
    [
        (0, 1),
        (0.99, 1),
        (1, 5),
        (1.41, 5),
        (math.sqrt(2), 9),
        (2, 13),
        (2.23, 13),
        (math.sqrt(5), 21),
        (3, 29),
        (5, 81),
        (10, 317),
    ],
)
@pytest.mark.parametrize("value", [1.0, 0.25])
def test_a_pixel_grows_to_the_disc_of_the_circle_problem(radius: float, count: int, value: float) -> None:
    mask = torch.zeros(1, 1, 25, 25)
    mask[..., 12, 12] = value
    grown = morphology.grow(mask, radius)
    assert (grown == value).sum() == count
    assert (grown > 0).sum() == count


@settings(max_examples=60, deadline=None)
@given(grey_masks(), radii, radii)
def test_a_larger_radius_never_gives_less_and_shrinking_mirrors_growing(
    mask: torch.Tensor, one: float, other: float
) -> None:
    small, large = sorted((one, other))
    assert (morphology.grow(mask, small) <= morphology.grow(mask, large)).all()
    assert (morphology.shrink(mask, small) >= morphology.shrink(mask, large)).all()
    assert (morphology.shrink(mask, small) <= mask).all() and (mask <= morphology.grow(mask, small)).all()
    assert torch.equal(morphology.shrink(mask, one), 1.0 - morphology.grow(1.0 - mask, one))


@settings(max_examples=80, deadline=None)
@given(grey_masks(), st.floats(0, 4))
def test_opening_takes_away_and_closing_adds_and_once_is_enough(mask: torch.Tensor, pixels: float) -> None:
    opened, closed = morphology.opening(mask, pixels), morphology.closing(mask, pixels)
    assert torch.equal(opened, literal_grow(literal_grow(mask, -pixels), pixels))
    assert torch.equal(closed, literal_grow(literal_grow(mask, pixels), -pixels))
    assert (opened <= mask).all() and (mask <= closed).all()
    assert torch.equal(morphology.opening(opened, pixels), opened)
    assert torch.equal(morphology.closing(closed, pixels), closed)


def test_stabilising_removes_specks_first_and_then_bridges_gaps() -> None:
    mask = torch.zeros(1, 1, 20, 30)
    mask[..., 4:16, 3:14] = 1.0
    mask[..., 4:16, 15:26] = 1.0
    mask[..., 1, 28] = 1.0
    mask[..., 1, 26] = 1.0
    stable = morphology.stabilise(mask, 1.5)
    assert stable[..., 6:14, 3:26].all()
    assert not stable[..., :3, 20:].any()
    assert morphology.closing(mask, 1.5)[..., 1, 27].all()


@pytest.mark.parametrize("shape", ["box", "convex hull"])
def test_specks_and_whiskers_are_gone_before_the_shape_is_taken(shape: str) -> None:
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 10:30, 10:30] = 1.0
    mask[..., 18:22, 18:22] = 0.0
    expected = torch.zeros(1, 1, 40, 40)
    expected[..., 10:30, 10:30] = 1.0
    mask[..., 2, 2] = mask[..., 20, 30:38] = 1.0
    cleaned = morphology.clean(mask, specks=4, islands=16, smooth=1.5, shape=shape)
    # Smoothing rounds the corners of a hull.
    reference = expected if shape == "box" else morphology.opening(expected, 1.5)
    assert torch.equal(cleaned, reference)
    assert torch.equal(morphology.clean(mask), mask)
    assert not morphology.clean(mask, specks=4, islands=15)[..., 18:22, 18:22].any()
    with pytest.raises(ValueError, match="shape needs to be one of as it is, box, convex hull"):
        morphology.clean(mask, shape="round")


def test_nothing_grows_in_from_the_border_and_nothing_is_eroded_there() -> None:
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., :, :4] = 1.0
    shrunk = torch.zeros(1, 1, 9, 9)
    shrunk[..., :, :2] = 1.0
    assert torch.equal(morphology.shrink(mask, 2), shrunk)
    assert torch.equal(morphology.shrink(mask * 0.5, 2), shrunk * 0.5)
    assert torch.equal(morphology.opening(mask, 2), mask)
    assert not morphology.grow(torch.zeros(1, 1, 5, 5), 3).any()
    assert torch.equal(
        morphology.feather(mask, 2, "inside")[0, 0, 0], torch.tensor([1.0, 1, 0.75, 0.25, 0, 0, 0, 0, 0])
    )


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("outside", [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1, 1, 1]),
        ("inside", [0, 0, 0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]),
        ("centered", [0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]),
    ],
)
def test_the_ramp_at_a_straight_edge(where: str, values: list[float]) -> None:
    mask = torch.zeros(1, 1, 3, 12)
    mask[..., 6:] = 1.0
    linear = torch.tensor(values).expand(1, 1, 3, 12)
    assert torch.equal(morphology.feather(mask, 4, where), linear)
    assert torch.equal(morphology.feather(mask, 4, where, "linear"), linear)
    smooth = 3 * linear**2 - 2 * linear**3
    torch.testing.assert_close(morphology.feather(mask, 4, where, "smooth"), smooth)


@settings(max_examples=120, deadline=None)
@given(
    grey_masks(),
    st.floats(0.1, 12),
    st.sampled_from(["inside", "outside", "centered"]),
    st.sampled_from(["linear", "smooth"]),
)
def test_the_ramp_follows_the_true_distance_from_the_edge(
    mask: torch.Tensor, pixels: float, where: str, curve: str
) -> None:
    hole = mask > 0
    depth = torch.where(hole, literal_distance(~hole) - 0.5, 0.5 - literal_distance(hole))
    start = {"inside": 0.0, "outside": -pixels, "centered": -pixels / 2}[where]
    ramp = ((depth - start) / pixels).clamp(0, 1)
    if curve == "smooth":
        ramp = 3 * ramp**2 - 2 * ramp**3
    feathered = morphology.feather(mask, pixels, where, curve)
    torch.testing.assert_close(feathered, ramp, rtol=1e-5, atol=1e-5)
    assert (feathered[depth < start - 1e-3] == 0.0).all()
    assert (feathered[depth > start + pixels + 1e-3] == 1.0).all()
    if where == "inside":
        assert (feathered[~hole] == 0.0).all() and (feathered[hole] > 0.0).all()
    if where == "outside":
        assert (feathered[hole] == 1.0).all()


def test_no_ramp_leaves_the_mask_as_it_is() -> None:
    mask = 0.02 + 0.98 * torch.rand(2, 1, 6, 5)
    for where in ("inside", "outside", "centered"):
        assert torch.equal(morphology.feather(mask, 0, where, "smooth"), mask)


@settings(max_examples=150, deadline=None)
@given(binary_masks(), st.sampled_from([None, 0, 1, 2, 3, 7, 1000]))
def test_islands_up_to_the_area_are_filled(mask: torch.Tensor, largest_area: int | None) -> None:
    height, width = mask.shape[-2:]
    expected = mask.clone()
    for picture in expected[:, 0].numpy():
        for part in literal_parts(picture == 0, diagonal=False):
            at_border = any(y in (0, height - 1) or x in (0, width - 1) for y, x in part)
            if not at_border and (largest_area is None or len(part) <= largest_area):
                picture[tuple(np.array(list(part)).T)] = 1.0
    assert torch.equal(morphology.fill_holes(mask, largest_area), expected)


@settings(max_examples=150, deadline=None)
@given(binary_masks(), st.sampled_from([0, 1, 2, 3, 7, 1000]))
def test_parts_smaller_than_the_area_vanish(mask: torch.Tensor, smallest_area: int) -> None:
    expected = mask.clone()
    for picture in expected[:, 0].numpy():
        for part in literal_parts(picture > 0, diagonal=True):
            if len(part) < smallest_area:
                picture[tuple(np.array(list(part)).T)] = 0.0
    assert torch.equal(morphology.remove_specks(mask, smallest_area), expected)


def test_all_islands_are_what_scipy_fills() -> None:
    generator = torch.Generator().manual_seed(11)
    mask = (torch.rand(1, 1, 60, 50, generator=generator) < 0.6).float()
    expected = ndimage.binary_fill_holes(mask[0, 0].numpy())
    assert expected.sum() > mask.sum()
    assert torch.equal(morphology.fill_holes(mask)[0, 0], torch.from_numpy(expected).float())


def test_a_speck_goes_with_its_soft_edge_and_what_stays_keeps_its_grey() -> None:
    mask = torch.zeros(1, 1, 7, 12)
    mask[..., 2:5, 1:4] = 0.4
    mask[..., 3, 2] = 0.9
    mask[..., :, 6:] = 0.3
    mask[..., 1:6, 7:11] = 0.8
    expected = mask.clone()
    expected[..., 2:5, 1:4] = 0.0
    assert torch.equal(morphology.remove_specks(mask, 10), expected)
    assert torch.equal(morphology.remove_specks(mask, 9), mask)


def test_an_island_is_filled_with_its_soft_rim_and_other_grey_stays() -> None:
    mask = torch.ones(1, 1, 9, 9)
    mask[..., 2:5, 2:5] = 0.2
    mask[..., 3, 3] = 0.0
    mask[..., 7, 7] = 0.7
    mask[..., 0, 7] = 0.1
    expected = mask.clone()
    expected[..., 2:5, 2:5] = 1.0
    assert torch.equal(morphology.fill_holes(mask, 1), expected)
    assert torch.equal(morphology.fill_holes(mask, 0), mask)


@settings(max_examples=100, deadline=None)
@given(grey_masks(), st.one_of(st.integers(0, 5), st.floats(0, 5)))
def test_boxes_hold_every_pixel_above_0_and_the_padding(mask: torch.Tensor, padding: float) -> None:
    boxes = morphology.bounding_boxes(mask)
    filled = morphology.box(mask, padding)
    assert boxes.dtype == torch.int64 and boxes.shape == (mask.shape[0], 4)
    for picture, corners, drawn in zip(mask[:, 0], boxes.tolist(), filled[:, 0], strict=True):
        points = (picture > 0).nonzero()
        expected = torch.zeros_like(picture)
        if len(points) == 0:
            assert corners == [0, 0, 0, 0]
        else:
            (top, left), (bottom, right) = points.amin(dim=0).tolist(), points.amax(dim=0).tolist()
            assert corners == [left, top, right + 1, bottom + 1]
            for y, x in np.ndindex(*picture.shape):
                inside = top - padding <= y <= bottom + padding and left - padding <= x <= right + padding
                expected[y, x] = float(inside)
        assert torch.equal(drawn, expected)


def test_every_pixel_above_the_noise_counts_for_box_and_hull() -> None:
    mask = torch.full((1, 1, 5, 6), 2 / 255)
    mask[..., 1, 2] = 3 / 255
    mask[..., 1, 4] = 1.0
    assert morphology.bounding_boxes(mask).tolist() == [[2, 1, 5, 2]]
    expected = torch.zeros(1, 1, 5, 6)
    expected[..., 1, 2:5] = 1.0
    assert torch.equal(morphology.box(mask), expected)
    assert torch.equal(morphology.convex_hull(mask), expected)


@settings(max_examples=150, deadline=None)
@given(grey_masks())
def test_the_hull_is_the_literal_one(mask: torch.Tensor) -> None:
    hull = morphology.convex_hull(mask)
    for drawn, picture in zip(hull[:, 0], mask[:, 0], strict=True):
        assert torch.equal(drawn, torch.from_numpy(literal_hull(picture.numpy())).float())
    assert (hull[mask > 0] == 1.0).all()
    assert torch.equal(morphology.convex_hull(hull), hull)


def test_a_hull_drawn_by_hand() -> None:
    corners = picture_of(
        "........",
        ".#......",
        "........",
        "........",
        ".#.....#",
    )
    triangle = picture_of(
        "........",
        ".#......",
        ".###....",
        ".#####..",
        ".#######",
    )
    assert torch.equal(morphology.convex_hull(corners), triangle)
    assert torch.equal(morphology.convex_hull(corners.flip(2)), triangle.flip(2))
    assert torch.equal(morphology.convex_hull(corners.flip(3)), triangle.flip(3))


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_picture_of_a_batch_is_for_itself(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    pictures = [torch.zeros(1, 1, 11, 9), torch.ones(1, 1, 11, 9), torch.zeros(1, 1, 11, 9), torch.zeros(1, 1, 11, 9)]
    pictures[2][..., 10, 0] = 1.0
    pictures[3][..., 2:7, 3:9] = 1.0
    pictures[3][..., 4, 5] = 0.0
    pictures.append((torch.rand(1, 1, 11, 9, generator=generator) < 0.2).float())
    together = OPERATIONS[name](torch.cat(pictures))
    alone = torch.cat([OPERATIONS[name](picture) for picture in pictures])
    assert torch.equal(together, alone)
    assert len(together) == len(pictures)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("grey", [False, True])
def test_the_given_mask_is_neither_changed_nor_handed_back(name: str, grey: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(2, 1, 9, 8, generator=generator)
    if not grey:
        mask = mask.round()
    before = mask.clone()
    result = OPERATIONS[name](mask)
    result.fill_(7)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_kind_of_tensor_gives_the_same_mask_on_its_device(name: str, device: str) -> None:
    generator = torch.Generator().manual_seed(8)
    mask = (torch.rand(2, 1, 9, 8, generator=generator) < 0.4).float()
    expected = OPERATIONS[name](mask)
    with_nan = torch.where(mask > 0, mask, torch.nan)
    for given_mask in (mask, mask[:, 0], mask.bool(), mask.half(), mask.double(), with_nan, mask.repeat(1, 3, 1, 1)):
        result = OPERATIONS[name](given_mask.to(device))
        assert result.device.type == device
        assert result.dtype == (torch.int64 if name == "bounding_boxes" else torch.float32)
        assert torch.equal(result.cpu(), expected)
    assert torch.equal(OPERATIONS[name](mask[0, 0]), expected[:1])


@pytest.mark.parametrize("name", FROM_MASK_TO_MASK)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 13)])
def test_empty_stays_empty_and_full_stays_full(name: str, shape: tuple[int, int]) -> None:
    empty = torch.zeros(1, 1, *shape)
    full = torch.ones(1, 1, *shape)
    assert torch.equal(OPERATIONS[name](empty), empty)
    if name != "remove_specks" or full.sum() >= 3:
        assert torch.equal(OPERATIONS[name](full), full)


@settings(max_examples=60, deadline=None)
@given(grey_masks(), st.sampled_from(FROM_MASK_TO_MASK))
def test_masks_stay_masks(mask: torch.Tensor, name: str) -> None:
    result = OPERATIONS[name](mask)
    assert result.shape == mask.shape
    assert result.min() >= 0.0 and result.max() <= 1.0


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda mask: morphology.grow(mask, math.nan), ["pixels", "finite", "nan"]),
        (lambda mask: morphology.grow(mask, math.inf), ["pixels", "finite", "inf"]),
        (lambda mask: morphology.shrink(mask, math.nan), ["pixels", "finite", "nan"]),
        (lambda mask: morphology.feather(mask, -1), ["pixels", "0 or more", "-1"]),
        (lambda mask: morphology.feather(mask, math.nan), ["pixels", "finite", "nan"]),
        (lambda mask: morphology.feather(mask, math.inf), ["pixels", "finite", "inf"]),
        (lambda mask: morphology.feather(mask, 2, "centre"), ["where", "inside, outside, centered", "'centre'"]),
        (lambda mask: morphology.feather(mask, 0, "inside", "round"), ["curve", "linear, smooth", "'round'"]),
        (lambda mask: morphology.opening(mask, -2), ["pixels", "0 or more", "-2"]),
        (lambda mask: morphology.closing(mask, -2), ["pixels", "0 or more", "-2"]),
        (lambda mask: morphology.stabilise(mask, -2), ["pixels", "0 or more", "-2"]),
        (lambda mask: morphology.stabilise(mask, math.nan), ["pixels", "0 or more", "nan"]),
        (lambda mask: morphology.fill_holes(mask, -1), ["largest_area", "0 or more", "-1"]),
        (lambda mask: morphology.fill_holes(mask, math.nan), ["largest_area", "0 or more", "nan"]),
        (lambda mask: morphology.remove_specks(mask, -1), ["smallest_area", "0 or more", "-1"]),
        (lambda mask: morphology.clean(mask, specks=-1), ["remove_specks", "0 or more", "-1"]),
        (lambda mask: morphology.clean(mask, islands=math.nan), ["fill_islands", "finite", "nan"]),
        (lambda mask: morphology.clean(mask, smooth=math.inf), ["smooth", "finite", "inf"]),
        (lambda mask: morphology.box(mask, -1), ["padding", "0 or more", "-1"]),
        (lambda mask: morphology.box(mask, math.inf), ["padding", "finite", "inf"]),
        (lambda mask: morphology.distance_to_hole(mask, -1), ["limit", "0 or more", "-1"]),
        (lambda mask: morphology.distance_to_known(mask, math.nan), ["limit", "0 or more", "nan"]),
    ],
)
def test_a_senseless_number_or_option_is_refused_in_one_sentence(
    call: Callable[[torch.Tensor], torch.Tensor], names: list[str]
) -> None:
    with pytest.raises(ValueError) as refused:
        call(torch.ones(1, 1, 4, 4))
    message = str(refused.value)
    assert all(name in message for name in names), message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(4,), (1, 1, 1, 4, 4), (0, 4, 4), (1, 4, 0)])
def test_what_is_no_mask_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mask"):
        OPERATIONS[name](torch.ones(shape))
