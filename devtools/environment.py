"""The virtual environment: made once, recognised afterwards, repaired or rebuilt when it is broken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from . import pip
from .paths import PINS, ROOT, VENV, UserError

MINIMUM_PYTHON = (3, 10)
NEEDED_GB = 8

_STATE = ".truefill-complete.json"
_INSTALLING = ".truefill-installing"
# Prints, as JSON, the installed versions and the packages with files missing. Runs inside the environment.
_INSPECT = """
import importlib.metadata as metadata, json, os
versions, broken = {}, []
for package in metadata.distributions():
    name = package.metadata["Name"]
    if name is None:
        broken.append(str(getattr(package, "_path", "?")))
        continue
    versions[name] = package.version
    files = package.files or ()
    if any(not f.suffix == ".pyc" and not os.path.exists(package.locate_file(f)) for f in files):
        broken.append(name)
print(json.dumps([versions, broken]))
"""


def _database(path: Path) -> sqlite3.Connection:
    try:
        # No timeout: its own waiting can't be interrupted.
        return sqlite3.connect(path, timeout=0.0, isolation_level=None)
    except sqlite3.OperationalError as error:
        raise UserError(f"{path} can't be locked ({error}); remove it and try again.") from error


def _try_lock(database: sqlite3.Connection, path: Path) -> bool:
    try:
        database.execute("BEGIN EXCLUSIVE")
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            return False
        raise UserError(f"{path} can't be locked ({error}); remove it and try again.") from error
    return True


@contextmanager
def exclusive(path: Path, timeout: float = 1800.0) -> Iterator[None]:
    """Let one process at a time in; the others wait, and raise UserError after `timeout` seconds.

    SQLite's lock on an empty database is the one in the standard library that works on every system and is dropped by it
    when its holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    waiting = False
    with closing(_database(path)) as database:
        while not _try_lock(database, path):
            if time.monotonic() > deadline:
                raise UserError(f"Another dev.py has been setting up for {timeout:.0f} seconds; wait for it or end it.")
            if not waiting:
                print("Waiting for another dev.py that is setting up ...", flush=True)
                waiting = True
            time.sleep(0.5)
        yield


def venv_python(venv: Path = VENV) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def check_python() -> None:
    """Raise UserError on a Python that is too old."""
    if sys.version_info < MINIMUM_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise UserError(f"TrueFill needs Python 3.10 or later; this is Python {found} ({sys.executable}).")


def check_disk(folder: Path = ROOT) -> None:
    """Raise UserError where the environment would not fit."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB:
        raise UserError(
            f"The set-up needs about {NEEDED_GB} GB of free disk space for {VENV.name} and ComfyUI, besides pip's cache; "
            f"{folder} has {free:.1f} GB free."
        )


def _remove(venv: Path) -> None:
    """Remove an environment; it disappears at once, so that a killed removal leaves nothing that looks like one."""
    try:
        os.replace(venv, venv.with_name(f"{venv.name}.old-{os.getpid()}"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"The broken environment {venv} cannot be removed ({error}); end what uses it.") from error
    for old in venv.parent.glob(f"{venv.name}.old-*"):
        shutil.rmtree(old, ignore_errors=True)


def _create(venv: Path) -> None:
    """Make an empty environment with the base interpreter, which survives the removal of the old one."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    print(f"Creating {venv.name} with Python {'.'.join(map(str, sys.version_info[:2]))} ...", flush=True)
    done = subprocess.run([base, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode:
        _remove(venv)
        if "ensurepip" in done.stdout + done.stderr:
            raise UserError("This Python cannot make virtual environments; install its venv package (python3-venv).")
        raise UserError(f"The virtual environment could not be made: {(done.stderr or done.stdout).strip()[-300:]}")


def _works(venv: Path) -> bool:
    """Whether the environment has an interpreter that starts, and pip."""
    try:
        return subprocess.run([venv_python(venv), "-c", "import pip"], capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


def _inspect(venv: Path) -> tuple[dict[str, str], list[str]]:
    """Return the installed versions by name, and the packages with files missing."""
    done = subprocess.run([venv_python(venv), "-c", _INSPECT], capture_output=True, text=True, cwd=venv)
    if done.returncode:
        return {}, ["?"]
    versions, broken = json.loads(done.stdout)
    return versions, broken


def _fingerprint(requirements: list[Path]) -> str:
    """A hash of everything that decides what gets installed."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}{sys.platform}".encode())
    for path in requirements:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_state(venv: Path) -> dict:
    try:
        return json.loads((venv / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def ensure_venv(venv: Path = VENV) -> Path:
    """Return the interpreter of a working, possibly still empty, environment."""
    interrupted = (venv / _INSTALLING).exists()
    if interrupted:
        print("The last installation was interrupted; starting over.", flush=True)
    if interrupted or not _works(venv):
        check_disk()
        _remove(venv)
        _create(venv)
    return venv_python(venv)


def ensure_packages(host_requirements: Path, venv: Path = VENV) -> Path:
    """Install what is pinned unless it is there already, and return the environment's interpreter."""
    requirements = [PINS, ROOT / "requirements.txt", host_requirements]
    fingerprint = _fingerprint(requirements)
    python = ensure_venv(venv)
    state = _read_state(venv)
    versions, broken = _inspect(venv)
    if state.get("fingerprint") == fingerprint and not broken and state["versions"].items() <= versions.items():
        return python

    if not versions.keys() >= {"torch", "transformers"}:
        check_disk()
    if broken:
        print(f"Files are missing in {venv.name} ({', '.join(broken[:3])}); rebuilding it.", flush=True)
        _remove(venv)
        _create(venv)
    (venv / _STATE).unlink(missing_ok=True)
    (venv / _INSTALLING).touch()
    print(f"Installing into {venv.name}: torch (about 2.5 GB to download, 5.5 GB on disk), ComfyUI's requirements,")
    print("the test tools. A few minutes on the first call, nothing on the next ones.", flush=True)
    arguments = [part for path in requirements for part in ("-r", str(path))]
    # One call for all, so that no later requirement replaces a pinned version. Python compiles what it imports, a small part.
    pip.run(python, ["install", "--no-compile", *arguments], "Installing the packages")
    versions, broken = _inspect(venv)
    if broken:
        raise UserError(f"pip left {', '.join(broken[:3])} incomplete in {venv.name}; run the same command again.")
    state = {"fingerprint": fingerprint, "versions": versions}
    (venv / _STATE).write_text(json.dumps(state), encoding="utf-8")
    (venv / _INSTALLING).unlink()
    return python
