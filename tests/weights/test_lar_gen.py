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


def whole_checkpoint(unet: str, conditioner: str, vae: str) -> dict[str, torch.Tensor]:
    """A checkpoint with a reference network, each tensor marked by what it is."""
    return {
        **released_file(unet, conditioner),
        f"{unet}time_embed.0.weight": torch.tensor([1.0]),
        f"{unet}ref_input_blocks.0.0.weight": torch.tensor([2.0]),
        f"{unet}ref_output_blocks.3.1.norm.weight": torch.tensor([3.0]),
        f"{unet}ref_output_blocks.3.1.transformer_blocks.0.attn2.to_k_ip.weight": torch.tensor([4.0]),
        f"{unet}ref_time_embed.0.weight": torch.tensor([5.0]),
        f"{unet}ref_label_emb.0.0.weight": torch.tensor([6.0]),
        f"{vae}encoder.conv_in.weight": torch.tensor([7.0]),
        f"{vae}quant_conv.weight": torch.tensor([8.0]),
        f"{conditioner}embedders.0.transformer.text_model.final_layer_norm.weight": torch.tensor([9.0]),
        f"{conditioner}embedders.1.model.text_projection": torch.tensor([10.0]),
        f"{conditioner}embedders.5.image_encoder.vision_model.post_layernorm.weight": torch.tensor([11.0]),
    }


def assert_taken_apart(found: Any) -> None:
    base = {name: float(found.base[name].flatten()[0]) for name in found.base if "transformer_blocks" not in name}
    assert base == {
        "model.diffusion_model.input_blocks.0.0.weight": 1.0,
        "model.diffusion_model.time_embed.0.weight": 1.0,
        "first_stage_model.encoder.conv_in.weight": 7.0,
        "first_stage_model.quant_conv.weight": 8.0,
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": 9.0,
        "conditioner.embedders.1.model.text_projection": 10.0,
    }
    text = [name for name in found.base if "transformer_blocks" in name]
    assert len(text) == 140 and not any("_ip" in name for name in text)
    assert {name: float(of) for name, of in found.vision.items() if of.numel() == 1 and name != "x"} == {
        "vision_model.post_layernorm.weight": 11.0
    }
    branch = {name: float(of) for name, of in found.subject.branch.items()}
    assert branch == {
        "input_blocks.0.0.weight": 2.0,
        "output_blocks.3.1.norm.weight": 3.0,
        "time_embed.0.weight": 5.0,
        "label_emb.0.0.weight": 6.0,
    }
    assert set(found.subject.detail) == {"weight", "bias"}
    assert_mapped(found.subject, SDXL)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("conditioner", ["conditioner.", "cond_stage_model.", "cond_stage_model.model."])
@pytest.mark.parametrize("unet", ["model.diffusion_model.", "model."])
def test_a_checkpoint_in_one_file(unet: str, conditioner: str, wrapped: bool, tmp_path: Path) -> None:
    state = whole_checkpoint(unet, conditioner, "first_stage_model.")
    torch.save({"model": state} if wrapped else state, tmp_path / "largen.pth")
    assert_taken_apart(lar_gen.read_checkpoint(tmp_path / "largen.pth"))


@pytest.mark.parametrize("prefixes", [("", "", ""), ("model.diffusion_model.", "model.", ""), ("model.", "", "model.")])
def test_a_checkpoint_in_three_files(prefixes: tuple[str, str, str], tmp_path: Path) -> None:
    unet, conditioner, vae = prefixes
    state = whole_checkpoint("U.", "C.", "V.")
    names = {"U.": "diffusion_model.pth", "C.": "cond_stage_model.pth", "V.": "first_stage_model.pth"}
    for (part, name), prefix in zip(names.items(), (unet, conditioner, vae), strict=True):
        own = {prefix + key.removeprefix(part): tensor for key, tensor in state.items() if key.startswith(part)}
        torch.save(own, tmp_path / name)
    for name in names.values():
        assert_taken_apart(lar_gen.read_checkpoint(tmp_path / name))
    (tmp_path / "cond_stage_model.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^diffusion_model\.pth is one of three files, and cond_stage_model\.pth is not"
    ):
        lar_gen.read_checkpoint(tmp_path / "diffusion_model.pth")


@pytest.mark.parametrize("missing", ["first_stage_model", "image_encoder", "input_blocks.0.0", "embedders.0"])
def test_another_checkpoint_gets_one_sentence(missing: str, tmp_path: Path) -> None:
    state = whole_checkpoint("model.diffusion_model.", "conditioner.", "first_stage_model.")
    state = {name: tensor for name, tensor in state.items() if missing not in name}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^other\.pth is not LAR-Gen's checkpoint, .*https://") as refused:
        lar_gen.read_checkpoint(tmp_path / "other.pth")
    assert "\n" not in str(refused.value)
