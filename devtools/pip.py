"""Runs pip of an environment: readable progress, full log, failures as one sentence."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from .paths import LOGS, ROOT, UserError

# (pattern in pip's output, the sentence); the first that matches wins.
_FAILURES = (
    (r"No space left on device|not enough space on the disk", "The disk is full; free some space and try again."),
    (
        r"from versions: none\)",
        "No package index answers with {package}; check the network connection and pip's configuration "
        "(pip config list).",
    ),
    (
        r"Could not find a version that satisfies the requirement",
        "The package index has no {package} for this Python and machine; use Python 3.10 to 3.13 on 64-bit "
        "Linux or Windows, or check pip's configuration (pip config list).",
    ),
    (
        r"Could not fetch URL|ConnectionError|ReadTimeoutError|Max retries exceeded|getaddrinfo failed",
        "The package index stopped answering; check the network connection and try again.",
    ),
)
_MISSING = re.compile(r"satisfies the requirement ([^\s(]+)")
_DOWNLOAD = re.compile(r"^\s*Downloading (\S+?)(?:-py\d|-cp\d|\.tar| ).*\(([\d.]+) (MB|GB)\)")


def _progress(line: str, echo: Callable[[str], None]) -> None:
    """Show the lines of pip's output that mean something to a person."""
    if match := _DOWNLOAD.match(line):
        name, size, unit = match.groups()
        if unit == "GB" or float(size) >= 10:
            echo(f"  downloading {name.rsplit('/', 1)[-1]} ({size} {unit})")
    elif line.startswith("Installing collected packages:"):
        echo(f"  installing {line.count(',') + 1} packages; this can take a minute or two")


def failure(output: str) -> str | None:
    """Explain pip's output in one sentence, or return None for an unknown failure."""
    missing = _MISSING.search(output)
    package = missing.group(1) if missing else "the packages"
    for pattern, sentence in _FAILURES:
        if re.search(pattern, output):
            return sentence.format(package=package)
    return None


def run(python: Path, arguments: Sequence[str], doing: str, echo: Callable[[str], None] = print) -> None:
    """Run `python -m pip` with the arguments; raises UserError that says what failed and where the log is."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / "pip.log"
    command = [str(python), str(ROOT / "devtools" / "launch.py"), "-m", "pip", *arguments]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    # pip's own configuration stays in force; only its language for our reading of the output is fixed.
    environment = os.environ | {"PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    lines = []
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            cwd=LOGS,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                lines.append(line)
                _progress(line, echo)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code:
        output = "".join(lines)
        reason = failure(output) or next(
            (line.strip() for line in reversed(lines) if line.startswith("ERROR")), f"pip ended with code {code}."
        )
        raise UserError(f"{doing} failed: {reason} (pip's full output: {log})")
