"""Runs ComfyUI's main.py inside the environment, and ends it when the process that started it dies.

    python launch.py MAIN.PY [arguments of ComfyUI]

Standard input is a pipe from dev.py. Its end means that dev.py is gone, however it went, so that no server
outlives it.
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
sys.argv = sys.argv[1:]
# As if main.py had been started itself: its folder in front, and not this one.
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
