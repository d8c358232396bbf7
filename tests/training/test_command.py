"""The command line of the training, as people call it: with tiny settings in a folder of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from devtools.launch import command
from devtools.pack import pack_module

COMMAND = command("-p", "training.demo.command", "--device", "cpu", "--threads", "1")
TINY = ["--batch", "1", "vae"]


class Answer(NamedTuple):
    """What a call in this process ended with and said."""

    code: Any
    stdout: str
    stderr: str


def call(runs: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, "--runs", runs, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with an autoencoder of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    done = call(folder, "--steps", "2", *TINY)
    assert done.returncode == 0, done.stderr
    assert "from step 0 of 2" in done.stdout
    return folder


@pytest.fixture
def call_here(monkeypatch, capsys) -> Callable[..., Answer]:
    """Calls the command in this process, for what trains nothing."""

    def call(*arguments: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        try:
            code = pack_module("training.demo.command").main()
        except SystemExit as end:
            code = end.code
        return Answer(code, *capsys.readouterr())

    return call


def test_a_trained_stage_leaves_its_figures(runs):
    figures = json.loads((runs / "vae" / "figures.json").read_text())
    assert figures["psnr"] > 0 and figures["smallest_std"] > 0
    state = torch.load(runs / "vae" / "checkpoint.pt", weights_only=True)
    assert (state["step"], state["identity"]["steps"], state["identity"]["batch"]) == (2, 2, 1)


def test_the_same_command_with_more_steps_goes_on(tmp_path, runs):
    shutil.copytree(runs / "vae", tmp_path / "vae")
    done = call(tmp_path, "--steps", "3", *TINY)
    assert done.returncode == 0, done.stderr
    assert "from step 2 of 3" in done.stdout
    assert torch.load(tmp_path / "vae" / "checkpoint.pt", weights_only=True)["step"] == 3
    # The figures are those of three steps.
    assert (tmp_path / "vae" / "figures.json").read_text() != (runs / "vae" / "figures.json").read_text()


def test_what_has_been_trained_can_be_looked_at(call_here, tmp_path, runs):
    done = call_here("--runs", runs, "samples", "--out", tmp_path)
    assert done.code == 0, done.stderr
    for name in ("world", "vae"):
        path = tmp_path / f"{name}.png"
        assert str(path) in done.stdout
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture))) > 50


def test_what_has_been_trained_is_exported(call_here, tmp_path, runs):
    done = call_here("--runs", runs, "export", "--out", tmp_path)
    assert done.code == 0, done.stderr
    (file,) = tmp_path.glob("*.safetensors")
    assert file.name == "truefill_demo_vae.safetensors" and str(file) in done.stdout
    assert any(name.startswith("taesd_encoder.") for name in load_file(file))
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["stages"]["vae"]["trained_steps"] == 2 and recipe["stages"]["vae"]["figures"]["psnr"] > 0


@pytest.mark.parametrize(
    ("inside", "arguments", "message"),
    [
        ("nothing", ["text2image"], "train the stage 'vae' first."),
        ("", ["--steps", "2", "--batch", "2", "vae"], "has batch 1, this one 2."),
    ],
)
def test_a_wrong_use_is_answered_in_one_line(call_here, runs, inside, arguments, message):
    done = call_here("--runs", runs / inside, "--device", "cpu", "--threads", "1", *arguments)
    assert done.code == 1
    assert done.stderr.startswith("dev.py train: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_device_that_is_not_there_is_named(call_here, runs):
    done = call_here("--runs", runs, "--device", "nonsense", "vae")
    assert done.code == 2 and "Traceback" not in done.stderr
    assert "'nonsense' can't be used here" in done.stderr.splitlines()[-1]


def test_a_run_that_is_told_to_end_saves_what_it_has(tmp_path):
    with subprocess.Popen(
        [*COMMAND, "--runs", tmp_path, "--steps", "100000", *TINY],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "from step 0" in line:
                    break
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    step = torch.load(tmp_path / "vae" / "checkpoint.pt", weights_only=True)["step"]
    assert f"Stopped after step {step} and saved" in said
