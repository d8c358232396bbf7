"""A contact sheet of a batch's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

_SIDE, _LINE, _GAP, _ACROSS = 192, 18, 6, 8
_MOST = 200


def write_sheet(target: Path, pictures: Sequence[tuple[str, Path]]) -> int:
    """Write a JPEG with the first pictures, each above its name; returns how many are on it. None, no file."""
    shown = []
    for name, path in pictures:
        if len(shown) == _MOST:
            break
        try:
            with Image.open(path) as picture:
                picture.draft("RGB", (2 * _SIDE, 2 * _SIDE))
                shown.append((name, ImageOps.contain(picture.convert("RGB"), (_SIDE, _SIDE))))
        except (OSError, UnidentifiedImageError):
            continue
    if not shown:
        return 0
    across = min(_ACROSS, len(shown))
    rows = -(-len(shown) // across)
    width, height = _SIDE + _GAP, _SIDE + _LINE + _GAP
    sheet = Image.new("RGB", (across * width + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (name, picture) in enumerate(shown):
        left, top = _GAP + place % across * width, _GAP + place // across * height
        sheet.paste(picture, (left + (_SIDE - picture.width) // 2, top + _SIDE - picture.height))
        draw.text((left, top + _SIDE + 2), _short(name, font), "black", font)
    sheet.save(target, quality=88)
    return len(shown)


def _short(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(name) <= _SIDE:
        return name
    while name and font.getlength(name + "...") > _SIDE:
        name = name[:-1]
    return name + "..."
