"""Edits of photographs with known shifts, scales and tones: they are found, taken back, and nothing else is touched."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from devtools.pack import pack_module
from devtools.paths import ROOT

alignment = pack_module("imaging.alignment")
edits = pack_module("imaging.edits")


# The pack's photograph, and one that the host's templates have.
PHOTOS = ("coffee", "template")
SIZE = (480, 640)


@cache
def photo(name: str) -> torch.Tensor:
    """[3, 480, 640] in [0, 1]."""
    if name == "coffee":
        path = ROOT / "workflows" / "examples" / "coffee.png"
    else:
        package = files(pytest.importorskip("comfyui_workflow_templates_media_image"))
        path = Path(str(package)) / "templates" / "flux_fill_inpaint_example-1.webp"
    picture = Image.open(path).convert("RGB").resize(SIZE[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0).float() / 255


@dataclass(frozen=True)
class Drift:
    """What an edit model does besides: moves the picture by pixels along x and y, scales it, and answers in another size."""

    across: float = 0.0
    down: float = 0.0
    x: float = 1.0
    y: float = 1.0
    size: tuple[int, int] = SIZE

    def of(self, planes: torch.Tensor) -> torch.Tensor:
        """[C, H, W] drifted, by splines of fifth degree: not by the interpolation that is tested."""
        height, width = planes.shape[-2:]
        shift = 2 * self.across / width, 2 * self.down / height
        u, v = ((2 * np.arange(side) + 1) / side - 1 for side in self.size[::-1])
        columns = (((u - shift[0]) / self.x + 1) * width - 1) / 2
        rows = (((v - shift[1]) / self.y + 1) * height - 1) / 2
        grid = np.meshgrid(rows, columns, indexing="ij")
        moved = [ndimage.map_coordinates(plane.double().numpy(), grid, order=5, mode="mirror") for plane in planes]
        return torch.from_numpy(np.stack(moved)).float().clamp(0.0, 1.0)


def disc(share: float) -> torch.Tensor:
    """Of so much of a picture, bool."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return torch.from_numpy((rows - 250) ** 2 + (columns - 350) ** 2 < share * SIZE[0] * SIZE[1] / np.pi)


def saved(picture: torch.Tensor, quality: int) -> torch.Tensor:
    """As a JPEG."""
    file = io.BytesIO()
    values = (picture.movedim(0, -1).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(values).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).movedim(-1, 0).float() / 255


def cast(picture: torch.Tensor) -> torch.Tensor:
    gain, offset = torch.tensor([1.03, 0.96, 0.9]), torch.tensor([-0.01, 0.01, 0.03])
    return (picture * gain[:, None, None] + offset[:, None, None]).clamp(0.0, 1.0)


def darker(picture: torch.Tensor) -> torch.Tensor:
    return picture**1.1


DRIFTS = {
    "still": Drift(),
    "shifted": Drift(2.37, -3.61),
    "scaled": Drift(-1.2, 0.4, 1.006, 0.995),
    "larger": Drift(0.8, 1.9, 1.002, 1.003, (512, 688)),
    "smaller": Drift(-2.6, 0.7, 0.997, 0.997, (448, 592)),
}


