"""How the commands of dev.py end: what the person can mend, and an interrupt, is one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .paths import UserError

INTERRUPTED = 130
"""The exit code of a command that was interrupted."""


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt once: what ends servers on the way out is not to be cut short."""
    heard = False

    def interrupt(*_: object) -> None:
        nonlocal heard
        if not heard:
            heard = True
            raise KeyboardInterrupt

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def run(work: Callable[[], int]) -> int:
    """Do a command's work; returns its exit code."""
    with _one_interrupt():
        try:
            return work()
        except UserError as error:
            print(f"dev.py: {error}", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"dev.py: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return INTERRUPTED
