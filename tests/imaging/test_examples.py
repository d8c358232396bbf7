"""The photographs that ship with the pack."""

from __future__ import annotations

import pytest

from devtools.pack import ROOT, pack_module

pytestmark = pytest.mark.quick

examples = pack_module("imaging.examples")


@pytest.mark.parametrize("name", list(examples.EXAMPLES))
def test_a_photo_has_a_hole_and_keeps_its_colours_under_it(name: str) -> None:
    picture, hole = examples.load_example(name)
    assert picture.shape[0] == 1 and picture.shape[-1] == 3
    assert hole.shape == picture.shape[:3]
    assert picture.shape[1] % 8 == 0 and picture.shape[2] % 8 == 0
    assert set(hole.unique().tolist()) == {0.0, 1.0}
    assert picture[hole == 1].std() > 0.01


def test_every_photo_is_attributed() -> None:
    notice = (ROOT / "workflows" / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(file in notice for file in examples.EXAMPLES.values())


def test_an_unknown_photo_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'tea'; there are: coffee"):
        examples.load_example("tea")
