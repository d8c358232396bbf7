"""Quadruples from a folder: the hole covers the subject, which is whole, and its picture shows it once more, otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from devtools.pack import ensure_host, pack_module
from truefill_testing import demo_subject

ensure_host()

folder = pack_module("training.lar_gen.folder")
quadruples = pack_module("training.lar_gen.quadruples")
shipped = pack_module("training.demo.shipped")
vision = pack_module("training.lar_gen.vision")


def place(path: Path, name: str, size: tuple[int, int], box: tuple[int, int, int, int], prompt: str) -> None:
    """A blue picture with a red ellipse, its mask and its prompt."""
    picture, mask = Image.new("RGB", size, (0, 0, 200)), Image.new("L", size)
    ImageDraw.Draw(picture).ellipse(box, fill=(220, 30, 30))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    picture.save(path / f"{name}.png")
    mask.save(path / f"{name}_0.mask.png")
    (path / f"{name}_0.txt").write_text(prompt)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place(tmp_path, "wide", (500, 120), (200, 30, 280, 100), "a red star")
    place(tmp_path, "tall, at the edge", (90, 300), (60, 230, 89, 299), "a Ball, quite unknown!")
    place(tmp_path, "larger than the picture is high", (400, 100), (20, 10, 380, 95), "")
    return tmp_path


def test_each_subject_becomes_a_task(path: Path) -> None:
    found = folder.folder_examples(path, seed=0)
    assert sorted(of.prompt for of in found) == ["", "a Ball, quite unknown!", "a red star"]
    for of in found:
        for picture, mask in ((of.picture, of.hole), (of.reference, of.reference_mask)):
            assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8
            assert mask.shape == (256, 256) and mask.dtype == bool and mask.any()
        red = (of.picture[..., 0].astype(int) - of.picture[..., 2]) > 60
        assert red.sum() > 300 and not (red & ~of.hole).any()
        seen = of.reference[of.reference_mask].astype(int)
        assert ((seen[:, 0] - seen[:, 2]) > 20).mean() > 0.9
        assert not np.array_equal(of.reference, of.picture)
    # The hole covers the subject, whichever of PainterNet's masks it is.
    for of in (of for seed in range(1, 20) for of in folder.folder_examples(path, seed)):
        assert not (((of.picture[..., 0].astype(int) - of.picture[..., 2]) > 60) & ~of.hole).any()
    again = folder.folder_examples(path, seed=0)
    assert all(np.array_equal(one.picture, other.picture) for one, other in zip(found, again, strict=True))


def test_they_are_trained_on_beside_the_worlds(path: Path) -> None:
    encoders = quadruples.Encoders(shipped.shipped_vae(), vision.Vision(seed=0).eval(), torch.device("cpu"))
    more = encoders.encode(folder.folder_examples(path, seed=0))
    both = demo_subject.encoded(4).with_more(more)
    assert len(both.clean) == len(both.own) == len(both.prompt) == 7 and both.prompt[4] in (
        "",
        "a red star",
        "a Ball, quite unknown!",
    )
    assert torch.equal(both.subject[4:], more.subject)
    _, _, task, _ = demo_subject.untrained_tasks(both)
    loss = task.losses(task.batch(0, 0, 7), torch.Generator().manual_seed(0))["loss"]
    assert torch.isfinite(loss) and loss > 0


def test_a_black_mask_gets_one_sentence(path: Path) -> None:
    Image.new("L", (500, 120)).save(path / "wide_0.mask.png")
    with pytest.raises(ValueError, match=r"wide_0\.mask\.png is black: paint the subject white, or remove it\.$"):
        folder.folder_examples(path, seed=0)
