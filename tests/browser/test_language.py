"""The views on nodes speak the editor's language, and English where they don't know it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from devtools.pack import ROOT
from devtools.server import Server

pytestmark = pytest.mark.browser

# Asked for where it is needed: in a menu, of a picture that is gone.
LATER = {"open_mask_editor", "points_gone", "compare_gone"}


def texts(language: str) -> dict[str, str]:
    return json.loads((ROOT / "js" / "texts" / f"{language}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("language", "shown"), [("fr", "fr"), ("zh", "zh"), ("tr", "en")])
def test_all_that_the_views_say(
    language: str, shown: str, comfyui: Server, drive: Callable[..., dict[str, Any]]
) -> None:
    report = drive("language.cjs", comfyui, "classic", language=language)
    assert not report["pageErrors"]
    known = texts(shown)
    said = {*report["points"], *report["compare"]}
    assert said == {text for name, text in known.items() if name not in LATER}
