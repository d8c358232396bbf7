"""Runs a program inside the environment, and ends it when the process that started it dies.

    python launch.py MAIN.PY [arguments]
    python launch.py -m MODULE [arguments]

Standard input is a pipe from dev.py. Its end means that dev.py is gone, however it went: no server outlives it,
and no pip goes on writing into an environment that the next call repairs.
"""

import os
import runpy
import sys
import threading


def _end_with_parent() -> None:
    # Not sys.stdin.read(), whose lock would abort the interpreter's own way out.
    while os.read(0, 1):
        continue
    os._exit(1)


threading.Thread(target=_end_with_parent, daemon=True).start()
# This folder must not be searched: it has modules named like others (pip).
del sys.path[0], sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