@pytest.mark.parametrize(
    ("drift", "tone", "share", "quality"),
    [
        pytest.param("shifted", None, 0.0, None, marks=pytest.mark.quick),
        ("scaled", cast, 0.05, None),
        ("scaled", darker, 0.2, 90),
        ("larger", cast, 0.4, None),
        ("smaller", cast, 0.3, 90),
        ("shifted", darker, 0.4, 80),
        ("still", cast, 0.4, 90),
    ],
)
@pytest.mark.parametrize("name", PHOTOS)
def test_a_known_drift_is_taken_back(name: str, drift: str, tone, share: float, quality: int | None) -> None:
    original, other = photo(name), photo("template" if name == "coffee" else "coffee").flip(-1)
    inside = disc(share)
    truth = DRIFTS[drift]
    made = truth.of(torch.where(inside, other, original))
    made = made if tone is None else tone(made)
    made = made if quality is None else saved(made, quality)
    found = edits.take_edit(original, made)
    assert found.alignment is not None
    across, down = found.alignment.pixels(SIZE)
    assert abs(across - truth.across) <= 0.1 and abs(down - truth.down) <= 0.1
    assert abs(found.alignment.scale[0] / truth.x - 1) <= 2e-4 and abs(found.alignment.scale[1] / truth.y - 1) <= 2e-4

    taken = found.mask > 0
    assert torch.equal(found.composite[:, ~taken], original[:, ~taken])
    # What changed is there, all of it, and not much more.
    assert float((found.mask[inside] < 1).float().sum()) <= 0.002 * max(1, int(inside.sum()))
    around = ndimage.binary_dilation(inside.numpy(), iterations=22) if share else np.zeros_like(inside.numpy())
    assert float((taken.numpy() & ~around).mean()) < 0.002
    # The tone, where nothing changed.
    still = (found.aligned - original)[:, ~taken] * 255
    assert float(still.mean(dim=1).abs().max()) <= 0.5


@pytest.mark.quick
def test_an_edit_that_changed_nothing_gives_the_original() -> None:
    original = photo("coffee")
    found = edits.take_edit(original, original.clone())
    assert torch.equal(found.composite, original) and torch.equal(found.aligned, original)
    assert not found.mask.any() and found.changed == 0 and found.tone < 1e-6


@pytest.mark.parametrize("name", PHOTOS)
def test_a_loss_of_the_finest_detail_is_no_change(name: str) -> None:
    """As a VAE's."""
    original, inside = photo(name), disc(0.1)
    smooth = torch.from_numpy(ndimage.gaussian_filter(original.numpy(), (0, 0.8, 0.8)))
    made = torch.where(inside, photo("coffee").flip(0, -1), smooth)
    taken = edits.take_edit(original, made).mask > 0
    around = torch.from_numpy(ndimage.binary_dilation(inside.numpy(), iterations=22))
    assert bool(taken[disc(0.09)].all()) and float((taken & ~around).float().mean()) < 0.002


def test_a_change_alone_is_not_resampled() -> None:
    original, inside = photo("coffee"), disc(0.1)
    made = torch.where(inside, photo("coffee").flip(0, -1), original)
    off = edits.EditSettings(match_tone=False, harmony=edits.Harmony("off"))
    found = edits.take_edit(original, made, settings=off)
    assert torch.equal(found.aligned, made)
    assert torch.equal(found.composite[:, inside], made[:, inside])
    taken = found.mask > 0
    assert torch.equal(found.composite[:, ~taken], original[:, ~taken])


def test_an_edit_of_another_shape_may_be_cut_instead_of_stretched() -> None:
    original = photo("coffee")
    made = torch.where(disc(0.1), photo("coffee").flip(0, -1), original)[None, :, :, 40:600]
    made = torch.nn.functional.interpolate(made, size=(504, 588), mode="bicubic", antialias=True)[0].clamp(0.0, 1.0)
    found = edits.take_edit(original, made)
    assert found.alignment is not None
    assert abs(found.alignment.scale[0] / (640 / 560) - 1) <= 2e-4 and abs(found.alignment.scale[1] - 1) <= 2e-4
    taken = found.mask > 0
    assert torch.equal(found.composite[:, ~taken], original[:, ~taken]) and bool(taken[disc(0.09)].all())
    assert not taken[:, :38].any() and not taken[:, 602:].any()


@pytest.mark.quick
def test_a_given_mask_is_what_is_taken() -> None:
    original, inside = photo("coffee"), disc(0.1)
    made = cast(torch.where(inside, photo("coffee").flip(0, -1), original))
    mask = torch.zeros(SIZE)
    mask[100:300, 180:380] = 0.5
    found = edits.take_edit(original, made, mask, edits.EditSettings(harmony=edits.Harmony("off")))
    assert torch.equal(found.mask, mask)
    half = 0.5 * (original + found.aligned)
    assert torch.allclose(found.composite[:, mask > 0], half[:, mask > 0], atol=1e-6)
    assert torch.equal(found.composite[:, mask == 0], original[:, mask == 0])


