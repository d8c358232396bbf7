"""The browser and its drivers.

They need chromium, node and playwright-core (`.ci/run` installs them); without these the tests of this folder are skipped,
except where the environment says CI=true.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devtools.pack import ROOT, host_path
from devtools.server import Server
from truefill_testing.checkpoints import checkpoint
from truefill_testing.stand_ins import CHECKPOINTS, SMALL_SAM3, SMALL_TEXT_ENCODERS, place_names

PICTURES = ROOT / ".cache" / "screenshots"
MODULES = ROOT / ".cache" / "browser" / "node_modules"


def _environment() -> dict[str, str]:
    paths = [os.environ.get("NODE_PATH", ""), str(MODULES)]
    return os.environ | {"NODE_PATH": os.pathsep.join(path for path in paths if path)}


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path, once all that drives it is there."""
    browser, node = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("node")
    missing = [name for name, path in (("chromium", browser), ("node", node)) if path is None]
    if node is not None:
        probe = [node, "-e", "require('playwright-core')"]
        if subprocess.run(probe, env=_environment(), capture_output=True, cwd=ROOT).returncode:
            missing.append("playwright-core (npm)")
    if missing:
        reason = f"the editor's tests need {', '.join(missing)}; .ci/ installs what is missing"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    assert browser is not None
    return browser


@pytest.fixture(scope="session")
def comfyui(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI that lists the graphs' models and has none but the demo's, and SD1.5-inpainting's with random weights."""
    models = tmp_path_factory.mktemp("models")
    place_names(models)
    there = models / "checkpoints" / "sd-v1-5-inpainting.safetensors"
    there.unlink()
    there.symlink_to(checkpoint(*CHECKPOINTS[there.name]))
    options = {"beside": [SMALL_SAM3, SMALL_TEXT_ENCODERS], "models": [models], "log_name": "test-browser"}
    with Server(host_path(), Path(sys.executable), **options) as server:
        yield server


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def mode(request: pytest.FixtureRequest) -> str:
    """The classic canvas, or what the editor calls Nodes 2.0."""
    return request.param


@pytest.fixture(scope="session")
def drive(chromium: str) -> Callable[..., dict[str, Any]]:
    """Runs a driver of this folder in a page of a server, in a mode, and returns what it saw."""

    def run(driver: str, server: Server, mode: str, **job: Any) -> dict[str, Any]:
        PICTURES.mkdir(parents=True, exist_ok=True)
        always = {"address": server.address, "chromium": chromium, "pictures": str(PICTURES)}
        command = [
            "node",
            str(Path(__file__).with_name(driver)),
            json.dumps({**always, "nodes2": mode == "nodes2", **job}),
        ]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, cwd=ROOT, timeout=1500)
        if done.returncode:
            # What the page has started would keep the next one waiting.
            server.client.interrupt()
        assert done.returncode == 0, f"{done.stderr}\n--- ComfyUI's log ---\n{server.tail()}"
        return json.loads(done.stdout)

    return run
