"""Files of control branches: their names and sizes as published, 8 bits, and what is none of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from devtools.pack import ensure_host, load_pack, pack_module
from truefill_testing import branch_files
from truefill_testing.branch_files import SMALL, random_branch

ensure_host()

import comfy.ops  # noqa: E402

load_pack()
readers = pack_module("weights.painternet")
network = pack_module("model_patches.painternet.network")
powerpaint = pack_module("weights.powerpaint")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("layout", "kind", "tensors", "points", "attentions"),
    [
        ("BRUSHNET_SD15", "BrushNet", 322, 28, 0),
        ("BRUSHNET_SDXL", "BrushNet", 252, 21, 0),
        ("POWERPAINT", "PowerPaint", 738, 28, 0),
        ("PAINTERNET_SD15", "PainterNet", 770, 28, 16),
        ("PAINTERNET_SDXL", "PainterNet", 1858, 21, 70),
    ],
)
def test_every_published_key_has_its_place(layout: str, kind: str, tensors: int, points: int, attentions: int) -> None:
    """All tensors with their published sizes, in a network of the host's."""
    state = branch_files.without_values(getattr(branch_files, layout))
    weights = readers.branch_weights(state, "a file")
    assert (len(state), weights.kind, len(weights.layer_points), len(weights.attention_points)) == (
        tensors,
        kind,
        points,
        attentions,
    )
    made = network.BranchNetwork(
        weights.plan, bool(attentions), comfy.ops.disable_weight_init, dtype=torch.float32, device="meta"
    )
    wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
    given = network.network_state(weights)
    assert {name: tensor.shape for name, tensor in given.items()} == wanted
    again = readers.branch_state(network.weights_of(made, weights.plan, "a file"))
    assert {name: tensor.shape for name, tensor in again.items()} == {name: of.shape for name, of in state.items()}


@pytest.mark.quick
def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """Heads are 8 with SD1.5's text, else 64 channels wide, or as the file says."""
    state = random_branch(SMALL["sd15"], 3)
    save_file(state, tmp_path / "plain.safetensors")
    save_file(state, tmp_path / "told.safetensors", {"head_channels": "16"})
    plain, told = (readers.read_branch(tmp_path / f"{name}.safetensors") for name in ("plain", "told"))
    assert (plain.plan.head_channels, told.plan.head_channels) == (64, 16)
    again = readers.branch_state(told)
    assert again.keys() == state.keys() and all(torch.equal(again[name], tensor) for name, tensor in state.items())
    of_sd15 = readers.branch_weights(branch_files.without_values(branch_files.POWERPAINT), "a file")
    assert (of_sd15.plan.heads, of_sd15.plan.head_channels) == (8, None)


@pytest.mark.quick
def test_matrices_in_8_bits_have_a_scale(tmp_path: Path) -> None:
    state = random_branch(SMALL["sd15"], 3)
    save_file(readers.in_eight_bits(state), tmp_path / "small.safetensors")
    found = readers.branch_state(readers.read_branch(tmp_path / "small.safetensors"))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        # E4M3 has 3 bits behind the first: half a step is a 16th, of the smallest ones relative to the scale.
        step = 2.0**-4 if tensor.dim() > 1 else 2.0**-11
        assert ((found[name].float() - tensor).abs() <= step * tensor.abs() + tensor.abs().max() / 448 / 512).all(), (
            name
        )
    assert (tmp_path / "small.safetensors").stat().st_size < 1.1 * sum(tensor.numel() for tensor in state.values())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (("control_model.zero_convs.0.0.weight",), "a ControlNet"),
        (("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"), "a ControlNet"),
        (("model.diffusion_model.input_blocks.0.0.weight",), "a checkpoint"),
        (("conv_in.weight", "conv_out.weight"), "a UNet"),
        (("unet.down.lora_up.weight",), "a LoRA"),
        (("head",), "Fooocus' inpaint head"),
        (("something",), "no control branch"),
    ],
)
def test_another_file_is_called_by_its_name(keys: tuple[str, ...], what: str) -> None:
    with pytest.raises(ValueError, match=rf"^x\.safetensors is {what}, but .* weights are needed: .*\.$"):
        readers.branch_weights({key: torch.zeros(4, 4, 3, 3) for key in keys}, "x.safetensors")


