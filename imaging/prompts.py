"""Points and boxes that say where something is, in the formats in which graphs hand them around.

Points are the text `[{"x": 12, "y": 34}, ...]` that the host's SAM3_Detect takes. Boxes are its BOUNDING_BOX: one
{"x", "y", "width", "height"} for all pictures, a list of them for all pictures, or a list of such lists, one for each picture.
All in pixels of the picture, counted from its upper left corner.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]
"""x and y."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_POINTS = 'a list of points such as [{"x": 120, "y": 80}] is needed, in pixels'
_DRAWN = 'a list of boxes such as [{"x": 100, "y": 60, "width": 50, "height": 40}] is needed, in pixels'
_BOXES = "a box {x, y, width, height} in pixels, a list of them, or such a list for each picture is needed"


@dataclass(frozen=True)
class Marks:
    """What the editor on a node writes: points on a thing, points beside it, and boxes around things."""

    include: list[Point]
    exclude: list[Point]
    drawn: list[Box]


def parse_marks(include: str | None, exclude: str | None, drawn: str | None, width: int, height: int) -> Marks:
    """The marks on a picture of so many pixels, from the texts of the inputs of these names.

    Raises ValueError, naming the input, for a text in another format, a point that lies outside of the picture, and a box
    without a part in it.
    """
    marks = Marks(parse_points(include, "include"), parse_points(exclude, "exclude"), parse_drawn(drawn, "drawn"))
    check_inside(marks.include, width, height, "include")
    check_inside(marks.exclude, width, height, "exclude")
    check_touching(marks.drawn, width, height, "drawn")
    return marks


def parse_points(text: str | None, name: str) -> list[Point]:
    """The points of a text; none of an empty one. Raises ValueError, naming `name`, for anything else."""
    found = _decoded(text)
    if isinstance(found, list) and all(isinstance(point, dict) for point in found):
        points = [_numbers(point, ("x", "y")) for point in found]
        if None not in points:
            return [(point[0], point[1]) for point in points if point is not None]
    raise ValueError(_other_format(name, text, _POINTS))


def parse_drawn(text: str | None, name: str) -> list[Box]:
    """The boxes of a text `[{"x": 1, "y": 2, "width": 3, "height": 4}, ...]`; none of an empty one.

    Raises ValueError, naming `name`, for another format and for boxes without an area.
    """
    found = _decoded(text)
    if not isinstance(found, list):
        raise ValueError(_other_format(name, text, _DRAWN))
    return [_box(entry, name, _DRAWN) for entry in found]


def parse_boxes(boxes: Any, pictures: int, name: str) -> list[list[Box]]:
    """The boxes of each of so many pictures. None is no box; a shorter list of lists goes on with its last.

    Raises ValueError, naming `name`, for another format, more lists than pictures, and boxes without an area.
    """
    if boxes is None:
        return [[] for _ in range(pictures)]
    if isinstance(boxes, Mapping):
        return [[_box(boxes, name, _BOXES)] for _ in range(pictures)]
    if isinstance(boxes, Sequence) and not isinstance(boxes, str):
        if all(isinstance(entry, Mapping) for entry in boxes):
            shared = [_box(entry, name, _BOXES) for entry in boxes]
            return [list(shared) for _ in range(pictures)]
        if all(isinstance(entry, Sequence) and not isinstance(entry, str) for entry in boxes):
            if len(boxes) > pictures:
                raise ValueError(
                    f"'{name}' has boxes for {len(boxes)} pictures, but 'image' is a batch of {pictures}: connect the boxes "
                    "that were found on these pictures."
                )
            each = [[_box(entry, name, _BOXES) for entry in entries] for entries in boxes]
            return each + [list(each[-1]) for _ in range(pictures - len(each))]
    raise ValueError(_other_format(name, boxes, _BOXES))


def check_inside(points: Sequence[Point], width: int, height: int, name: str) -> None:
    """Raises ValueError for a point that lies outside of a picture of so many pixels."""
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"'{name}' has the point ({x:g}, {y:g}), which lies outside of the picture of {width}x{height} pixels: points "
                "count pixels from the upper left corner, from (0, 0)."
            )


def check_touching(boxes: Sequence[Box], width: int, height: int, name: str) -> None:
    """Raises ValueError for a box with no part in a picture of so many pixels; detectors' boxes may reach beyond its edges."""
    for left, top, right, bottom in boxes:
        if right <= 0 or bottom <= 0 or left >= width or top >= height:
            raise ValueError(
                f"'{name}' has the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), which lies outside of the picture of "
                f"{width}x{height} pixels: boxes count pixels from the upper left corner."
            )


def as_bounding_box(box: Box) -> dict[str, float]:
    """The host's BOUNDING_BOX of a box."""
    left, top, right, bottom = box
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


def _decoded(text: str | None) -> Any:
    """What a text holds: an empty list where it is empty, None where it is no JSON."""
    try:
        return json.loads(text) if text and text.strip() else []
    except json.JSONDecodeError:
        return None


def _box(entry: Any, name: str, needed: str) -> Box:
    numbers = _numbers(entry, ("x", "y", "width", "height")) if isinstance(entry, Mapping) else None
    if numbers is None:
        raise ValueError(f"'{name}' has {_short(str(entry))}, but {needed}.")
    x, y, width, height = numbers
    if width <= 0 or height <= 0:
        raise ValueError(
            f"'{name}' has a box of {width:g}x{height:g} pixels, but its width and height have to be above 0."
        )
    return x, y, x + width, y + height


def _numbers(entry: Mapping[str, Any], keys: tuple[str, ...]) -> list[float] | None:
    """These entries as finite numbers; None where one is missing, none, or too large for one."""
    numbers = []
    for value in (entry.get(key) for key in keys):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            return None
        numbers.append(float(value))
    return numbers


def _other_format(name: str, found: Any, needed: str) -> str:
    return f"'{name}' is {_short(str(found))}, but {needed}."


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
