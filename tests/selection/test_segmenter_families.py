"""SAM-HQ against its paper's decoder, SAM 2 against the answers of the sam2 package, and their files by all names."""

from __future__ import annotations

import json
from typing import Any

import pytest
import segment_anything
import torch
from safetensors.torch import save_file

from devtools.pack import ROOT, pack_module
from truefill_testing.random_segmenters import (
    PROMPTS,
    SIDE,
    HQDecoder,
    predicted,
    sam2_state,
    small_sam_hq,
    smooth_picture,
)
from truefill_testing.random_tensors import squares

reader = pack_module("weights.segmenters")
segment = pack_module("selection.segmenters")

# Every tensor of sam2.1_hiera_tiny, and what the sam2 package (1.1.0) answers with `sam2_state`'s values for `squares`:
# scores, and every twelfth logit of every twelfth row.
TINY = json.loads((ROOT / "tests" / "data" / "sam2_1_hiera_tiny.json").read_text())
# Width of the first stage and blocks of each, as published.
SIZES = {"small": (96, (1, 2, 11, 2)), "base plus": (112, (2, 3, 16, 3)), "large": (144, (2, 6, 36, 4))}


def without_copies(model: Any) -> dict[str, torch.Tensor]:
    """A network's tensors as the hub's files have them: one matrix, which has two names, once."""
    state = dict(model.state_dict())
    state.pop("prompt_encoder.shared_embedding.positional_embedding")
    return state


@pytest.fixture(scope="module")
def hq():
    return small_sam_hq()


@pytest.mark.parametrize("size", [(SIDE, 96), (61, 77), (300, 205)], ids=str)
@pytest.mark.parametrize("name", list(PROMPTS))
def test_sam_hq_answers_as_its_paper_says(hq, name: str, size: tuple[int, int]) -> None:
    image = smooth_picture(*size)
    segmenter = segment.Segmenter.of(reader.segmenter_from_state(hq.state_dict(), "sam_hq.pth"))
    (found,) = segmenter.segment(image, [PROMPTS[name]])
    logits, scores = predicted(hq, image, PROMPTS[name])
    assert found.logits.shape == (3, *size)
    assert float(logits.std()) > 0.05, "a flat answer would say nothing"
    assert float((found.logits[:1] - logits).abs().max()) < 1e-4 * max(1.0, float(logits.abs().max()))
    assert found.scores.argmax() == 0 and torch.allclose(found.scores[:1], scores, atol=1e-4)
    mask, score = found.pick("best")
    assert torch.equal(mask, found.logits[0] > 0) and score == pytest.approx(float(scores[0]), abs=1e-4)


def test_sam_hq_looks_once_and_in_half_precision_finds_the_same(hq, monkeypatch) -> None:
    image = smooth_picture(90, 120)
    exact = segment.Segmenter.of(reader.segmenter_from_state(hq.state_dict(), "sam_hq.pth"))
    half = segment.Segmenter.of(reader.segmenter_from_state(hq.state_dict(), "sam_hq.pth"))
    half.patcher.model.to(torch.float16)
    looks, network = [], half.patcher.model.network
    look = network.get_image_embeddings
    monkeypatch.setattr(network, "get_image_embeddings", lambda pixels: looks.append(1) or look(pixels))
    for prompt in PROMPTS.values():
        (wanted,), (found,) = exact.segment(image, [prompt]), half.segment(image, [prompt])
        assert float(((found.logits > 0) != (wanted.logits > 0)).float().mean()) < 0.01
    assert len(looks) == 1


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_every_key_of_sam_hq_has_its_place(kind: str) -> None:
    with torch.device("meta"):
        published = segment_anything.sam_model_registry[kind]()
        plain, width = published.mask_decoder, published.image_encoder.patch_embed.proj.out_channels
        published.mask_decoder = HQDecoder(
            width=width, channels=256, num_multimask_outputs=3, transformer=plain.transformer
        )
    state = published.state_dict()
    model = reader.segmenter_from_state(state, "sam_hq.pth")
    twice = state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].numel()
    assert sum(p.numel() for p in model.state_dict().values()) == sum(t.numel() for t in state.values()) + twice


def test_sam_hqs_hub_layout_is_the_same_network(hq, tmp_path) -> None:
    image, prompt = smooth_picture(80, 110), PROMPTS["points"]
    model = reader.segmenter_from_state(hq.state_dict(), "sam_hq.pth")
    save_file(without_copies(model), tmp_path / "hub.safetensors")
    (expected,) = segment.Segmenter.of(model).segment(image, [prompt])
    (found,) = segment.Segmenter.of(reader.read_segmenter(tmp_path / "hub.safetensors")).segment(image, [prompt])
    assert torch.equal(found.logits, expected.logits)


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return sam2_state(TINY["shapes"])


