"""Runs pip of an environment: what it says goes to a log, a failure is one sentence."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import launch
from .paths import LOGS, UserError

LOG = LOGS / "pip.log"
REPORT_SECONDS = 15.0


def _said(start: int) -> list[str]:
    """The log's lines from a position on, without empty ones."""
    with LOG.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def run(python: Path, arguments: Sequence[str], doing: str, echo: Callable[[str], None] = print) -> None:
    """Run `python -m pip` with the arguments; every REPORT_SECONDS `echo` gets its latest line.

    Raises UserError that says what failed, pip's last error, and where the log is.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    command = launch.command("--tied", "-m", "pip", *arguments, python=python)
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        start, begin = log.tell(), time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=LOGS
        )
        try:
            while True:
                try:
                    code = process.wait(REPORT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    latest = (_said(start) or ["..."])[-1]
                    echo(f"  {time.monotonic() - begin:4.0f} s  {latest[:100]}")
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code:
        errors = [line for line in _said(start) if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"exit code {code}"
        raise UserError(f"{doing} failed; pip says: {reason.rstrip('.')} (all that it said is in {LOG}).")
