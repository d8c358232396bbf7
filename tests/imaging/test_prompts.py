"""Points and boxes as graphs hand them around: what is read, and what is refused in one sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devtools.pack import pack_module

pytestmark = pytest.mark.quick

prompts = pack_module("imaging.prompts")

BOX = {"x": 3, "y": 5, "width": 10, "height": 20}
CORNERS = (3.0, 5.0, 13.0, 25.0)
OTHER, OTHER_CORNERS = {"x": 0.5, "y": 1, "width": 2, "height": 2, "score": 0.9}, (0.5, 1.0, 2.5, 3.0)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**40), 2**40)


@given(st.lists(st.fixed_dictionaries({"x": NUMBERS, "y": NUMBERS})))
def test_points_are_read_as_they_were_written(points) -> None:
    assert prompts.parse_points(json.dumps(points), "include") == [(p["x"], p["y"]) for p in points]


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_no_text_is_no_point(text) -> None:
    assert prompts.parse_points(text, "include") == []


@pytest.mark.parametrize(
    "text",
    [
        "12, 30",
        "[[1, 2]]",
        '{"x": 1, "y": 2}',
        '[{"x": 1}]',
        '[{"x": "1", "y": 2}]',
        '[{"x": NaN, "y": 2}]',
        '[{"x": true, "y": 2}]',
        f'[{{"x": 1{"0" * 400}, "y": 2}}]',
        "[1]",
        "[{",
        "null",
        "x" * 500,
    ],
)
def test_other_texts_are_refused(text) -> None:
    with pytest.raises(ValueError, match=r"^'include' is .*a list of points such as") as caught:
        prompts.parse_points(text, "include")
    assert len(str(caught.value)) < 240


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        (None, [[], [], []]),
        (BOX, [[CORNERS]] * 3),
        ([BOX, OTHER], [[CORNERS, OTHER_CORNERS]] * 3),
        ([[BOX], [], [OTHER, BOX]], [[CORNERS], [], [OTHER_CORNERS, CORNERS]]),
        ([[BOX], [OTHER]], [[CORNERS], [OTHER_CORNERS], [OTHER_CORNERS]]),
        ([], [[], [], []]),
        ([[]], [[], [], []]),
    ],
    ids=["none", "one", "list", "for each", "fewer", "empty", "none found"],
)
def test_the_hosts_formats_of_boxes(boxes, expected) -> None:
    assert prompts.parse_boxes(boxes, 3, "boxes") == expected


@pytest.mark.parametrize(
    "boxes", ["[]", 5, [1], [[1]], [BOX, [BOX]], {"x": 1, "y": 2}, [{**BOX, "width": float("nan")}]]
)
def test_other_boxes_are_refused(boxes) -> None:
    with pytest.raises(
        ValueError, match=r"^'boxes' (is|has) .*a box \{x, y, width, height\} in pixels, a list of them, or"
    ):
        prompts.parse_boxes(boxes, 2, "boxes")


def test_drawn_boxes_are_a_text_of_boxes() -> None:
    assert prompts.parse_drawn(json.dumps([BOX, OTHER]), "drawn") == [CORNERS, OTHER_CORNERS]
    assert prompts.parse_drawn("", "drawn") == prompts.parse_drawn(" []", "drawn") == []
    for text in ("nothing", json.dumps(BOX), json.dumps([[BOX]]), "[1]", "[{"):
        with pytest.raises(ValueError, match=r"^'drawn' (is|has) .*, but a list of boxes such as \[\{"):
            prompts.parse_drawn(text, "drawn")


def test_boxes_without_area_and_for_other_pictures_are_refused() -> None:
    with pytest.raises(
        ValueError, match="'boxes' has a box of 10x0 pixels, but its width and height have to be above 0"
    ):
        prompts.parse_boxes({**BOX, "height": 0}, 1, "boxes")
    with pytest.raises(ValueError, match="'boxes' has boxes for 2 pictures, but 'image' is a batch of 1: connect"):
        prompts.parse_boxes([[BOX], [BOX]], 1, "boxes")


@pytest.mark.parametrize(("point", "inside"), [((0, 0), True), ((9, 4), True), ((9.9, 4.9), True), ((10, 0), False)])
def test_points_count_from_the_upper_left_pixel(point, inside) -> None:
    if inside:
        prompts.check_inside([point], 10, 5, "include")
    else:
        with pytest.raises(ValueError, match=r"the point \(10, 0\), which lies outside of the picture of 10x5"):
            prompts.check_inside([(1, 1), point], 10, 5, "include")


def test_a_box_has_a_part_in_the_picture() -> None:
    prompts.check_touching([(-5, -5, 1, 1), (9, 4, 20, 20), (-3, -3, 50, 50)], 10, 5, "boxes")
    for box in ((-5, 0, 0, 3), (0, -5, 3, 0), (10, 0, 12, 3), (0, 5, 3, 9)):
        with pytest.raises(ValueError, match=r"'boxes' has the box .* outside of the picture of 10x5 pixels"):
            prompts.check_touching([(0, 0, 1, 1), box], 10, 5, "boxes")


def test_marks_are_read_from_the_inputs_that_have_them() -> None:
    marks = prompts.parse_marks('[{"x": 9, "y": 0}]', '[{"x": 0, "y": 4}]', json.dumps([BOX]), 10, 6)
    assert (marks.include, marks.exclude, marks.drawn) == ([(9.0, 0.0)], [(0.0, 4.0)], [CORNERS])
    assert prompts.parse_marks("", None, "[]", 1, 1) == prompts.Marks([], [], [])
    outside, beside = '[{"x": 10, "y": 0}]', json.dumps([{**BOX, "x": 10}])
    for name, texts in {
        "include": (outside, "", ""),
        "exclude": ("", outside, ""),
        "drawn": ("", "", beside),
    }.items():
        with pytest.raises(ValueError, match=rf"^'{name}' has .* outside of the picture of 10x6 pixels"):
            prompts.parse_marks(*texts, 10, 6)
        with pytest.raises(ValueError, match=rf"^'{name}' is '12, 30', but a list of"):
            prompts.parse_marks(*("12, 30" if text else "" for text in texts), 10, 6)


@given(st.tuples(*[st.floats(-1e6, 1e6)] * 2, *[st.floats(1e-3, 1e6)] * 2))
def test_a_box_is_left_top_right_bottom(numbers) -> None:
    x, y, width, height = numbers
    written = dict(zip(("x", "y", "width", "height"), numbers, strict=True))
    ((box,),) = prompts.parse_boxes(written, 1, "boxes")
    assert box == (x, y, x + width, y + height)
    again = prompts.as_bounding_box(box)
    assert again == pytest.approx(written, rel=1e-9, abs=1e-9)
