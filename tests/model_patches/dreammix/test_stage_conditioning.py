"""What lies somewhere in a picture lies there in its crop as well: areas, masks, control pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.scene import Scene

load_pack()
stage = pack_module("model_patches.dreammix.stage_conditioning")
region_plan = pack_module("imaging.region_plan")

PICTURE = (96, 128)
BOX = region_plan.Box(32, 16, 96, 80)


def part_of(size: tuple[int, int] = (128, 128), *boxes: Any) -> Any:
    return stage.Part(PICTURE, boxes or (BOX,), size)


def entry_of(entry: dict[str, Any], part: Any, concat: Any = None, raw: bool = False) -> dict[str, Any]:
    made = stage.conditionings_of({"positive": [entry, {"cross_attn": 0}]}, part, 8, concat or {}, raw)["positive"]
    assert len(made) == 2
    return made[0]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("area", "expected"),
    [
        # Rows 16 to 48 and columns 32 to 64: a quarter of the crop, which is shown twice as large.
        ((4, 4, 2, 4), (8, 8, 0, 0)),
        # All of the picture is all of the crop.
        ((12, 16, 0, 0), (16, 16, 0, 0)),
        # Reaches in from the right.
        ((2, 10, 6, 10), (4, 4, 8, 12)),
        (("percentage", 0.5, 0.5, 0.5, 0.5), (8, 8, 8, 8)),
    ],
)
def test_an_area_is_where_it_was(area: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    entry = {"area": area, "strength": 0.5}
    assert entry_of(entry, part_of())["area"] == expected
    assert entry["area"] == area


@pytest.mark.quick
def test_an_area_elsewhere_is_dropped_and_the_last_one_is_a_sentence() -> None:
    outside = {"area": (1, 1, 0, 0)}
    others = stage.conditionings_of({"positive": [outside, {"cross_attn": 0}]}, part_of(), 8, {}, False)
    assert others == {"positive": [{"cross_attn": 0}]}
    with pytest.raises(ValueError, match="No area of the positive conditioning reaches into the part"):
        stage.conditionings_of({"positive": [outside]}, part_of(), 8, {}, False)
    two = part_of((64, 64), BOX, region_plan.Box(0, 0, 64, 64))
    with pytest.raises(ValueError, match="holes in different places"):
        stage.conditionings_of({"positive": [{"area": (4, 4, 2, 4)}]}, two, 8, {}, False)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(96, 128), (1, 96, 128), (1, 1, 96, 128), (1, 192, 256)])
def test_a_mask_is_where_it_was(shape: tuple[int, ...]) -> None:
    """Of any size: it spans the picture."""
    scale = shape[-1] // 128
    mask = torch.zeros(shape)
    mask[..., 16 * scale : 48 * scale, 32 * scale : 64 * scale] = 1.0
    cut = entry_of({"mask": mask}, part_of())["mask"]
    assert cut.shape == (1, 128, 128)
    # Resizing softens the edge.
    assert bool((cut[:, 4:60, 4:60] > 0.99).all())
    assert bool((cut[:, 68:] < 0.01).all()) and bool((cut[:, :, 68:] < 0.01).all())


@pytest.mark.quick
def test_each_picture_has_its_own_part() -> None:
    planes = torch.arange(96.0)[None, None, :, None].expand(1, 1, 96, 128)
    cut = part_of((32, 64), region_plan.Box(0, 0, 64, 32), region_plan.Box(64, 64, 128, 96)).of(planes)
    assert cut.shape == (2, 1, 32, 64)
    assert cut[0, 0, :, 0].tolist() == list(range(32)) and cut[1, 0, :, 0].tolist() == list(range(64, 96))


@pytest.mark.quick
def test_controls_get_the_crop_and_stay_as_they_were() -> None:
    scene = Scene("sd15", False, True, torch.float32)
    scene.add_controlnet()
    control = scene.positive[0][1]["control"]
    first = control.copy()
    hint = torch.rand(1, 3, *PICTURE)
    control.cond_hint_original = first.cond_hint_original = hint
    first.set_previous_controlnet(control)
    made = entry_of({"control": first}, part_of((64, 64)))["control"]
    for of in (made, made.previous_controlnet):
        assert torch.equal(of.cond_hint_original, hint[..., 16:80, 32:96])
        assert of.control_model is control.control_model and of.strength == control.strength
    assert first.cond_hint_original is hint and made is not first and made.previous_controlnet is not control


@pytest.mark.quick
def test_sizes_concat_and_the_raw_pooled_output() -> None:
    given = {
        "width": 4096,
        "target_width": 1024,
        "target_height": 768,
        "pooled_output": torch.ones(1, 4),
        stage.RAW_POOLED_KEY: torch.zeros(1, 4),
        "concat_mask": torch.ones(1),
    }
    mask = torch.zeros(2)
    made = entry_of(given, part_of((64, 128)), {"concat_mask": mask})
    assert (made["width"], made["target_width"], made["target_height"]) == (4096, 128, 64)
    assert made["concat_mask"] is mask and made["pooled_output"] is given["pooled_output"]
    assert entry_of(given, part_of(), raw=True)["pooled_output"] is given[stage.RAW_POOLED_KEY]
    assert given["target_width"] == 1024


@pytest.mark.quick
def test_a_whole_picture_changes_no_area_mask_or_control() -> None:
    mask, control = torch.ones(1, 5, 7), object()
    entry = {"mask": mask, "control": control, "area": (4, 4, 0, 0)}
    whole = stage.Part(PICTURE, (region_plan.Box(0, 0, 128, 96),), PICTURE)
    assert whole.is_whole and entry_of(entry, whole) == entry
    # Continued to what the VAE takes: what is there stays where it is.
    continued = stage.Part((93, 128), (region_plan.Box(0, 0, 128, 96),), (96, 128))
    where = torch.rand(1, 93, 128)
    made = entry_of({"mask": where, "area": (4, 4, 2, 0)}, continued)
    assert torch.equal(made["mask"][:, :93], where) and made["mask"].shape == (1, 96, 128)
    assert made["area"] == (4, 4, 2, 0)
    # A corner of a larger picture is none, though nothing is resized.
    assert not part_of((64, 64), region_plan.Box(0, 0, 64, 64)).is_whole
