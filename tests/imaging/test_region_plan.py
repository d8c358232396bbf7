"""The geometry of regions around holes, up to 8K, without any picture. No host needed."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module
from truefill_testing.regions import one_sentence, sliced

pytestmark = pytest.mark.quick

region_plan = pack_module("imaging.region_plan")
Box, Settings = region_plan.Box, region_plan.RegionSettings


@st.composite
def rules(draw: st.DrawFn) -> Any:
    return Settings(
        native_size=draw(st.sampled_from([512, 768, 1024])),
        multiple=draw(st.sampled_from([8, 64])),
        context_percent=draw(st.sampled_from([0, 7, 12.5, 50, 300])),
        context_pixels=draw(st.integers(0, 100)),
        min_side=draw(st.sampled_from([1, 31, 128, 1024])),
        max_aspect=draw(st.sampled_from([1, 1.2, 2, 3.5, 50])),
        max_upscale=draw(st.sampled_from([1, 1.005, 1.3, 2, 8])),
    )


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Any], tuple[int, int]]:
    """The boxes of a batch, None among them, and the size of its pictures."""
    height, width = draw(st.tuples(*[st.one_of(st.integers(1, 40), st.integers(1, 8192))] * 2))

    def span(limit: int) -> tuple[int, int]:
        start = draw(st.integers(0, limit - 1))
        return start, draw(st.integers(start + 1, limit))

    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        (top, bottom), (left, right) = span(height), span(width)
        boxes.append(draw(st.sampled_from([Box(left, top, right, bottom)] * 3 + [None])))
    return boxes, (height, width)


def context_of(box: Any, size: tuple[int, int], rule: Any) -> Any:
    """The definition, written once more: the larger of percent and pixels, on each side, as far as the picture goes."""
    down = max(rule.context_pixels, math.ceil(Fraction(rule.context_percent) * (box.bottom - box.top) / 100))
    across = max(rule.context_pixels, math.ceil(Fraction(rule.context_percent) * (box.right - box.left) / 100))
    return Box(
        max(0, box.left - across),
        max(0, box.top - down),
        min(size[1], box.right + across),
        min(size[0], box.bottom + down),
    )


@settings(max_examples=400, deadline=None)
@given(layouts(), rules())
def test_every_box_holds_its_context_and_stays_in_the_picture_if_it_can(layout: Any, rule: Any) -> None:
    holes, size = layout
    plan = region_plan.plan(holes, size, rule)
    assert len(plan.boxes) == len(holes)
    assert {(box.height, box.width) for box in plan.boxes} == {plan.box_size}
    assert plan.box_size[0] >= min(rule.min_side, size[0]) and plan.box_size[1] >= min(rule.min_side, size[1])
    for hole, box in zip(holes, plan.boxes, strict=True):
        context = context_of(hole, size, rule) if hole else None
        for axis, limit in enumerate(size):
            start, stop = box[1 - axis], box[3 - axis]
            if stop - start > limit:
                # It reaches out on both sides alike.
                assert start <= 0 and stop >= limit and abs(-start - (stop - limit)) <= 1
            else:
                assert 0 <= start and stop <= limit
            if context:
                assert start <= context[1 - axis] and stop >= context[3 - axis]
            # Centred on the context, or on the picture without one, where no border is in the way.
            if 0 < start and stop < limit:
                middle = context[1 - axis] + context[3 - axis] if context else limit
                assert abs(start + stop - middle) <= 1


@settings(max_examples=400, deadline=None)
@given(layouts(), rules())
def test_the_crop_is_of_whole_multiples_within_the_aspect_and_never_enlarged_further_than_asked(
    layout: Any, rule: Any
) -> None:
    plan = region_plan.plan(*layout, rule)
    for new, old, scale in zip(plan.size, plan.box_size, plan.scale, strict=True):
        assert new >= rule.multiple and new % rule.multiple == 0
        assert scale == new / old
        # Not in floating point: 1.3 as it was typed.
        assert new <= Fraction(str(rule.max_upscale)) * old
    cap = Fraction(str(rule.max_aspect))
    assert max(plan.size) <= cap * min(plan.size)
    # The box in the picture is rounded up to whole pixels.
    assert max(plan.box_size) < cap * min(plan.box_size) + 1
    # One scale for both sides, but for that rounding.
    (vertical, horizontal), (tall, wide) = plan.scale, plan.box_size
    assert abs(vertical / horizontal - 1) <= 1 / (min(tall, wide) - 1 or 0.5)


@settings(max_examples=400, deadline=None)
@given(layouts(), rules())
def test_the_native_area_is_met_unless_the_upscaling_is_limited(layout: Any, rule: Any) -> None:
    plan = region_plan.plan(*layout, rule)
    # What a side may be off: half a multiple by rounding, one by the aspect cap, or up to one by avoiding to resample.
    slack = (1 + 1.5 * rule.multiple / plan.size[0]) * (1 + 1.5 * rule.multiple / plan.size[1]) * 1.02
    area = plan.size[0] * plan.size[1]
    # A side can't be shorter than the multiple, however thin the region is.
    assert area <= slack * rule.native_size**2 or min(plan.size) == rule.multiple
    allowed = math.prod((side - 1) * rule.max_upscale for side in plan.box_size)
    assert area * slack >= min(rule.native_size**2, allowed)


@pytest.mark.parametrize("native", [512, 768, 1024])
@pytest.mark.parametrize("aspect", [1, 1.5, 2])
@pytest.mark.parametrize("side", [100, 333, 700, 1500, 4000])
def test_the_native_area_is_met_within_a_few_percent(native: int, aspect: float, side: int) -> None:
    hole = Box(9000, 9000, 9000 + round(side * aspect), 9000 + side)
    plan = region_plan.plan([hole], (32000, 32000), Settings(native_size=native, max_upscale=100))
    assert plan.size[0] * plan.size[1] == pytest.approx(native**2, rel=0.06)
    assert plan.size[1] / plan.size[0] == pytest.approx(aspect, rel=0.05)


@settings(max_examples=300, deadline=None)
@given(st.integers(40, 1100), st.integers(40, 1100), st.sampled_from([512, 1024]), st.sampled_from([1, 1.005, 1.5, 4]))
@example(1023, 1023, 1024, 4)
@example(1030, 1030, 1024, 4)
@example(515, 515, 512, 4)
@example(507, 507, 512, 4)
def test_less_than_one_percent_is_never_resampled(height: int, width: int, native: int, limit: float) -> None:
    plan = region_plan.plan([Box(0, 0, width, height)], (height, width), sliced(native_size=native, max_upscale=limit))
    wanted = min(native / math.sqrt(height * width), limit)
    if 0.99 <= wanted <= 1.01:
        assert plan.size == plan.box_size
    if plan.size != plan.box_size:
        assert not all(0.99 <= scale <= 1.01 for scale in plan.scale)


@pytest.mark.parametrize(
    ("side", "multiple", "limit", "box", "size"),
    [
        (1023, 64, 4, 1024, 1024),  # one pixel more instead of resampling
        (1020, 64, 4, 1024, 1024),
        (1030, 8, 4, 1032, 1032),
        (1030, 64, 4, 1030, 1024),  # 58 pixels more would not be a few
        (1000, 8, 4, 1000, 1024),
        (2048, 8, 4, 2048, 1024),
        (256, 8, 4, 256, 1024),
        (100, 8, 4, 100, 400),
        (100, 64, 4, 112, 448),
        (100, 64, 1, 128, 128),
        (100, 8, 1, 104, 104),
    ],
)
def test_sizes_that_can_be_checked_by_hand(side: int, multiple: int, limit: float, box: int, size: int) -> None:
    hole = Box(3000, 3000, 3000 + side, 3000 + side)
    plan = region_plan.plan([hole], (8192, 8192), sliced(native_size=1024, multiple=multiple, max_upscale=limit))
    assert plan.box_size == (box, box) and plan.size == (size, size)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (48, 40, 72, 60)),  # 24 x 20
        ({"context_pixels": 4}, (44, 36, 76, 64)),
        ({"context_percent": 50}, (36, 30, 84, 70)),
        ({"context_percent": 50, "context_pixels": 11}, (36, 29, 84, 71)),  # the larger of both, side by side
        ({"context_percent": 1}, (47, 39, 73, 61)),
        ({"min_side": 40}, (40, 30, 80, 70)),
        ({"max_aspect": 1}, (48, 38, 72, 62)),
        ({"max_aspect": 1.2}, (48, 40, 72, 60)),  # 1.2 as a fraction: 24 x 20 has just that aspect
        ({"min_side": 1000}, (0, 0, 200, 100)),  # no more than there is
        ({"context_pixels": 45}, (3, 0, 117, 100)),  # only what is there above and below
    ],
)
def test_the_region_before_it_is_rounded_to_the_target(change: Any, expected: tuple[int, int, int, int]) -> None:
    # Enlarged eightfold, every region is of whole multiples as it is.
    rule = sliced(**{"max_upscale": 8, "max_aspect": 50, **change})
    plan = region_plan.plan([Box(48, 40, 72, 60)], (100, 200), rule)
    assert plan.boxes == (Box(*expected),)
    assert plan.scale == (8, 8)


@pytest.mark.parametrize(
    ("hole", "expected"),
    [
        (Box(0, 0, 1, 1), Box(0, 0, 16, 16)),
        (Box(59, 49, 60, 50), Box(44, 34, 60, 50)),
        (Box(30, 0, 32, 2), Box(23, 0, 39, 16)),
        (Box(58, 20, 60, 22), Box(44, 13, 60, 29)),
    ],
)
def test_at_the_border_the_region_is_shifted_into_the_picture(hole: Any, expected: Any) -> None:
    plan = region_plan.plan([hole], (50, 60), sliced(min_side=16))
    assert plan.boxes == (expected,) and plan.padding == (0, 0, 0, 0)


def test_only_a_region_larger_than_the_picture_reaches_out_of_it() -> None:
    plan = region_plan.plan([Box(0, 0, 61, 50)], (50, 61), sliced())
    assert plan.boxes == (Box(-2, -3, 62, 53),)
    assert plan.padding == (3, 3, 2, 1)


def test_the_largest_hole_sets_the_size_and_no_hole_gives_the_centre() -> None:
    holes = [Box(0, 0, 8, 40), None, Box(60, 90, 84, 96)]
    plan = region_plan.plan(holes, (100, 100), sliced())
    assert plan.boxes == (Box(0, 0, 24, 40), Box(38, 30, 62, 70), Box(60, 60, 84, 100))
    assert region_plan.plan([None, None], (96, 64), sliced(min_side=16)).boxes == (Box(0, 0, 64, 96),) * 2


def test_the_sides_are_rounded_to_the_nearest_multiple_at_the_native_area() -> None:
    # 1000 x 1100 at the area of 1024 squared: 976.3 x 1074.0.
    plan = region_plan.plan([Box(0, 0, 1100, 1000)], (8192, 8192), sliced(native_size=1024))
    assert plan.size == (976, 1072)


@pytest.mark.parametrize(
    ("hole", "limit", "box", "size"),
    [
        ((60, 60), 8, (64, 128), (512, 1024)),  # extended to the aspect
        ((60, 60), 2, (256, 512), (512, 1024)),  # and further, not to be enlarged more than twice
        ((4000, 1000), 8, (4000, 8000), (512, 1024)),
        ((510, 1020), 8, (512, 1024), (512, 1024)),
    ],
)
def test_a_forced_size_is_met_without_distortion(
    hole: tuple[int, int], limit: float, box: tuple[int, int], size: tuple[int, int]
) -> None:
    where = Box(3000, 2000, 3000 + hole[1], 2000 + hole[0])
    plan = region_plan.plan([where], (8192, 16384), sliced(forced_size=size, max_upscale=limit, min_side=64))
    assert plan.box_size == box and plan.size == size


@settings(max_examples=150, deadline=None)
@given(layouts(), rules(), st.sampled_from([(512, 512), (64, 1024), (768, 512)]))
def test_a_forced_size_keeps_every_other_promise(layout: Any, rule: Any, size: tuple[int, int]) -> None:
    holes, picture = layout
    rule = Settings(**{**vars(rule), "forced_size": size})
    plan = region_plan.plan(holes, picture, rule)
    assert plan.size == size
    for hole, box in zip(holes, plan.boxes, strict=True):
        if hole:
            context = context_of(hole, picture, rule)
            assert all(a <= b for a, b in zip(box[:2], context[:2], strict=True))
            assert all(a >= b for a, b in zip(box[2:], context[2:], strict=True))
    assert all(new <= Fraction(str(rule.max_upscale)) * old for new, old in zip(size, plan.box_size, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "need"),
    [
        ("multiple", 0, "positive multiple of 8"),
        ("multiple", 12, "positive multiple of 8"),
        ("native_size", 7, "at least the multiple, 8"),
        ("context_percent", -1, "0 or more"),
        ("context_percent", float("nan"), "0 or more"),
        ("context_pixels", -1, "0 or more"),
        ("min_side", 0, "1 or more"),
        ("max_aspect", 0.5, "1 or more"),
        ("max_aspect", float("inf"), "finite"),
        ("max_upscale", 0.9, "1 or more"),
        ("forced_size", (512, 513), "multiples of 8"),
        ("forced_size", (0, 512), "multiples of 8"),
        ("forced_size", (512,), "multiples of 8"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any, need: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*{need}") as refused:
        Settings(**{name: value})
    assert one_sentence(refused)


@pytest.mark.parametrize(
    ("boxes", "size"),
    [
        ([], (8, 8)),
        ([None], (0, 8)),
        ([Box(0, 0, 8, 9)], (8, 8)),
        ([Box(0, -1, 8, 4)], (8, 8)),
        ([Box(4, 4, 8, 4)], (8, 8)),
    ],
)
def test_boxes_that_fit_no_picture_are_refused(boxes: Any, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"pixel") as refused:
        region_plan.plan(boxes, size, Settings())
    assert one_sentence(refused)


def literal_zoom_in(left: int, top: int, right: int, bottom: int, width: int, height: int) -> tuple[float, ...]:
    """LAR-Gen, section 3.1: the box times 1.3 about its centre, clamped, made square on the longer side, clamped again."""
    x, y, w, h = (left + right) / 2, (top + bottom) / 2, 1.3 * (right - left), 1.3 * (bottom - top)
    x0, x1 = max(x - w / 2, 0), min(x + w / 2, width)
    y0, y1 = max(y - h / 2, 0), min(y + h / 2, height)
    side = max(x1 - x0, y1 - y0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return max(x - side / 2, 0), max(y - side / 2, 0), min(x + side / 2, width), min(y + side / 2, height)


@given(data=st.data(), width=st.integers(64, 900), height=st.integers(64, 900))
def test_zoom_in_is_lar_gens_square(data: st.DataObject, width: int, height: int) -> None:
    """It holds what LAR-Gen's has, to a pixel, is a square at the native size, and is no larger than it has to be."""
    left, top = data.draw(st.integers(0, width - 10)), data.draw(st.integers(0, height - 10))
    right, bottom = data.draw(st.integers(left + 10, width)), data.draw(st.integers(top + 10, height))
    made = region_plan.plan([Box(left, top, right, bottom)], (height, width), Settings.zoom_in(512))
    (box,) = made.boxes
    assert made.size[0] == made.size[1] and box.width == box.height
    theirs = literal_zoom_in(left, top, right, bottom, width, height)
    side = max(theirs[2] - theirs[0], theirs[3] - theirs[1])
    assert side - 1 <= box.width < side + 10
    # Near a border ours is moved into the picture, where theirs is cut and padded: it sees as much and more.
    assert box.left <= theirs[0] + 1 and box.top <= theirs[1] + 1
    assert box.right >= theirs[2] - 1 and box.bottom >= theirs[3] - 1
    # Within a cell of the native size nothing is resampled.
    assert made.size == (512, 512) or (made.size == made.box_size and abs(made.size[0] - 512) < 16)
