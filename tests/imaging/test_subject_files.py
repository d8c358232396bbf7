"""A folder of subjects: what is written is read again, and what is wrong gets one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.pack import pack_module
from truefill_testing.regions import one_sentence

pytestmark = pytest.mark.quick

files = pack_module("imaging.subject_files")


def square(size: tuple[int, int], left: int, top: int, side: int) -> torch.Tensor:
    mask = torch.zeros(size)
    mask[top : top + side, left : left + side] = 1.0
    return mask


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Too small and too large ones are left out, so are pictures without any, and numbers go on after the last one."""
    pictures = torch.rand(3, 40, 60, 3, generator=torch.Generator().manual_seed(0))
    size = (40, 60)
    # Of 2400 pixels: 0.7 %, 17 % and 4 %; nothing; all.
    masks = [
        torch.stack([square(size, 0, 0, 4), square(size, 10, 5, 20), square(size, 40, 20, 10)]),
        torch.zeros(0, *size),
        torch.ones(1, *size),
    ]
    prompts = [["dust", "a red cup", "ein Löffel"], [], ["everything"]]
    written = files.save_subjects(tmp_path, pictures, masks, prompts)
    assert [(of.mask.name, of.prompt) for of in written] == [
        ("00001_0.mask.png", "a red cup"),
        ("00001_1.mask.png", "ein Löffel"),
    ]
    assert files.find_subjects(tmp_path) == written
    picture, mask = written[1].read()
    assert np.array_equal(picture, (255 * pictures[0]).round().byte().numpy())
    assert np.array_equal(mask, masks[0][2].numpy() > 0)

    files.save_subjects(tmp_path, pictures, masks, prompts, largest=1.0)
    assert sorted(of.name for of in tmp_path.glob("*.png")) == [
        "00001.png",
        *(f"00001_{place}.mask.png" for place in range(2)),
        "00002.png",
        *(f"00002_{place}.mask.png" for place in range(2)),
        "00003.png",
        "00003_0.mask.png",
    ]


def test_a_folder_by_hand(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "my cat.v2.jpg")
    Image.new("L", (8, 6), 255).save(tmp_path / "my cat.v2_3.mask.png")
    (tmp_path / "my cat.v2_3.txt").write_text("a cat\n")
    (found,) = files.find_subjects(tmp_path)
    assert found.prompt == "a cat" and found.picture.name == "my cat.v2.jpg"
    picture, mask = found.read()
    assert picture.shape == (6, 8, 3) and mask.all()


def test_what_is_wrong_gets_one_sentence(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=re.escape(match)) as found:
            for of in files.find_subjects(tmp_path):
                of.read()
        assert one_sentence(found)

    refused("has no subject: it needs pictures")
    Image.new("L", (8, 6), 255).save(tmp_path / "1_0.mask.png")
    refused("1_0.mask.png has no picture")
    Image.new("RGB", (9, 6)).save(tmp_path / "1.png")
    refused("1_0.mask.png has no prompt: write what it shows into 1_0.txt")
    (tmp_path / "1_0.txt").write_text("a cup")
    refused("1_0.mask.png has 8 x 6 pixels and 1.png 9 x 6")
