"""The command line of the training, as people call it: with tiny settings in a folder of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from devtools.launch import command

COMMAND = command("-p", "training.demo.command", "--device", "cpu", "--threads", "1")
TINY = ["--batch", "1", "vae"]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the calls besides the first one write lies here."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def answers(runs, folder) -> dict[str, subprocess.CompletedProcess[str]]:
    """What came of the other calls by name, made two at a time: most of a call is the host's start."""
    shutil.copytree(runs / "vae", folder / "longer" / "vae")
    calls: dict[str, tuple[str | Path, ...]] = {
        "longer": (folder / "longer", "--steps", "3", *TINY),
        "samples": (runs, "samples", "--out", folder / "grids"),
        "export": (runs, "export", "--out", folder / "files"),
        "too early": (folder / "nothing", "text2image"),
        "another batch": (runs, "--steps", "2", "--batch", "2", "vae"),
        "no such device": (runs, "--device", "nonsense", "vae"),
    }
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(calls, pool.map(lambda arguments: call(*arguments), calls.values()), strict=True))


def test_a_trained_stage_leaves_its_figures(runs):
    figures = json.loads((runs / "vae" / "figures.json").read_text())
    assert figures["psnr"] > 0 and figures["smallest_std"] > 0
    state = torch.load(runs / "vae" / "checkpoint.pt", weights_only=True)
    assert (state["step"], state["identity"]["steps"], state["identity"]["batch"]) == (2, 2, 1)


def test_the_same_command_with_more_steps_goes_on(answers, folder, runs):
    done = answers["longer"]
    assert done.returncode == 0, done.stderr
    assert "from step 2 of 3" in done.stdout
    assert torch.load(folder / "longer" / "vae" / "checkpoint.pt", weights_only=True)["step"] == 3
    # The figures are those of three steps.
    assert (folder / "longer" / "vae" / "figures.json").read_text() != (runs / "vae" / "figures.json").read_text()


def test_what_has_been_trained_can_be_looked_at(answers, folder):
    done = answers["samples"]
    assert done.returncode == 0, done.stderr
    for name in ("world", "vae"):
        path = folder / "grids" / f"{name}.png"
        assert str(path) in done.stdout
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture))) > 50


def test_what_has_been_trained_is_exported(answers, folder):
    done = answers["export"]
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "files").glob("*.safetensors")
    assert file.name == "truefill_demo_vae.safetensors" and str(file) in done.stdout
    assert any(name.startswith("taesd_encoder.") for name in load_file(file))
    recipe = json.loads((folder / "files" / "recipe.json").read_text())
    assert recipe["stages"]["vae"]["trained_steps"] == 2 and recipe["stages"]["vae"]["figures"]["psnr"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("too early", "train the stage 'vae' first."), ("another batch", "has batch 1, this one 2.")],
)
def test_a_wrong_use_is_answered_in_one_line(answers, name, message):
    done = answers[name]
    assert done.returncode == 1
    assert done.stderr.startswith("dev.py train: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_device_that_is_not_there_is_named(answers):
    done = answers["no such device"]
    assert done.returncode == 2 and "Traceback" not in done.stderr
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