@pytest.fixture(scope="module")
def sam2(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": tiny}, path)
    return reader.read_segmenter(path)


def test_sam2_answers_as_its_package_does(sam2, monkeypatch) -> None:
    looks = []
    look = sam2.get_image_embeddings
    monkeypatch.setattr(sam2, "get_image_embeddings", lambda pixels: looks.append(1) or look(pixels))
    found = segment.Segmenter.of(sam2).segment(squares(61, 77), list(PROMPTS.values()))
    assert len(looks) == 1
    for name, answer in zip(PROMPTS, found, strict=True):
        expected = TINY["answers"][name]
        assert answer.logits.shape == (3, 61, 77)
        logits, wanted = answer.logits[:, ::12, ::12], torch.tensor(expected["logits"])
        assert float((logits - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())
        assert torch.allclose(answer.scores, torch.tensor(expected["scores"]), atol=1e-4)


def test_sam2s_hub_layout_is_the_same_network(sam2, tiny, tmp_path) -> None:
    # The hub's files hold the network for videos too.
    state = {**without_copies(sam2), "memory_attention.layers.0.linear1.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "hub.safetensors")
    again = reader.read_segmenter(tmp_path / "hub.safetensors")
    assert type(again) is type(sam2) and again.config.to_dict() == sam2.config.to_dict()
    for name, tensor in sam2.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def trunk(width: int, stages: tuple[int, ...]) -> dict[str, list[int]]:
    """The shapes of another size's image encoder, by the published code's rules."""
    shapes = {
        "image_encoder.trunk.pos_embed": [1, width, 7, 7],
        "image_encoder.trunk.pos_embed_window": [1, width, 8, 8],
    }
    shapes["image_encoder.trunk.patch_embed.proj.weight"] = [width, 3, 7, 7]
    shapes["image_encoder.trunk.patch_embed.proj.bias"] = [width]
    number, before = 0, width
    for stage, blocks in enumerate(stages):
        now = width * 2**stage
        for _ in range(blocks):
            block = f"image_encoder.trunk.blocks.{number}."
            layers = {"attn.qkv": (3 * now, before), "attn.proj": (now, now)}
            layers |= {"mlp.layers.0": (4 * now, now), "mlp.layers.1": (now, 4 * now)}
            if before != now:
                layers["proj"] = (now, before)
            for name, (out, into) in layers.items():
                shapes |= {f"{block}{name}.weight": [out, into], f"{block}{name}.bias": [out]}
            for name, wide in (("norm1", before), ("norm2", now)):
                shapes |= {f"{block}{name}.weight": [wide], f"{block}{name}.bias": [wide]}
            number, before = number + 1, now
        convolution = f"image_encoder.neck.convs.{3 - stage}.conv."
        shapes |= {f"{convolution}weight": [256, now, 1, 1], f"{convolution}bias": [256]}
    return shapes


@pytest.mark.parametrize("size", list(SIZES))
def test_every_size_of_sam2_is_recognised(size: str) -> None:
    width, stages = SIZES[size]
    others = {key: shape for key, shape in TINY["shapes"].items() if not key.startswith("image_encoder.")}
    state = {key: torch.empty(shape, device="meta") for key, shape in {**others, **trunk(width, stages)}.items()}
    trunk_of = reader.segmenter_from_state(state, "sam2.pt").config.vision_config.backbone_config
    heads = 2 if width > 96 else 1
    assert trunk_of.blocks_per_stage == list(stages)
    assert trunk_of.num_attention_heads_per_stage == [heads, 2 * heads, 4 * heads, 8 * heads]
    assert trunk_of.window_size_per_stage == ([8, 4, 16, 8] if size == "large" else [8, 4, 14, 7])
    # Attention over the whole picture is in the third stage only.
    third = range(sum(stages[:2]), sum(stages[:3]))
    assert len(trunk_of.global_attention_blocks) == 3 and set(trunk_of.global_attention_blocks) <= set(third)


def test_trunk_follows_the_published_list() -> None:
    published = {key: shape for key, shape in TINY["shapes"].items() if key.startswith("image_encoder.")}
    assert trunk(96, (1, 2, 7, 2)) == published


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda state: state.pop("sam_mask_decoder.iou_token.weight"),
            "incomplete or changed segmenter file: mask_decoder.iou_token",
        ),
        (
            lambda state: state.pop("image_encoder.neck.convs.0.conv.weight"),
            "incomplete or changed segmenter file: vision_encoder.neck",
        ),
        (
            lambda state: state.update({"image_encoder.trunk.blocks.12.norm2.weight": torch.zeros(768)}),
            "is a SAM 2 network of an unknown size (13 blocks, 96 wide)",
        ),
    ],
)
def test_what_is_wrong_with_a_sam2_file_is_said(tiny, change: Any, says: str) -> None:
    state = dict(tiny)
    change(state)
    with pytest.raises(ValueError) as caught:
        reader.segmenter_from_state(state, "sam2.pt")
    message = str(caught.value)
    assert message.startswith("sam2.pt is") and says in message and "https://" in message and "\n" not in message


def test_an_old_transformers_is_named(tiny, monkeypatch) -> None:
    monkeypatch.setattr(pack_module("weights.segment_anything_2"), "version", lambda name: "4.56.2")
    with pytest.raises(ValueError, match=r"^sam2\.pt needs a later transformers than \d.*4\.57 for SAM 2\. Update"):
        reader.segmenter_from_state(tiny, "sam2.pt")
