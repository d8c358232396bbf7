"""Poisson blending against an exact sparse solve, written pixel by pixel from equation 7 of the paper. No host needed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module

pytestmark = pytest.mark.quick

poisson = pack_module("imaging.poisson")

LEVEL = 1 / 255


def exact_blend(source: np.ndarray, destination: np.ndarray, inside: np.ndarray, mixed: bool) -> np.ndarray:
    """Equation 7 for one channel [H, W], assembled literally and solved directly; not clamped."""
    height, width = inside.shape
    pixels = [(y, x) for y in range(height) for x in range(width) if inside[y, x]]
    number = {pixel: index for index, pixel in enumerate(pixels)}
    matrix = scipy.sparse.lil_matrix((len(pixels), len(pixels)))
    right_side = np.zeros(len(pixels))
    for (y, x), row in number.items():
        for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if not (0 <= neighbour[0] < height and 0 <= neighbour[1] < width):
                continue
            guide = source[y, x] - source[neighbour]
            other = destination[y, x] - destination[neighbour]
            if mixed and abs(other) > abs(guide):
                guide = other
            matrix[row, row] += 1
            right_side[row] += guide
            if inside[neighbour]:
                matrix[row, number[neighbour]] -= 1
            else:
                right_side[row] += destination[neighbour]
    result = destination.copy()
    if pixels:
        result[tuple(np.array(pixels).T)] = scipy.sparse.linalg.spsolve(matrix.tocsc(), right_side)
    return result


def exact_batch(source: torch.Tensor, destination: torch.Tensor, mask: torch.Tensor, mixed: bool) -> torch.Tensor:
    result = destination.double().clone()
    for index in np.ndindex(*source.shape[:2]):
        one, other = source[index].double().numpy(), destination[index].double().numpy()
        inside = (mask[index[0], 0] > 0.5).numpy()
        solved = torch.from_numpy(exact_blend(one, other, inside, mixed))
        result[index] = torch.where(mask[index[0], 0] > 0.5, solved.clamp(0, 1), result[index])
    return result


def pictures(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of moderate contrast: most exact solutions stay within [0, 1], so that the clamp hides no error."""
    generator = torch.Generator().manual_seed(seed)
    source, destination = 0.35 + 0.3 * torch.rand(2, *shape, generator=generator)
    return source, destination


def blob(size: int, share: float, seed: int) -> torch.Tensor:
    """An irregular hole [1, 1, size, size] of several components that covers `share` of the picture."""
    generator = torch.Generator().manual_seed(seed)
    height = torch.zeros(1, 1, size, size)
    for cells, weight in ((4, 1.0), (16, 0.5), (64, 0.2)):
        noise = torch.randn(1, 1, cells, cells, generator=generator)
        height += weight * F.interpolate(noise, size=(size, size), mode="bicubic")
    return (height > height.flatten().quantile(1 - share)).float()


def drawn(*rows: str) -> torch.Tensor:
    return torch.tensor([[float(mark == "#") for mark in row] for row in rows])[None, None]


