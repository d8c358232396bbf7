"""One ComfyUI process with the pack in it, which never writes into the user's own ComfyUI."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import launch
from .client import Client, ServerGone
from .paths import CACHE, LOGS, ROOT, UserError

RUNS = CACHE / "runs"
_NOT_THE_PACK = shutil.ignore_patterns(".*", "__pycache__", "shared", "node_modules", "demo-output", "batch-output")
_DAY = 24 * 3600
# subprocess.CREATE_NEW_PROCESS_GROUP, which exists on Windows alone.
_NEW_GROUP = 0x200


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port."""
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def link_pack(pack: Path, target: Path) -> None:
    """Make the pack appear at `target`: a symbolic link, else a junction (Windows), else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(pack, target_is_directory=True)
        return
    except OSError:
        # Windows asks for a privilege; some file systems have no links at all.
        if os.name == "nt":
            command = ["cmd", "/c", "mklink", "/J", str(target), str(pack)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return
    shutil.copytree(pack, target, ignore=_NOT_THE_PACK)


def has_cuda(python: Path) -> bool:
    """Whether the environment's torch sees a CUDA device."""
    probe = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([python, "-c", probe], capture_output=True, cwd=python.parent).returncode == 0


def _remove_old_runs() -> None:
    """Remove folders that a killed dev.py left behind."""
    for folder in RUNS.glob("*"):
        if time.time() - folder.stat().st_mtime > _DAY:
            shutil.rmtree(folder, ignore_errors=True)


def _model_paths(folders: Iterable[Path]) -> str:
    """ComfyUI's extra_model_paths.yaml for folders laid out like its own `models`; JSON is valid YAML."""
    sections = {}
    for index, folder in enumerate(folders):
        kinds = {path.name: path.name for path in folder.iterdir() if path.is_dir()}
        sections[f"truefill{index}"] = {"base_path": str(folder)} | kinds
    return json.dumps(sections)


class Server:
    """ComfyUI on a loopback port; a context manager that ends the process and all its children.

    `models` are further folders laid out like ComfyUI's `models`. `pack_folder` is the name that the pack gets in
    custom_nodes; `beside` are further packs there. `base` None makes a folder for this run alone, which goes with it;
    else it is used and stays, and nothing is put into it.
    """

    def __init__(
        self,
        host: Path,
        python: Path,
        *,
        pack: Path = ROOT,
        pack_folder: str = "TrueFill",
        beside: Sequence[Path] = (),
        models: Sequence[Path] = (),
        port: int | None = None,
        arguments: Sequence[str] = (),
        base: Path | None = None,
        log_name: str = "comfyui",
        echo: bool = False,
        timeout: float = 300.0,
    ) -> None:
        self.host, self.python, self.pack, self.pack_folder = host, python, pack, pack_folder
        self.beside, self.models, self.arguments = list(beside), list(models), list(arguments)
        self.port = port or free_port()
        self.base, self._temporary = base, base is None
        self.echo, self.timeout = echo, timeout
        self.log = LOGS / f"{log_name}-{os.getpid()}.log"
        self.process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Where the server listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> Client:
        """A client of this server."""
        return Client(self.address)

    def __enter__(self) -> Server:
        try:
            self._start()
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        command = launch.command("--tied", self.host / "main.py", python=self.python)
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        if self.base is None:
            _remove_old_runs()
            self.base = RUNS / f"{os.getpid()}-{self.port}"
            for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
                (self.base / name).mkdir(parents=True)
            link_pack(self.pack, self.base / "custom_nodes" / self.pack_folder)
            for other in self.beside:
                link_pack(other, self.base / "custom_nodes" / other.name)
            command += ["--base-directory", str(self.base)]
            # Its default lies in the host's folder, whatever the base directory.
            command += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"]
            if self.models:
                extra = self.base / "extra_model_paths.yaml"
                extra.write_text(_model_paths(self.models), encoding="utf-8")
                command += ["--extra-model-paths-config", str(extra)]
        if "--cpu" not in self.arguments and not has_cuda(self.python):
            command.append("--cpu")
        command += self.arguments
        environment = os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
        # A folder from there could shadow the host's modules, as this checkout's `nodes` would.
        environment.pop("PYTHONPATH", None)
        # Its own group: Ctrl-C reaches dev.py alone, which then ends the whole tree.
        self.process = subprocess.Popen(
            command,
            cwd=self.host,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            creationflags=_NEW_GROUP if os.name == "nt" else 0,
            start_new_session=os.name != "nt",
        )
        self._reader = threading.Thread(target=self._keep_log, args=(self.process,), daemon=True)
        self._reader.start()

    def _keep_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with self.log.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if self.echo:
                    print(line, end="", flush=True)

    def tail(self, count: int = 30) -> str:
        """The last lines of the server's log."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-count:])

    def _fail(self, what: str) -> UserError:
        return UserError(f"{what}\n--- the last lines of {self.log} ---\n{self.tail()}")

    def _wait(self) -> None:
        """Return when the server answers and the pack's nodes are there; raises UserError otherwise."""
        assert self.process is not None
        deadline = time.monotonic() + self.timeout
        while True:
            if self.process.poll() is not None:
                # What it said last is still on its way to the log.
                if self._reader is not None:
                    self._reader.join(5)
                raise self._fail(f"ComfyUI ended with code {self.process.returncode} while it started.")
            try:
                self.client.get_json("/system_stats", timeout=5)
                break
            except (ServerGone, ValueError):
                if time.monotonic() > deadline:
                    raise self._fail(f"ComfyUI did not answer within {self.timeout:.0f} seconds.") from None
                time.sleep(0.3)
        if not any(name.startswith("TrueFill") for name in self.client.object_info()):
            reasons = ("Cannot import", "Error while calling comfy_entrypoint", "IMPORT FAILED", "Skip ")
            lines = self.log.read_text(encoding="utf-8").splitlines()
            reason = next((line.strip() for line in lines if any(r in line for r in reasons)), "the log says no reason")
            raise self._fail(f"ComfyUI runs, but TrueFill's nodes are missing: {reason}")

    def stop(self) -> None:
        """End the process with all its children and remove the folder made for this run."""
        process, self.process = self.process, None
        if process is not None:
            if process.poll() is None:
                self._signal(process, gently=True)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    self._signal(process, gently=False)
                    process.wait(10)
            if process.stdin is not None:
                # Closing flushes into a pipe that nobody reads any more.
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if self._reader is not None:
                self._reader.join(5)
        if self._temporary and self.base is not None:
            # rmtree removes links and junctions, not what they point to.
            shutil.rmtree(self.base, ignore_errors=True)
            self.base = None

    @staticmethod
    def _signal(process: subprocess.Popen[str], gently: bool) -> None:
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            return
        # The group may be gone between the question and the signal.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM if gently else signal.SIGKILL)


@contextlib.contextmanager
def side_by_side(servers: Sequence[Server]) -> Iterator[None]:
    """Start servers at the same time, and end them all, also where one does not start."""
    try:
        with ThreadPoolExecutor(len(servers)) as starting:
            list(starting.map(Server.__enter__, servers))
        yield
    finally:
        for server in servers:
            server.stop()
