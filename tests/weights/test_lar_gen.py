"""Files of subject adapters: which tensor belongs to which block, and what is said of other files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from devtools.pack import load_pack, pack_module
from truefill_testing.subject_weights import random_resampler

load_pack()
lar_gen = pack_module("weights.lar_gen")

pytestmark = pytest.mark.quick

Place = tuple[str, int, int]

# How diffusers names the cross-attentions of a UNet, in its order, and where the host has them.
SD15: list[Place] = [
    *(("input", index, 0) for index in (1, 2, 4, 5, 7, 8)),
    *(("output", index, 0) for index in (3, 4, 5, 6, 7, 8, 9, 10, 11)),
    ("middle", 0, 0),
]
SDXL: list[Place] = [
    *(("input", index, depth) for index in (4, 5) for depth in range(2)),
    *(("input", index, depth) for index in (7, 8) for depth in range(10)),
    *(("output", index, depth) for index in (0, 1, 2) for depth in range(10)),
    *(("output", index, depth) for index in (3, 4, 5) for depth in range(2)),
    *(("middle", 0, depth) for depth in range(10)),
]


def forward_order(places: list[Place]) -> list[Place]:
    """As a pass reaches them: the middle between the halves."""
    order = ("input", "middle", "output")
    return sorted(places, key=lambda place: (order.index(place[0]), place[1], place[2]))


def marked(number: int, kind: str) -> torch.Tensor:
    return torch.full((2, 3), float(number if kind == "k" else -number))


def resampler() -> dict[str, torch.Tensor]:
    return random_resampler(output=24)


def plus_file(places: list[Place], step: int) -> dict[str, torch.Tensor]:
    """Numbered by `step`: the published files count self-attentions, too, so that theirs are 1, 3, 5 ..."""
    made = {f"image_proj.{name}": tensor for name, tensor in resampler().items()}
    for number in range(len(places)):
        for kind in "kv":
            made[f"ip_adapter.{step * number + 1}.to_{kind}_ip.weight"] = marked(number + 1, kind)
    return made


def released_file(unet: str, conditioner: str) -> dict[str, torch.Tensor]:
    """LAR-Gen's: blocks by their names in an SDXL UNet, and much besides."""
    made = {f"{conditioner}embedders.5.image_proj_model.{name}": tensor for name, tensor in resampler().items()}
    made |= {f"{conditioner}embedders.5.patch_projector.{name}": torch.ones(2) for name in ("weight", "bias")}
    made |= {
        f"{unet}input_blocks.0.0.weight": torch.ones(1),
        f"{conditioner}embedders.5.image_encoder.x": torch.ones(1),
    }
    names = {"input": "input_blocks.{}.1", "output": "output_blocks.{}.1", "middle": "middle_block.1"}
    for number, (part, index, depth) in enumerate(SDXL):
        block = names[part].format(index)
        for kind in "kv":
            name = f"{unet}{block}.transformer_blocks.{depth}.attn2.to_{kind}_ip.weight"
            made[name] = marked(number + 1, kind)
            # The text's own, which are none.
            made[name.replace("_ip", "")] = marked(999, kind)
    return made


def assert_mapped(found: Any, places: list[Place]) -> None:
    of = found.by_place(forward_order(places))
    assert of.keys() == set(places)
    for number, place in enumerate(places):
        assert torch.equal(of[place][0], marked(number + 1, "k")), place
        assert torch.equal(of[place][1], marked(number + 1, "v")), place
    assert found.resampler.keys() == resampler().keys()


@pytest.mark.parametrize("places", [SD15, SDXL], ids=["SD1.5", "SDXL"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_numbered_file(places: list[Place], step: int, tmp_path: Path) -> None:
    assert len(places) in (16, 70)
    flat = plus_file(places, step)
    path = tmp_path / "ip-adapter-plus.safetensors"
    save_file(flat, path)
    assert_mapped(lar_gen.read_subject_weights(path), places)
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in flat.items():
        part, _, rest = name.partition(".")
        nested[part][rest] = tensor
    torch.save(nested, tmp_path / "ip-adapter-plus.bin")
    assert_mapped(lar_gen.read_subject_weights(tmp_path / "ip-adapter-plus.bin"), places)


@pytest.mark.parametrize(
    ("unet", "conditioner"),
    [
        ("model.diffusion_model.", "conditioner."),
        ("model.", "cond_stage_model."),
        ("model.diffusion_model.", "cond_stage_model.model."),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_released_file(unet: str, conditioner: str, wrapped: bool, tmp_path: Path) -> None:
    tensors = released_file(unet, conditioner)
    assert sum("_ip.weight" in name for name in tensors) == 140
    torch.save({"model": tensors} if wrapped else tensors, tmp_path / "largen.pth")
    found = lar_gen.read_subject_weights(tmp_path / "largen.pth")
    assert_mapped(found, SDXL)
    assert found.detail.keys() == {"weight", "bias"}


def without(state: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if part not in name}


GOOD = plus_file(SD15, 2)
X = torch.ones(1)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({**GOOD, "image_proj.perceiver_resampler.x": X}, "is an IP-Adapter FaceID file"),
        ({**GOOD, "ip_adapter.0.to_q_lora.down.weight": X}, "is an IP-Adapter FaceID file"),
        ({"image_proj.proj.weight": X, "image_proj.norm.weight": X}, "is an IP-Adapter file that is not a Plus one"),
        ({"image_proj.proj.0.weight": X}, "is an IP-Adapter file that is not a Plus one"),
        (without(GOOD, "_ip"), "without projections to_k_ip and to_v_ip"),
        (without(GOOD, "image_proj"), "without a resampler"),
        ({**GOOD, "image_proj.proj_in.weight": torch.ones(128, 1024)}, "have 1024 numbers, not ViT-H's 1280"),
        ({"some.weight": X}, "without projections"),
    ],
)
def test_another_file_gets_one_sentence(state: dict[str, torch.Tensor], what: str) -> None:
    with pytest.raises(ValueError, match=r"^x\.bin is ") as raised:
        lar_gen.subject_weights(state, "x.bin")
    said = str(raised.value)
    assert what in said and "models/ipadapter: https://" in said and len(said.splitlines()) == 1


def test_a_lonely_projection_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^x\.bin is an incomplete or changed file"):
        lar_gen.subject_weights(without(GOOD, "ip_adapter.5.to_v_ip"), "x.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"^broken\.safetensors can't be read as weights"):
        lar_gen.read_subject_weights(tmp_path / "broken.safetensors")
    torch.save({"image_proj": {"latents": 3.0}}, tmp_path / "odd.bin")
    with pytest.raises(ValueError, match=r"^odd\.bin holds other things than weights"):
        lar_gen.read_subject_weights(tmp_path / "odd.bin")