HOLES = {
    "one pixel": drawn(".....", "..#..", "....."),
    "one pixel in the corner": drawn("#...", "....", "...."),
    "all four corners": drawn("##..#", "#...#", ".....", "#...#", "##.##"),
    "several components": drawn("#..##..", "..#...#", ".###..#", "..#....", "....##."),
    "ring": drawn(".......", ".#####.", ".#...#.", ".#.#.#.", ".#...#.", ".#####.", "......."),
    "checkerboard": drawn("#.#.#.", ".#.#.#", "#.#.#.", ".#.#.#"),
    "all but a corner": drawn("#####", "#####", "####."),
    "all but the middle": drawn("#####", "##.##", "#####"),
    "from border to border": drawn("..###..", "..###..", "..###..", "..###.."),
    "one row": drawn(".####..##"),
    "one row, open end": drawn("####....#"),
    "one column": drawn("#", "#", ".", "#", "#", "#", "."),
    "two pixels": drawn("#."),
    "snake": drawn("########.", ".......#.", ".#######.", ".#.......", ".########"),
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", HOLES)
def test_it_solves_the_equation_exactly(name: str, mixed: bool) -> None:
    mask = HOLES[name]
    source, destination = pictures(1, 1, 3, *mask.shape[2:])
    exact = exact_batch(source, destination, mask, mixed)
    blended = poisson.poisson_blend(source, destination, mask, mixed, tolerance=1e-5)
    assert (blended - exact).abs().max() < 2e-5
    doubled = poisson.poisson_blend(source.double(), destination.double(), mask, mixed, tolerance=1e-10)
    assert (doubled - exact).abs().max() < 1e-10


@st.composite
def jobs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    seed = draw(st.integers(0, 2**31))
    source, destination = pictures(seed, batch, channels, height, width)
    density = draw(st.sampled_from([0.1, 0.5, 0.9]))
    mask = (torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(seed)) < density).float()
    mask[:, 0, draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = 0
    return source, destination, mask


@settings(max_examples=60, deadline=None)
@given(jobs(), st.booleans())
def test_any_size_and_hole(job: tuple[torch.Tensor, torch.Tensor, torch.Tensor], mixed: bool) -> None:
    source, destination, mask = job
    blended = poisson.poisson_blend(source, destination, mask, mixed)
    assert (blended - exact_batch(source, destination, mask, mixed)).abs().max() < 0.5 * LEVEL
    outside = (mask <= 0.5).expand_as(destination)
    assert torch.equal(blended[outside], destination[outside])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_quarter_of_a_larger_picture(mixed: bool) -> None:
    mask = blob(256, 0.25, seed=3)
    source, destination = pictures(2, 1, 1, 256, 256)
    # Another tone, brighter to one side: what the solver has to carry from the edge into the middle.
    source = source + 0.25 * torch.linspace(-1, 1, 256)
    exact = exact_batch(source, destination, mask, mixed)
    blended = poisson.poisson_blend(source, destination, mask, mixed)
    assert (source - exact)[mask > 0.5].abs().max() > 40 * LEVEL
    assert (blended - exact).abs().max() < 0.5 * LEVEL


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(1 - F.pad(torch.ones(1, 1, 1, 1), (0, 200, 0, 200)), id="all but a corner"),
        pytest.param(1 - F.pad(torch.ones(1, 1, 201, 1), (0, 200)), id="all but one side"),
        pytest.param(1 - F.pad(torch.ones(1, 1, 1, 1), (0, 999)), id="a long row"),
        pytest.param(blob(220, 0.5, seed=17), id="half of it"),
    ],
)
def test_few_steps_meet_the_tolerance_however_far_the_edge_is(
    mask: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = pictures(4, 1, 3, *mask.shape[2:])
    fine = poisson.poisson_blend(source.double(), destination.double(), mask, mixed=True, tolerance=1e-9)
    # It takes 6 to 9; conjugate gradients without a coarse grid take hundreds.
    monkeypatch.setattr(poisson, "MAX_STEPS", 10)
    coarse = poisson.poisson_blend(source, destination, mask, mixed=True)
    assert (coarse - fine).abs().max() < 0.5 * LEVEL


def test_another_tone_vanishes() -> None:
    mask = blob(64, 0.3, seed=5)
    destination, _ = pictures(6, 1, 3, 64, 64)
    tone = torch.tensor([0.2, -0.15, 0.1]).reshape(1, 3, 1, 1)
    blended = poisson.poisson_blend(destination + tone, destination, mask, tolerance=1e-5)
    assert (blended - destination).abs().max() < 2e-5


def test_a_linear_change_of_light_vanishes_in_a_hole_inside_the_picture() -> None:
    mask = F.pad(blob(41, 0.3, seed=7), (1, 1, 1, 1))
    destination, _ = pictures(8, 1, 3, 43, 43)
    light = 0.004 * torch.arange(43) - 0.003 * torch.arange(43)[:, None]
    blended = poisson.poisson_blend(destination + light, destination, mask, tolerance=1e-5)
    assert (blended - destination).abs().max() < 2e-5


def test_mixing_keeps_the_destinations_line_under_a_flat_source() -> None:
    destination = torch.full((1, 1, 16, 16), 0.8)
    destination[..., 8] = 0.2
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:13, 3:13] = 1
    source = torch.full_like(destination, 0.5)
    assert (poisson.poisson_blend(source, destination, mask, mixed=True) - destination).abs().max() < LEVEL
    assert (poisson.poisson_blend(source, destination, mask) - destination).abs().max() > 0.1


@pytest.mark.parametrize("mixed", [False, True])
def test_the_sources_far_pixels_do_not_matter(mixed: bool) -> None:
    mask = F.pad(torch.ones(1, 1, 6, 5), (4, 5, 3, 6))
    source, destination = pictures(9, 1, 3, 15, 14)
    near = F.max_pool2d(mask, 3, 1, 1) > 0.5
    elsewhere = torch.where(near, source, torch.rand_like(source))
    assert torch.equal(
        poisson.poisson_blend(source, destination, mask, mixed),
        poisson.poisson_blend(elsewhere, destination, mask, mixed),
    )


