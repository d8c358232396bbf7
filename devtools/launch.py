"""Runs a program in the environment's interpreter, with neither this folder nor the checkout on sys.path.

    python launch.py [--tied] MAIN.PY [arguments]      a file, such as ComfyUI's
    python launch.py [--tied] -m MODULE [arguments]    a module, as `python -m` does: pip, pytest, devtools.demo
    python launch.py [--tied] -p MODULE [arguments]    `main()` of a module of the pack, such as evaluation.bench_region

From there the pack's `nodes` would be taken for the host's module of that name, and this folder's `pip` for the real
one; `devtools` can be imported all the same. With --tied standard input is a pipe from the process that started this
one. Its end means that the other is gone, however it went: no server outlives it, and no pip goes on writing into an
environment that the next call repairs.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(_HERE)


def command(*arguments: object, python: object = sys.executable) -> list[str]:
    """The command line that runs a program this way, for subprocess."""
    return [str(python), os.path.join(_HERE, "launch.py"), *map(str, arguments)]


def _import_devtools() -> None:
    """Import this package from the checkout; what searches for modules later does not see the checkout."""
    elsewhere = [entry for entry in sys.path if os.path.abspath(entry) not in (_HERE, _ROOT)]
    sys.path[:] = [_ROOT]
    import devtools  # noqa: F401

    sys.path[:] = elsewhere


def _end_with_parent() -> None:
    # Not sys.stdin.read(), whose lock would abort the interpreter's own way out.
    while os.read(0, 1):
        continue
    os._exit(1)


def _main() -> None:
    _import_devtools()
    del sys.argv[0]
    if sys.argv[0] == "--tied":
        threading.Thread(target=_end_with_parent, daemon=True).start()
        del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif sys.argv[0] == "-p":
        del sys.argv[0]
        from devtools.pack import pack_module

        sys.exit(pack_module(sys.argv[0]).main())
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main()
