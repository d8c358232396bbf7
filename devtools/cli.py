"""The commands of dev.py."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import environment, host
from .demo import demo
from .lock import exclusive
from .paths import CACHE, ROOT, UserError
from .server import Server, is_free

DESCRIPTION = "Sets up ComfyUI with TrueFill and runs it: the demo, the editor, the tests, the benchmarks."
EPILOG = """\
The first call makes .venv, installs what is pinned and fetches ComfyUI into .cache: about 8 GB and a few
minutes. Later calls start at once. To use a ComfyUI of your own set COMFYUI_PATH to its folder, or put this
checkout into its custom_nodes folder, and run dev.py with the Python that it runs on.
"""
# `python -m` would put this folder on sys.path, whose `nodes` shadows the host's module of that name.
_RUN_MODULE = (
    "import os, runpy, sys; here = os.getcwd(); "
    "sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here]; "
    "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def _imports(*modules: str) -> bool:
    """Whether the interpreter that runs dev.py finds these modules."""
    probe = f"import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in {modules!r}))"
    return subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True).returncode == 0


def _prepare(*tools: str, pinned: bool = False) -> tuple[Path, Path]:
    """Return the host's folder and the interpreter to run it with, setting up what is missing.

    `tools` are modules that the interpreter needs besides torch; `pinned` insists on the pinned host.
    """
    environment.check_python()
    own = None if pinned else host.users_own()
    if own is not None and _imports("torch", *tools):
        return own, Path(sys.executable)
    with exclusive(CACHE / "setup.lock"):
        folder = own or host.ensure_pinned(environment.ensure_venv())
        return folder, environment.ensure_packages(folder / "requirements.txt")


def _variables(folder: Path) -> dict[str, str]:
    variables = os.environ | {"TRUEFILL_HOST": str(folder), "PYTHONUTF8": "1"}
    variables.pop("PYTHONPATH", None)
    return variables


def _call(python: Path, folder: Path, arguments: Sequence[str | Path], **variables: str) -> int:
    """Run the interpreter in the checkout with the host's folder in TRUEFILL_HOST; returns its exit code."""
    return subprocess.run([python, *arguments], cwd=ROOT, env=_variables(folder) | variables).returncode


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    demo(*_prepare())
    return 0


def _test(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare("pytest", "hypothesis", "xdist", "segment_anything")
    # All of them: side by side, for most need one core and wait for servers and browsers besides.
    arguments = ["-c", _RUN_MODULE, "pytest", *(rest or ["-n", "2", "--dist", "loadfile"])]
    # torch asks for huge pages: the literal forms make and drop large matrices all the time.
    return _call(python, folder, arguments, THP_MEM_ALLOC_ENABLE="1")


def _lint(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare(pinned=True)
    commands = (["ruff", "check"], ["ruff", "format", "--check"], ["basedpyright"])
    codes = []
    for command in commands:
        print(f"$ {' '.join(command)}", flush=True)
        codes.append(_call(python, folder, ["-c", _RUN_MODULE, *command]))
    return max(codes)


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    scripts = {path.stem.removeprefix("bench_"): path for path in (ROOT / "evaluation").glob("bench_*.py")}
    if options.name not in scripts:
        known = ", ".join(sorted(scripts)) or "none yet"
        raise UserError(f"There is no benchmark named {options.name!r}; available: {known}.")
    folder, python = _prepare()
    json_arguments = ["--json", os.path.abspath(options.json)] if options.json else []
    return _call(python, folder, [scripts[options.name], *json_arguments, *rest])


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare()
    process = subprocess.Popen(
        [python, ROOT / "training" / "demo" / "command.py", *rest], cwd=ROOT, env=_variables(folder)
    )
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # It saves its state and ends; a terminal's Ctrl-C has told it already, and twice does no harm.
            process.terminate()


def _comfyui(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare()
    port = options.port
    if port is None:
        port = 8188 if is_free(8188) else None
    elif not is_free(port):
        raise UserError(f"Port {port} is in use; choose another one with --port.")
    own = host.users_own()
    models = [own / "models"] if own is not None and (own / "models").is_dir() else []
    base = own if host.in_custom_nodes() and own == ROOT.parents[1] else None
    server = Server(folder, python, models=models, port=port, arguments=rest, base=base, log_name="editor", echo=True)
    with server:
        print(f"\nThe editor with TrueFill is at {server.address} (Ctrl-C ends it; log: {server.log})", flush=True)
        assert server.process is not None
        return server.process.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dev.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        return command

    add("demo", _demo, "Run the shipped graph in a real ComfyUI and write a picture: input, mask, result.")
    add("test", _test, "Run the tests; further arguments go to pytest.")
    add("lint", _lint, "Check style, format and types (ruff, basedpyright).")
    bench = add("bench", _bench, "Run evaluation/bench_NAME.py; further arguments go to it.")
    bench.add_argument("name", nargs="?", default="attention", help="which benchmark (default: attention)")
    bench.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    add("train", _train, "Train a stage of the demo models (vae, text2image, ...); -h after the stage lists options.")
    comfyui = add("comfyui", _comfyui, "Start the editor with the pack; further arguments go to ComfyUI.")
    comfyui.add_argument("--port", type=int, help="the port to listen on (default: 8188, or a free one)")
    return parser


def _terminate(*_: object) -> None:
    # As with Ctrl-C, so that the servers are ended on the way out.
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # argparse would take pytest's and the training's options for mistakes of its own.
    if arguments[:1] in (["test"], ["train"]) and arguments[1:] not in (["-h"], ["--help"]):
        options, rest = parser.parse_args(arguments[:1]), arguments[1:]
    else:
        options, rest = parser.parse_known_args(arguments)
    if rest and options.command in ("demo", "lint"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, _terminate)
    try:
        return options.function(options, rest)
    except UserError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"dev.py: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
