"""The commands of dev.py."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import environment, host, launch, program
from .paths import CACHE, ROOT, UserError

DESCRIPTION = "Sets up ComfyUI with TrueFill and runs it: the demo, the editor, the tests, the benchmarks."
EPILOG = """\
The first call makes .venv, installs what is pinned and fetches ComfyUI into .cache: about 8 GB and a few
minutes. Later calls start at once. To use a ComfyUI of your own set COMFYUI_PATH to its folder, or put this
checkout into its custom_nodes folder, and run dev.py with the Python that it runs on.
"""
# Most tests need one core and wait for servers and browsers besides.
SIDE_BY_SIDE = ("-n", "2", "--dist", "worksteal")

# Loading, every family on a real server, the demo model, the formulas, what stays behind.
ON_OLDER_HOSTS = (
    "tests/host/test_server.py",
    "tests/host/test_nodes.py",
    "tests/host/test_demo_model.py",
    "tests/host/test_pilot.py",
    "tests/host/test_dreammix.py",
    "tests/host/test_painternet.py",
    "tests/host/test_subject_nodes.py",
    "tests/host/test_subject_tuning.py",
    "tests/model_patches/hd_painter/test_exact.py",
    "tests/model_patches/hd_painter/test_guidance.py",
)

TESTS_VARIABLES = {
    # Servers and commands beside each other: threads that wait for each other's cores take longer than one thread each.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # The literal forms make and drop large matrices all the time: torch asks for huge pages, and glibc hands less back at once.
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**30}:glibc.malloc.trim_threshold={2**31}",
}


def _imports(*modules: str) -> bool:
    """Whether the interpreter that runs dev.py finds these modules."""
    probe = f"import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in {modules!r}))"
    return subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True).returncode == 0


def _prepare(*tools: str, pinned: bool = False) -> tuple[Path, Path]:
    """Return the host's folder and the interpreter to run it with, setting up what is missing.

    `tools` are modules that the interpreter needs besides the host's; `pinned` insists on the pinned host.
    """
    environment.check_python()
    own = None if pinned else host.users_own()
    if own is not None and _imports("torch", "aiohttp", *tools):
        return own, Path(sys.executable)
    with environment.exclusive(CACHE / "setup.lock"):
        folder = own or host.ensure_pinned(environment.ensure_venv())
        return folder, environment.ensure_packages(folder / "requirements.txt")


def _call(
    python: Path,
    folder: Path,
    *arguments: object,
    tied: bool = False,
    variables: Mapping[str, str] | None = None,
    at: Path = ROOT,
) -> int:
    """Run a program through launch.py in a folder, with the host's folder in TRUEFILL_HOST; returns its exit code.

    One that is `tied` gets no standard input and ends with this process.
    """
    environment = os.environ | {"TRUEFILL_HOST": str(folder), "PYTHONUTF8": "1", **(variables or {})}
    environment.pop("PYTHONPATH", None)
    command = launch.command(*(["--tied"] if tied else []), *arguments, python=python)
    process = subprocess.Popen(command, cwd=at, env=environment, stdin=subprocess.PIPE if tied else None)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # It puts its things away and ends. A terminal's Ctrl-C has told it already, and twice does no harm; Windows has
        # no other way, and would kill it here.
        if os.name != "nt":
            process.terminate()
        code = process.wait()
        if code != program.INTERRUPTED:
            raise
    # As a shell has it where a signal ended it.
    return code if code >= 0 else 128 - code


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare()
    return _call(python, folder, "-m", "devtools.demo", tied=True)


def _test(options: argparse.Namespace, rest: list[str]) -> int:
    chosen = [*(["-m", "quick"] if options.quick else []), *(["--oracles"] if options.oracles else [])]
    side_by_side = [] if rest and not options.quick else SIDE_BY_SIDE
    tools = ("pytest", "hypothesis", "xdist", "segment_anything")
    folder, python = _prepare(*tools, pinned=options.host is not None)
    if options.host is not None:
        folder = host.ensure_older(python, options.host)
        chosen += [] if rest else ON_OLDER_HOSTS
    return _call(python, folder, "-m", "pytest", *side_by_side, *chosen, *rest, variables=TESTS_VARIABLES)


def _lint(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare(pinned=True)
    commands = (["ruff", "check"], ["ruff", "format", "--check"], ["basedpyright"])
    codes = []
    for command in commands:
        print(f"$ {' '.join(command)}", flush=True)
        codes.append(_call(python, folder, "-m", *command))
    return max(codes)


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    names = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "evaluation").glob("bench_*.py"))
    if options.name not in names:
        raise UserError(f"There is no benchmark named {options.name!r}; available: {', '.join(names) or 'none yet'}.")
    folder, python = _prepare()
    json_arguments = ["--json", os.path.abspath(options.json)] if options.json else []
    return _call(python, folder, "-p", f"evaluation.bench_{options.name}", *json_arguments, *rest)


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare()
    return _call(python, folder, "-p", "training.demo.command", *rest)


def _batch(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare()
    # Its arguments name files from where the person is.
    return _call(python, folder, "-m", "devtools.batch.command", *rest, tied=True, at=Path.cwd())


def _comfyui(options: argparse.Namespace, rest: list[str]) -> int:
    folder, python = _prepare()
    return _call(python, folder, "-m", "devtools.editor", options.port, *rest, tied=True)


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
    test = add("test", _test, "Run the tests; further arguments go to pytest, such as the files to run.")
    test.add_argument("--quick", action="store_true", help="only those marked `quick`: about 90 seconds on two cores")
    test.add_argument(
        "--oracles",
        action="store_true",
        help="compute the literal forms' answers anew instead of reading the kept ones",
    )
    test.add_argument(
        "--host",
        metavar="VERSION",
        help="with an older ComfyUI, such as 0.20.1, of which the package index has an archive",
    )
    add("lint", _lint, "Check style, format and types (ruff, basedpyright).")
    bench = add(
        "bench", _bench, "Run evaluation/bench_NAME.py; further arguments go to it: -h after the name lists them."
    )
    bench.add_argument("name", nargs="?", default="attention", help="which benchmark (default: attention)")
    bench.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    add("train", _train, "Train a stage of the demo models (vae, text2image, ...); -h after the stage lists options.")
    add("batch", _batch, "Run the rows of a table through a graph, on one or many ComfyUIs; -h lists options.")
    comfyui = add("comfyui", _comfyui, "Start the editor with the pack; further arguments go to ComfyUI.")
    comfyui.add_argument("--port", type=int, default=0, help="the port to listen on (default: 8188, or a free one)")
    return parser


def _options(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command with its own options, and what goes to the program that it runs."""
    command, rest = arguments[:1], arguments[1:]
    if command == ["batch"]:
        return parser.parse_args(command), rest
    if command not in (["test"], ["train"], ["bench"]) or rest in (["-h"], ["--help"]):
        return parser.parse_known_args(arguments)
    # argparse would take others' options for its own, or for mistakes.
    if command == ["bench"]:
        own = [name for name in rest if name not in ("-h", "--help")]
        options, others = parser.parse_known_args([*command, *own])
        return options, [*others, *(name for name in rest if name not in own)]
    own, others, left = [], [], iter(rest)
    for name in left:
        if command == ["test"] and name == "--host":
            own += [name, next(left, "")]
        elif command == ["test"] and name in ("--quick", "--oracles"):
            own.append(name)
        else:
            others.append(name)
    return parser.parse_args([*command, *own]), others


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options, rest = _options(parser, list(sys.argv[1:] if arguments is None else arguments))
    if rest and options.command in ("demo", "lint"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return program.run(lambda: options.function(options, rest))
