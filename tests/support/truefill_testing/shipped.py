"""The graphs that ship with the pack, as files: for the editor, and in API format."""

from __future__ import annotations

import json
from typing import Any

from devtools.paths import ROOT

WORKFLOWS = ROOT / "workflows"
GRAPHS = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def editor_graph(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def api_graph(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