@pytest.mark.quick
def test_an_incomplete_file_gets_one_sentence(tmp_path: Path) -> None:
    whole = random_branch(SMALL["sd15"], 3)
    for gone, said in (
        ("brushnet_mid_block.bias", "brushnet_mid_block is missing"),
        ("painternet_attention_points.3.bias", "3 is incomplete"),
    ):
        state = {name: tensor for name, tensor in whole.items() if name != gone}
        with pytest.raises(
            ValueError, match=rf"^x is an incomplete or changed branch \(.*{said}\): download it again .*\.$"
        ):
            readers.branch_weights(state, "x")
    with pytest.raises(ValueError, match=r"^x is an incomplete .* \(more\.weight is unknown\): .*\.$"):
        readers.branch_weights({**whole, "more.weight": torch.zeros(1)}, "x")
    with pytest.raises(ValueError, match=r"^x is a branch with 5 input channels instead of 9, but .*\.$"):
        readers.branch_weights({"conv_in_condition.weight": torch.zeros(32, 5, 3, 3)}, "x")
    weights = readers.branch_weights(
        {name: of for name, of in whole.items() if "mid_block.resnets.1.conv1" not in name}, "x"
    )
    with pytest.raises(ValueError, match=r"^x is a PainterNet branch whose tensors don't fit each other \(.*\): .*\.$"):
        network.branch_model(weights)
    torch.save({"a": replace}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"^x\.pth can't be read as weights .*\.$"):
        readers.read_branch(tmp_path / "x.pth")


def embedding(rows: int) -> torch.Tensor:
    return torch.arange(rows, dtype=torch.float16)[:, None].expand(-1, 768)


@pytest.mark.quick
def test_powerpaints_tokens_lie_beside_the_embedding_or_behind_it() -> None:
    name = "text_model.embeddings.token_embedding"
    vectors = {
        token: torch.full((10, 768), float(number), dtype=torch.float16)
        for number, token in enumerate(("P_ctxt", "P_shape", "P_obj"))
    }
    released = {
        f"{name}.wrapped.weight": embedding(49408),
        **{f"{name}.trainable_embeddings.{token}": tensor for token, tensor in vectors.items()},
        "text_model.final_layer_norm.weight": torch.ones(4),
    }
    merged = {
        f"{name}.weight": torch.cat([embedding(49408), *vectors.values()]),
        "text_model.final_layer_norm.weight": torch.ones(4),
    }
    for state in (released, merged):
        found = powerpaint.task_encoder(state, "x")
        assert found.state.keys() == {f"{name}.weight", "text_model.final_layer_norm.weight"}
        assert torch.equal(found.state[f"{name}.weight"], embedding(49408))
        assert all(torch.equal(found.vectors[token], tensor) for token, tensor in vectors.items())
    plain = {f"{name}.weight": embedding(49408)}
    for state, what in (
        (plain, "a plain CLIP"),
        ({"conv_in_condition.weight": torch.ones(1)}, "a branch"),
        ({}, "no text encoder"),
    ):
        with pytest.raises(
            ValueError, match=rf"^x is {what}, but the text encoder of PowerPaint's branch is needed, .*\.$"
        ):
            powerpaint.task_encoder(state, "x")
    wide = {key: of[:, :700] if of.dim() == 2 else of for key, of in released.items()}
    with pytest.raises(
        ValueError, match=r"^x is a text encoder of width 700, but the one of PowerPaint's branch, CLIP ViT-L, .*\.$"
    ):
        powerpaint.task_encoder(wide, "x")