@pytest.mark.quick
def test_a_faint_change_is_found_in_grain() -> None:
    original, inside = photo("coffee")[:, 160:340, 240:460], disc(0.02)[160:340, 240:460]
    grain = 5 / 255 * torch.randn(original.shape, generator=torch.Generator().manual_seed(5))
    made = (original + grain + 20 / 255 * inside).clamp(0.0, 1.0)
    found = edits.changes(made, original, torch.ones_like(inside))
    around = torch.from_numpy(ndimage.binary_dilation(inside.numpy(), iterations=8))
    assert float((inside & ~found).sum()) <= 0.05 * float(inside.sum()) and not (found & ~around).any()


def test_sensitivity_finds_fainter_changes() -> None:
    original, inside = photo("coffee")[:, 160:340, 240:460], disc(0.02)[160:340, 240:460]
    noise = 0.01 * torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    made = (original + noise + 0.035 * inside).clamp(0.0, 1.0)
    shares = [
        edits.take_edit(original, made, settings=edits.EditSettings(sensitivity=of, match_tone=False)).changed
        for of in (0.5, 1.0, 3.0)
    ]
    assert shares[0] <= shares[1] < shares[2]


@pytest.mark.quick
def test_pictures_with_nothing_in_common_are_said_to_be_so() -> None:
    original, other = photo("coffee"), torch.rand(3, 300, 400, generator=torch.Generator().manual_seed(0))
    made = edits.align_edits(original.movedim(0, -1)[None], other.movedim(0, -1)[None], None, edits.EditSettings())
    assert (
        torch.equal(made.aligned[0].movedim(-1, 0), other) and made.pictures.shape[1:3] == SIZE == made.masks.shape[1:]
    )
    assert bool((made.masks == 1).all()) and "nothing in common; the edit is left as it is" in made.report


def test_a_change_that_covers_everything_is_the_edit() -> None:
    """The same outlines, everything else anew."""
    original = photo("coffee")
    made = (1.0 - original) * 0.7 + 0.3 * photo("coffee").flip(0, -1).flip(-2)
    made = torch.where(torch.rand(SIZE, generator=torch.Generator().manual_seed(2)) > 0.5, made, original.flip(0))
    found = edits.take_edit(original, made)
    assert found.changed > 0.95


@pytest.mark.quick
@pytest.mark.parametrize("value", [0.0, 0.4])
def test_pictures_without_detail_lie_over_each_other(value: float) -> None:
    flat = torch.full((3, 96, 130), value)
    made = flat.clone()
    made[:, 30:60, 40:80] = 0.9
    found = edits.take_edit(flat, made)
    assert found.alignment == alignment.Alignment() or not found.alignment.moves((96, 130))
    taken = found.mask > 0
    assert bool(taken[30:60, 40:80].all()) and torch.equal(found.composite[:, ~taken], flat[:, ~taken])


def test_batches_alpha_and_sizes() -> None:
    originals = torch.stack([photo("coffee"), photo("coffee").flip(-1)]).movedim(1, -1)[:, 100:300, 100:350]
    alpha = torch.rand(2, 200, 250, 1, generator=torch.Generator().manual_seed(3))
    made = edits.align_edits(torch.cat((originals, alpha), dim=-1), originals[:1], None, edits.EditSettings())
    assert made.pictures.shape == (2, 200, 250, 4) and torch.equal(made.pictures[..., 3:], alpha)
    assert torch.equal(made.pictures[0, ..., :3], originals[0]) and made.aligned.shape == (2, 200, 250, 3)
    assert made.masks.shape == (2, 200, 250) and made.report.startswith("1: shifted by ")
    with pytest.raises(ValueError, match="These batches don't go together"):
        edits.align_edits(originals, originals[[0, 1, 0]], None, edits.EditSettings())


def test_one_pixel_and_thin_pictures_do_not_fail() -> None:
    for size in ((1, 1), (1, 300), (5, 7)):
        picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(4))
        found = edits.take_edit(picture, picture.clone())
        assert torch.equal(found.composite, picture)
