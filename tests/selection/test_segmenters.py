"""Segment Anything: published files against the segment-anything package, clicks on pictures of any size, and what is refused."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import segment_anything
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from devtools.pack import pack_module
from truefill_testing.random_segmenters import PROMPTS, SIDE, Prompt, predicted, small_sam
from truefill_testing.random_segmenters import smooth_picture as picture

reader = pack_module("weights.segmenters")
segment = pack_module("selection.segmenters")
Marks = pack_module("imaging.prompts").Marks


@pytest.fixture(scope="module")
def sam():
    return small_sam()


@pytest.fixture(scope="module")
def file(sam, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sams") / "small.pth"
    torch.save(sam.state_dict(), path)
    return path


@pytest.fixture
def segmenter(file):
    return segment.Segmenter.of(reader.read_segmenter(file))


@pytest.mark.parametrize("size", [(SIDE, 96), (96, SIDE), (61, 77), (300, 205)], ids=str)
@pytest.mark.parametrize("name", list(PROMPTS))
def test_it_answers_as_the_package_does(sam, segmenter, name: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    (found,) = segmenter.segment(image, [PROMPTS[name]])
    logits, scores = predicted(sam, image, PROMPTS[name])
    assert found.logits.shape == (3, *size)
    assert float(logits.std()) > 0.05, "a flat answer would say nothing"
    assert float((found.logits - logits).abs().max()) < 1e-4 * max(1.0, float(logits.abs().max()))
    assert torch.allclose(found.scores, scores, atol=1e-4)
    assert 0.01 < float((found.logits > 0).float().mean()) < 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(PROMPTS))
def test_half_precision_finds_the_same(file, name: str, dtype: torch.dtype) -> None:
    image = picture(300, 205)
    exact = segment.Segmenter.of(reader.read_segmenter(file)).segment(image, [PROMPTS[name]])[0]
    half = segment.Segmenter.of(reader.read_segmenter(file))
    half.patcher.model.to(dtype)
    found = half.segment(image, [PROMPTS[name]])[0]
    assert found.logits.dtype == torch.float32 and found.logits.isfinite().all()
    assert float(((found.logits > 0) != (exact.logits > 0)).float().mean()) < (0.01 if dtype == torch.float16 else 0.06)


def test_a_rough_mask_is_its_logits_and_its_box(sam, segmenter) -> None:
    image, rough = picture(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    rough[32:96, 40:80] = 1.0
    (found,) = segmenter.segment(image, [Prompt(rough=rough)])
    low = F.interpolate(rough[None, None], size=(32, 32), mode="bilinear", antialias=True)
    prompt = Prompt(box=(38.0, 28.8, 82.0, 99.2), rough=16 * low - 8)
    logits, scores = predicted(sam, image, prompt)
    assert torch.allclose(found.logits, logits, atol=1e-4 * float(logits.abs().max()))
    assert torch.allclose(found.scores, scores, atol=1e-4)
    # A mask of another size says nearly the same: its edge is softer.
    (larger,) = segmenter.segment(image, [Prompt(rough=rough.repeat_interleave(2, 0).repeat_interleave(2, 1))])
    assert float((larger.logits - logits).abs().max()) < 0.1 * float(logits.std())


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_every_key_of_the_published_networks_has_its_place(kind: str) -> None:
    with torch.device("meta"):
        published = segment_anything.sam_model_registry[kind]()
    state = published.state_dict()
    assert reader.segmenter_from_state(state, f"{kind}.pth", "segment-anything").state_dict().keys() == state.keys()
    model = reader.segmenter_from_state(state, f"{kind}.pth")
    twice = state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].numel()
    assert sum(t.numel() for t in model.state_dict().values()) == sum(t.numel() for t in state.values()) + twice
    config = model.config.vision_config
    assert (config.image_size, config.patch_size, config.window_size) == (1024, 16, 14)
    assert config.num_attention_heads == published.image_encoder.blocks[0].attn.num_heads
    assert list(config.global_attn_indexes) == [
        index for index, block in enumerate(published.image_encoder.blocks) if block.window_size == 0
    ]


@pytest.mark.parametrize("size", [(61, 77), (300, 205)], ids=str)
@pytest.mark.parametrize("name", list(PROMPTS))
def test_both_engines_answer_the_same(file, name: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    rough = (picture(*size, seed=1)[..., 0] > 0.5).float()
    package = segment.Segmenter.of(reader.read_segmenter(file, "segment-anything"), half=False)
    ours = segment.Segmenter.of(reader.read_segmenter(file))
    assert type(package.patcher.model.network.mask_decoder).__module__.startswith("segment_anything.")
    prompts = [PROMPTS[name], replace(PROMPTS[name], rough=rough)]
    for theirs, mine in zip(package.segment(image, prompts), ours.segment(image, prompts), strict=True):
        assert float((theirs.logits - mine.logits).abs().max()) < 1e-4 * float(mine.logits.abs().max())
        assert torch.allclose(theirs.scores, mine.scores, atol=1e-4)
    assert package.memory == ours.memory


def test_the_package_stays_in_single_precision(file, monkeypatch) -> None:
    node = pack_module("nodes.selection")
    monkeypatch.setattr(segment.comfy.model_management, "should_use_fp16", lambda device: True)
    monkeypatch.setattr(node.SEGMENTERS, "path", lambda name: str(file))
    for engine, dtype in (("transformers", torch.float16), ("segment-anything", torch.float32)):
        (segmenter,) = node.TrueFillLoadSegmenter.execute("small.pth", engine).result
        assert {weight.dtype for weight in segmenter.patcher.model.parameters()} == {dtype}
        assert segmenter.segment(picture(61, 77), [PROMPTS["points"]])[0].logits.isfinite().all()


@pytest.mark.parametrize("engine", ["transformers", "segment-anything"])
def test_a_tensor_of_another_size_is_named(sam, engine: str) -> None:
    changed = {**sam.state_dict(), "mask_decoder.iou_token.weight": torch.zeros(2, 5)}
    with pytest.raises(
        ValueError, match=r"^small\.pth is an incomplete or changed segmenter file: .*iou_token\.weight\. Down"
    ):
        reader.segmenter_from_state(changed, "small.pth", engine)


def test_what_the_package_can_not_run_is_said(sam, file, tmp_path, monkeypatch) -> None:
    torch.save(reader.read_segmenter(file).state_dict(), tmp_path / "hub.pth")
    torch.save({**sam.state_dict(), "mask_decoder.hf_token.weight": torch.zeros(1, 32)}, tmp_path / "hq.pth")
    for name in ("hub.pth", "hq.pth"):
        with pytest.raises(ValueError, match=f"{name} is not as Segment Anything was published.*choose transformers"):
            reader.read_segmenter(tmp_path / name, "segment-anything")
    engine = pack_module("weights.engines").SEGMENT_ANYTHING
    assert engine.check("segment-anything") is engine.check("transformers") is engine.check(None) is True
    monkeypatch.setattr(pack_module("weights.engines"), "find_spec", lambda name: None)
    assert "run 'pip install segment-anything'" in str(engine.check("segment-anything"))
    assert engine.check("transformers") is True
    with pytest.raises(ValueError, match="is not installed"):
        reader.read_segmenter(file, "segment-anything")
    loader = pack_module("nodes.selection").TrueFillLoadSegmenter
    assert "is not installed" in str(loader.validate_inputs("demo", "segment-anything"))
    assert loader.validate_inputs("demo", "transformers") is True


def test_safetensors_and_the_hubs_layout_are_the_same_network(sam, file, tmp_path) -> None:
    image, prompt = picture(80, 110), PROMPTS["points"]
    (expected,) = segment.Segmenter.of(reader.read_segmenter(file)).segment(image, [prompt])
    save_file({name: tensor.contiguous() for name, tensor in sam.state_dict().items()}, tmp_path / "a.safetensors")
    hub = reader.read_segmenter(file).state_dict()
    del hub["prompt_encoder.shared_embedding.positional_embedding"]
    save_file(hub, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        (found,) = segment.Segmenter.of(reader.read_segmenter(tmp_path / f"{name}.safetensors")).segment(
            image, [prompt]
        )
        assert torch.allclose(found.logits, expected.logits, atol=1e-5)
        assert torch.allclose(found.scores, expected.scores, atol=1e-5)


class Marker:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def wrong_files(folder: Path, sam) -> dict[str, tuple[Path, str]]:
    """Files that are none of ours, and what is said of them."""
    state = sam.state_dict()
    half = folder / "half.pth"
    torch.save(state, half)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (folder / "code.pth").write_bytes(pickle.dumps({"weights": Marker(folder / "made")}))
    (folder / "text.pth").write_text("not found")
    (folder / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    one = torch.zeros(1)
    others = {
        "sam3": ({"detector.backbone.vision_backbone.trunk.pos_embed": one}, "is a SAM 3 file, which ComfyUI's own"),
        "light": ({"image_encoder.patch_embed.seq.0.c.weight": one}, "is a MobileSAM or SAM-HQ Light file"),
        "unet": ({"model.diffusion_model.out.2.bias": one}, "is a diffusion checkpoint"),
        "other": ({"fc.weight": one}, "is something else"),
        "missing": (
            {k: v for k, v in state.items() if k != "mask_decoder.iou_token.weight"},
            "mask_decoder.iou_token.weight",
        ),
        "more": ({**state, "extra.weight": one}, "incomplete or changed segmenter file: extra.weight"),
    }
    for name, (tensors, _) in others.items():
        torch.save(tensors, folder / f"{name}.pth")
    read = {name: (folder / f"{name}.pth", "can't be read as weights") for name in ("half", "code", "text")}
    read["cut"] = folder / "cut.safetensors", "can't be read as weights"
    return read | {name: (folder / f"{name}.pth", says) for name, (_, says) in others.items()}


def test_wrong_files_get_one_sentence_and_run_nothing(sam, tmp_path) -> None:
    for path, says in wrong_files(tmp_path, sam).values():
        with pytest.raises(ValueError, match=says.replace(".", r"\.")) as caught:
            reader.read_segmenter(path)
        message = str(caught.value)
        assert message.startswith(path.name) and "\n" not in message and "https://" in message
    assert not (tmp_path / "made").exists()


def test_where_there_is_no_file_at_all_it_says_where_to_get_one() -> None:
    loader = pack_module("nodes.selection").TrueFillLoadSegmenter
    with pytest.raises(FileNotFoundError, match=r"There is no sam_vit_b_01ec64\.pth in .*sams.*https://.*\.pth"):
        loader.execute("sam_vit_b_01ec64.pth")
    assert "https://" in str(loader.validate_inputs("sam_vit_b_01ec64.pth"))
    assert loader.validate_inputs("demo") is True
    choice, engine = loader.define_schema().inputs
    assert engine.options == ["transformers", "segment-anything"] and engine.default == "transformers"
    # A photo is not for the demo's.
    assert choice.options == ["demo"] and choice.default == "sam_vit_b_01ec64.pth"


def test_a_picture_that_is_none_is_refused(segmenter) -> None:
    broken = picture(32, 32)
    broken[3, 4, 1] = float("nan")
    for wrong in (broken, picture(32, 32)[..., :2], picture(32, 32)[..., 0]):
        with pytest.raises(ValueError, match=r"^'image' h"):
            segmenter.segment(wrong, [PROMPTS["a point"]])


def test_a_picture_is_looked_at_once(segmenter, monkeypatch) -> None:
    looks = []
    model = segmenter.patcher.model.network
    look = model.get_image_embeddings
    monkeypatch.setattr(model, "get_image_embeddings", lambda pixels: looks.append(1) or look(pixels))
    first, second = picture(64, 64, seed=1), picture(64, 64, seed=2)
    (once,) = segmenter.segment(first, [PROMPTS["a point"]])
    segmenter.segment(first, [PROMPTS["box"], PROMPTS["points"]])
    assert len(looks) == 1
    segmenter.segment(second, [PROMPTS["a point"]])
    (again,) = segmenter.segment(first.clone(), [PROMPTS["a point"]])
    assert len(looks) == 2 and torch.equal(once.logits, again.logits)
    for seed in range(segment.KEPT_PICTURES):
        segmenter.segment(picture(32, 32, seed=seed), [PROMPTS["a point"]])
    segmenter.segment(first, [PROMPTS["a point"]])
    assert len(looks) == 2 + segment.KEPT_PICTURES + 1


def found(*masks: tuple[int, float]) -> Any:
    """Answers that cover so many pixels of 10, with these scores."""
    logits = torch.stack([(torch.arange(10) < size).float() - 0.5 for size, _ in masks])[:, None]
    return segment.Found(logits, torch.tensor([score for _, score in masks]))


def test_the_answers_are_picked_by_score_or_size() -> None:
    thing = found((6, 0.5), (2, 0.9), (9, 0.7))
    for which, size, score in (("best", 2, 0.9), ("smallest", 2, 0.9), ("middle", 6, 0.5), ("largest", 9, 0.7)):
        mask, says = thing.pick(which)
        assert int(mask.sum()) == size and says == pytest.approx(score)
    mask, says = thing.pick("all together")
    assert int(mask.sum()) == 9 and says == pytest.approx(0.9)


def test_things_of_a_picture_are_one_mask_or_each_its_own(segmenter) -> None:
    pictures = torch.stack([picture(48, 64, seed) for seed in range(3)])
    prompts = [[PROMPTS["a point"], PROMPTS["box"]], [], [PROMPTS["points"]]]
    each = [[thing.pick("best") for thing in segmenter.segment(pictures[i], prompts[i])] for i in (0, 2)]
    masks, scores = segment.segment_batch(segmenter, pictures, prompts, "best")
    assert masks.shape == (3, 48, 64) and masks.dtype == torch.float32
    assert torch.equal(masks[0] > 0, each[0][0][0] | each[0][1][0])
    assert not masks[1].any() and scores[1] == 0.0
    assert torch.equal(masks[2] > 0, each[1][0][0]) and scores[2] == each[1][0][1]
    assert scores[0] == pytest.approx((each[0][0][1] + each[0][1][1]) / 2)
    apart, all_scores = segment.segment_batch(segmenter, pictures, prompts, "best", separate=True)
    assert apart.shape == (4, 48, 64) and not apart[2].any()
    assert torch.equal(apart[1] > 0, each[0][1][0]) and all_scores[1] == each[0][1][1]


def marks(include=(), exclude=(), drawn=()) -> Any:
    return Marks(list(include), list(exclude), list(drawn))


def test_points_go_with_the_box_that_they_lie_in() -> None:
    boxes = [(0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)]
    given = marks([(5.0, 5.0), (50.0, 50.0)], [(1.0, 1.0)], boxes[:1])
    ((one, two),) = segment.batch_prompts(given, [boxes[1:]])
    assert one == Prompt([(5.0, 5.0)], [(1.0, 1.0)], boxes[0]) and two == Prompt([], [(1.0, 1.0)], boxes[1])
    ((points,),) = segment.batch_prompts(marks([(1.0, 2.0), (3.0, 4.0)]), [[]])
    assert points == Prompt([(1.0, 2.0), (3.0, 4.0)], [])
    # Nothing says where something is: in any picture, or in the second.
    assert segment.batch_prompts(marks(exclude=[(1.0, 1.0)]), [[], []]) == [[], []]
    assert segment.batch_prompts(marks(), [boxes, []]) == [[Prompt([], [], box) for box in boxes], []]


def test_a_rough_mask_goes_with_its_picture() -> None:
    full = torch.ones(2, 4, 4)
    # What soft mask models leave of nothing.
    empty = torch.full((4, 4), 2 / 255)
    each = segment.batch_prompts(marks(), [[], []], torch.stack([full[0], empty]))
    assert [len(mine) for mine in each] == [1, 0] and torch.equal(each[0][0].rough, full[0])
    for shared in (full[0], full[:1]):
        each = segment.batch_prompts(marks(), [[], [(0.0, 0.0, 2.0, 2.0)]], shared)
        assert all(torch.equal(one.rough, full[0]) for (one,) in each) and each[1][0].box == (0.0, 0.0, 2.0, 2.0)
    with pytest.raises(
        ValueError, match="'rough' has 2 masks, but 'image' is a batch of 3: connect one mask, or one for"
    ):
        segment.batch_prompts(marks(), [[], [], []], full)


def test_a_prompt_that_points_nowhere_is_refused(segmenter) -> None:
    with pytest.raises(ValueError, match="needs a point on the thing, a box around it, or a rough mask"):
        segmenter.segment(picture(32, 32), [Prompt(exclude=[(1.0, 1.0)])])
