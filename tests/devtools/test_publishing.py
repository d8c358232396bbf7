"""The workflow that publishes: what it writes into pyproject.toml, which does not know where the pack will lie."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from devtools.paths import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or sys.platform == "darwin", reason="needs bash and GNU sed"
)
HOME = "https://github.com/somebody/a-pack"


@pytest.mark.quick
def test_it_fills_in_where_the_pack_and_its_pictures_are(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["publish"]["steps"]
    (number,) = [number for number, step in enumerate(steps) if "pictures" in step.get("name", "")]
    step, following = steps[number], steps[number + 1 :]
    # An action may check the repository out anew, and undo it.
    assert following and all("uses" not in later for later in following)
    known = {
        "GITHUB_REPOSITORY": "somebody/a-pack",
        "GITHUB_REF_NAME": "v0.2.0",
        "GITHUB_SERVER_URL": "https://github.com",
    }
    subprocess.run(["bash", "-euc", step["run"]], cwd=tmp_path, env=os.environ | known, check=True)
    before, after = (tomllib.loads((folder / "pyproject.toml").read_text("utf-8")) for folder in (ROOT, tmp_path))
    assert after["project"].pop("urls") == {
        "Repository": HOME,
        "Documentation": f"{HOME}#readme",
        "Bug Tracker": f"{HOME}/issues",
    }
    # The registry wants an icon of at most 400 x 400 and a banner of 21:9.
    for name, shape in (("Icon", (400, 400)), ("Banner", (1260, 540))):
        url = after["tool"]["comfy"].pop(name)
        prefix = "https://raw.githubusercontent.com/somebody/a-pack/v0.2.0/"
        assert url.startswith(prefix)
        with Image.open(ROOT / url.removeprefix(prefix)) as picture:
            assert picture.size == shape
    before["tool"]["comfy"].pop("Icon")
    assert after == before