def test_no_hole_gives_the_destination_and_a_whole_one_the_source() -> None:
    source, destination = pictures(10, 2, 3, 9, 7)
    mask = torch.stack((torch.zeros(1, 9, 7), torch.ones(1, 9, 7)))
    blended = poisson.poisson_blend(source, destination, mask)
    assert torch.equal(blended, torch.stack((destination[0], source[1])))


def test_each_picture_of_a_batch_is_for_itself() -> None:
    source, destination = pictures(11, 3, 3, 33, 20)
    mask = (torch.rand(3, 1, 33, 20) < torch.tensor([0.1, 0.5, 0.9]).reshape(3, 1, 1, 1)).float()
    mask[0, :, 10:] = 0
    together = poisson.poisson_blend(source, destination, mask)
    alone = [poisson.poisson_blend(source[i : i + 1], destination[i : i + 1], mask[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_a_batch_of_one_goes_with_every_picture() -> None:
    source, destination = pictures(12, 2, 3, 12, 12)
    mask = blob(12, 0.4, seed=1)
    blended = poisson.poisson_blend(source, destination[:1], mask[0, 0])
    repeated = poisson.poisson_blend(source, destination[:1].repeat(2, 1, 1, 1), mask.repeat(2, 1, 1, 1))
    assert torch.equal(blended, repeated)
    assert not torch.equal(blended[0], blended[1])


def test_the_hole_is_where_the_mask_is_above_its_noise() -> None:
    source, destination = pictures(13, 1, 3, 10, 10)
    grey = torch.where(torch.rand(1, 1, 10, 10) < 0.5, 0.02 + 0.98 * torch.rand(1, 1, 10, 10), 2 / 255)
    assert torch.equal(
        poisson.poisson_blend(source, destination, grey),
        poisson.poisson_blend(source, destination, (grey > 0.01).float()),
    )


def test_values_are_clamped_inside_the_hole_only() -> None:
    destination = torch.full((1, 1, 8, 8), 1.5)
    source = torch.rand(1, 1, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    blended = poisson.poisson_blend(source, destination, mask)
    assert blended[mask > 0.5].max() == 1.0
    assert (blended[mask <= 0.5] == 1.5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_keep_their_type(dtype: torch.dtype) -> None:
    source, destination = (picture.to(dtype) for picture in pictures(14, 1, 3, 20, 20))
    mask = blob(20, 0.4, seed=2)
    blended = poisson.poisson_blend(source, destination, mask)
    assert blended.dtype == dtype
    precise = poisson.poisson_blend(source.float(), destination.float(), mask)
    assert torch.equal(blended, torch.where(mask > 0.5, precise.to(dtype), destination))


def test_the_inputs_are_not_changed() -> None:
    given = (*pictures(15, 2, 3, 16, 16), blob(16, 0.4, seed=3))
    before = [tensor.clone() for tensor in given]
    blended = poisson.poisson_blend(*given, mixed=True)
    blended.zero_()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(given, before, strict=True))


def good() -> dict[str, torch.Tensor]:
    source, destination = pictures(16, 1, 3, 6, 6)
    return {"source": source, "destination": destination, "mask": blob(6, 0.4, seed=4)}


@pytest.mark.parametrize("name", ["source", "destination"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    job = good()
    job[name][0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"^The {name} .*NaN or infinite.*\.$"):
        poisson.poisson_blend(**job)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": torch.rand(3, 6, 6)}, r"source must be a picture \[B, C, H, W\].*\[3, 6, 6\]"),
        ({"destination": torch.ones(1, 3, 6, 6, dtype=torch.uint8)}, r"destination must be a picture.*uint8"),
        ({"source": torch.rand(1, 3, 6, 5)}, r"\[3, 6, 5\].*differ; resize"),
        ({"mask": torch.ones(1, 1, 7, 6)}, r"\[7, 6\] differ; resize"),
        ({"source": torch.rand(1, 4, 6, 6)}, r"\[4, 6, 6\].*differ"),
        (
            {"source": torch.rand(2, 3, 6, 6), "mask": torch.ones(3, 6, 6)},
            r"2 in 'source', 1 in 'destination', 3 in 'mask'; each has to",
        ),
        ({"tolerance": 0.0}, r"tolerance.*above 0"),
        ({"tolerance": float("nan")}, r"tolerance.*above 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        poisson.poisson_blend(**{**good(), **changed})
    assert "\n" not in str(refused.value)


def test_a_tolerance_out_of_reach_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"stopped after \d+ steps .* pixels far outside of 0 to 1") as refused:
        poisson.poisson_blend(**{**good(), "tolerance": 1e-30})
    assert "\n" not in str(refused.value)
