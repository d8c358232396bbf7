"""Grounding DINO: published files against the groundingdino package, its words and boxes, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings

from devtools.pack import pack_module
from truefill_testing.random_dino import PUBLISHED, shallow_dino
from truefill_testing.random_tensors import squares

reader = pack_module("weights.detectors")
dino = pack_module("weights.grounding_dino")
detect = pack_module("selection.detectors")

PACKAGE = pack_module("weights.engines").GROUNDING_DINO
MEAN, DEVIATION = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def answers(network: Any, pixels: torch.Tensor, text: str) -> Any:
    """What a network answers for pixels [3, H, W], in its own precision."""
    words = dino.tokenizer()([text], return_tensors="pt")
    pixels = ((pixels - MEAN) / DEVIATION)[None].to(next(network.parameters()).dtype)
    with torch.inference_mode():
        return network(pixel_values=pixels, **words)


PIXELS = squares(256, 320).movedim(-1, 0)


@pytest.fixture(scope="module")
def exact(dino_network) -> Any:
    """What the network answers for PIXELS in double precision.

    The places of a picture that it looks closer at are the 900 with the best scores, in their order. In single precision some of
    these scores are equal within rounding: the processor says which place comes first, and that changes its box and, a little,
    all the others.
    """
    output = answers(dino_network.double(), PIXELS, PUBLISHED["text"])
    dino_network.float()
    return output


def test_it_answers_as_the_package_does(exact) -> None:
    boxes, logits = exact.pred_boxes[0, PUBLISHED["queries"]], exact.logits[0, PUBLISHED["queries"], :7]
    assert exact.pred_boxes.shape == (1, 900, 4)
    # To the digits that are kept of the package's answers.
    assert float((boxes - torch.tensor(PUBLISHED["boxes"], dtype=torch.float64)).abs().max()) < 2e-6
    assert float((logits - torch.tensor(PUBLISHED["logits"], dtype=torch.float64)).abs().max()) < 1e-4


def test_single_precision_sees_the_same(exact, dino_network) -> None:
    output = answers(dino_network, PIXELS, PUBLISHED["text"])
    for name in ("encoder_last_hidden_state_vision", "encoder_last_hidden_state_text"):
        ours, wanted = getattr(output, name), getattr(exact, name)
        assert ours.dtype == torch.float32
        assert float((ours - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    # Behind them lies the order of the places.
    assert float((output.pred_boxes - exact.pred_boxes).abs().amax(dim=2).median()) < 1e-4


def test_the_depth_of_every_part_is_the_files() -> None:
    config = reader.detector_from_state(shallow_dino(), "shallow.pth").config
    assert (config.encoder_layers, config.decoder_layers, config.text_config.num_hidden_layers) == (1, 2, 1)
    assert config.backbone_config.depths == [1, 1, 1, 1]


@pytest.mark.skipif(PACKAGE.check(PACKAGE.name) is not True, reason=str(PACKAGE.check(PACKAGE.name)))
def test_both_engines_answer_the_same(exact, dino_state) -> None:
    package = reader.detector_from_state(dino_state, "dino.pth", PACKAGE.name)
    assert type(package.network).__module__.startswith("groundingdino.")
    for size in ((120, 150), (7, 1024)):
        found = detect.Detector.of(package, dino.tokenizer()).detect(squares(*size), ["red cup", "spoon"])
        assert len(found) == 900 and {one.label for one in found} <= {"red cup", "spoon"}
    theirs = answers(package.double(), PIXELS, PUBLISHED["text"])
    assert float((theirs.pred_boxes - exact.pred_boxes).abs().max()) < 1e-6
    assert float((theirs.logits[..., :7] - exact.logits[..., :7]).abs().max()) < 1e-5


class PackageNetwork(torch.nn.Module):
    """What our engine touches of the groundingdino package's network: BERT, a tokenizer, captions, a dictionary of answers."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        library = sys.modules["groundingdino.util.get_tokenlizer"]
        self.settings = settings
        self.tokenizer = library.get_tokenlizer("bert-base-uncased")
        self.bert = library.get_pretrained_language_model("bert-base-uncased").embeddings
        self.stop = self.tokenizer.convert_tokens_to_ids(".")
        self.backbone = torch.nn.ModuleList([torch.nn.ModuleDict({"patch_embed": torch.nn.ModuleDict()})])
        self.backbone[0]["patch_embed"]["proj"] = torch.nn.Conv2d(3, 96, 4, 4)

    def forward(self, pixels: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
        words = self.tokenizer(captions, padding="longest", return_tensors="pt").to(pixels.device)
        logits = torch.full((1, 2, 256), -torch.inf)
        # One query for each of the two phrases: where its first token stands.
        starts = [1, 1 + int((words.input_ids[0] == self.stop).nonzero()[0])]
        logits[0, [0, 1], starts] = torch.tensor([2.0, 1.0])
        seen = self.backbone[0]["patch_embed"]["proj"](pixels).mean() * 0
        return {
            "pred_logits": logits,
            "pred_boxes": torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.2, 0.2, 0.2, 0.2]]]) + seen,
        }


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A package in groundingdino's place, as it could be with any transformers; what it was before our engine built with it."""
    tokenizers = ModuleType("groundingdino.util.get_tokenlizer")
    before = {
        name: lambda _, name=name: pytest.fail(name) for name in ("get_tokenlizer", "get_pretrained_language_model")
    }
    vars(tokenizers).update(before)
    models, config = ModuleType("groundingdino.models"), ModuleType("groundingdino.config.GroundingDINO_SwinT_OGC")
    models.build_model = PackageNetwork
    vars(config).update(backbone="swin_T_224_1k", num_queries=2, use_checkpoint=True, use_transformer_ckpt=True)
    for name in ("groundingdino", "groundingdino.util", "groundingdino.config"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (tokenizers, models, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(pack_module("weights.engines").Package, "check", lambda package, engine: True)
    # Its layers take a second to build, and this package's network has no use for them.
    monkeypatch.setattr(transformers, "BertConfig", partial(BertConfig, num_hidden_layers=1))
    yield before
    assert {name: getattr(tokenizers, name) for name in before} == before


def test_the_packages_network_is_built_without_a_download_and_given_our_tokens(package) -> None:
    proj = torch.nn.Conv2d(3, 96, 4, 4).state_dict()
    bert = BertEmbeddings(BertConfig()).state_dict()
    state = {f"module.backbone.0.patch_embed.proj.{key}": tensor for key, tensor in proj.items()}
    state |= {f"module.bert.{key}": tensor for key, tensor in bert.items()} | {
        "module.label_enc.weight": torch.zeros(3)
    }
    network = reader.detector_from_state(state, "dino.pth", PACKAGE.name)
    inner = network.network
    settings = inner.settings
    assert (settings.backbone, settings.use_checkpoint, settings.use_transformer_ckpt) == (
        "swin_T_224_1k",
        False,
        False,
    )
    assert torch.equal(inner.bert.word_embeddings.weight, bert["word_embeddings.weight"])
    assert not any(weight.requires_grad for weight in network.parameters())
    found = detect.Detector.of(network, dino.tokenizer()).detect(squares(40, 50), ["red cup", "spoon"])
    assert [one.label for one in found] == ["red cup", "spoon"]
    assert found[0].score == pytest.approx(torch.tensor(2.0).sigmoid().item())
    assert found[0].box == pytest.approx((20.0, 12.0, 30.0, 28.0))
    # Missing, too many, of another size, and the hub's layout.
    changed = {**state, "module.backbone.0.patch_embed.proj.bias": torch.zeros(3), "module.more": torch.zeros(1)}
    del changed["module.bert.LayerNorm.bias"]
    says = r"file: backbone\.0\.patch_embed\.proj\.bias, bert\.LayerNorm\.bias, more\. Download"
    with pytest.raises(ValueError, match=says):
        reader.detector_from_state(changed, "dino.pth", PACKAGE.name)
    with pytest.raises(
        ValueError, match=r"hub\.pth is no Grounding DINO file as published, which the engine groundingdino-py"
    ):
        reader.detector_from_state({"model.level_embed": torch.zeros(1)}, "hub.pth", PACKAGE.name)


def test_a_package_that_can_not_run_is_said(monkeypatch) -> None:
    engines = pack_module("weights.engines")
    loader = pack_module("nodes.selection").TrueFillLoadDetector
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert "run 'pip install groundingdino-py'" in str(PACKAGE.check(PACKAGE.name))
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "version", lambda name: "5.0.1")
    assert "fails with transformers 5 and later, and here is 5.0.1" in str(PACKAGE.check(PACKAGE.name))
    with pytest.raises(ValueError, match="choose transformers, which answers the same"):
        reader.detector_from_state({}, "dino.pth", PACKAGE.name)
    # The file comes first: without it nothing runs.
    assert "There is no file in" in str(loader.validate_inputs("", PACKAGE.name))
    monkeypatch.setattr(engines, "version", lambda name: "4.57.3")
    assert PACKAGE.check(PACKAGE.name) is True


def test_the_hubs_layout_is_the_same_network(dino_network, dino_state) -> None:
    again = reader.detector_from_state(dino.hub_names(dino_state), "model.safetensors")
    mine, theirs = dino_network.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("kind", ["published", "safetensors"])
def test_a_file_is_its_tensors_and_its_name(tmp_path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(reader, "detector_from_state", lambda *given: given)
    tensors = {"module.one": torch.arange(3.0), "module.two": torch.ones(2, 2)}
    path = tmp_path / f"dino.{'pth' if kind == 'published' else kind}"
    # The published file has them below one key.
    torch.save({"model": tensors}, path) if kind == "published" else save_file(tensors, path)
    state, name, engine = reader.read_detector(path, "an engine")
    assert (name, engine) == (path.name, "an engine")
    assert state.keys() == tensors.keys() and all(torch.equal(state[key], tensors[key]) for key in tensors)


def test_what_transformers_saves_is_read_again(dino_network, tmp_path) -> None:
    dino_network.save_pretrained(tmp_path / "saved")
    again = reader.read_detector(tmp_path / "saved" / "model.safetensors")
    mine, theirs = dino_network.state_dict(), again.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_swin_b_is_recognised() -> None:
    """Its shapes, by the rules of the published configuration: 128 wide, 2, 2, 18, 2 blocks, windows of 12."""
    shapes = {key: shape for key, shape in PUBLISHED["shapes"].items() if not key.startswith("backbone.")}
    swin: dict[str, list[int]] = {"patch_embed.proj.weight": [128, 3, 4, 4], "patch_embed.proj.bias": [128]}
    swin |= {"patch_embed.norm.weight": [128], "patch_embed.norm.bias": [128]}
    for stage, blocks in enumerate((2, 2, 18, 2)):
        wide, heads = 128 * 2**stage, 4 * 2**stage
        for block in range(blocks):
            layers = {"attn.qkv": (3 * wide, wide), "attn.proj": (wide, wide)}
            layers |= {"mlp.fc1": (4 * wide, wide), "mlp.fc2": (wide, 4 * wide)}
            for name, (out, into) in layers.items():
                swin[f"layers.{stage}.blocks.{block}.{name}.weight"] = [out, into]
                swin[f"layers.{stage}.blocks.{block}.{name}.bias"] = [out]
            for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
                swin[f"layers.{stage}.blocks.{block}.{name}"] = [wide]
            swin[f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table"] = [23 * 23, heads]
        if stage < 3:
            swin[f"layers.{stage}.downsample.reduction.weight"] = [2 * wide, 4 * wide]
            swin |= {f"layers.{stage}.downsample.norm.{part}": [4 * wide] for part in ("weight", "bias")}
        if stage:
            swin |= {f"norm{stage}.{part}": [wide] for part in ("weight", "bias")}
            shapes[f"input_proj.{stage - 1}.0.weight"] = [256, wide, 1, 1]
    shapes["input_proj.3.0.weight"] = [256, 1024, 3, 3]
    shapes |= {f"backbone.0.{key}": shape for key, shape in swin.items()}
    model = reader.detector_from_state({key: torch.zeros(shape) for key, shape in shapes.items()}, "swinb.pth")
    backbone = model.config.backbone_config
    assert (backbone.embed_dim, backbone.window_size, list(backbone.depths)) == (128, 12, [2, 2, 18, 2])
    assert list(backbone.num_heads) == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("transformer.level_embed"), "is no Grounding DINO file"),
        (lambda state: state.pop("feat_map.weight"), "is no Grounding DINO file"),
        (
            lambda state: state.pop("transformer.enc_output.weight"),
            "incomplete or changed Grounding DINO file: model.enc_output",
        ),
        (lambda state: state.update(more=torch.zeros(1)), "incomplete or changed Grounding DINO file: more"),
        (
            lambda state: state.update({"transformer.enc_output.bias": torch.zeros(3)}),
            "incomplete or changed Grounding DINO file: model.enc_output.bias",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(dino_state, change: Any, says: str) -> None:
    wrong = dict(dino_state)
    change(wrong)
    with pytest.raises(ValueError) as caught:
        reader.detector_from_state(wrong, "dino.pth")
    message = str(caught.value)
    assert message.startswith("dino.pth is") and says in message and "https://" in message and "\n" not in message


def test_a_file_that_is_none_is_refused(tmp_path) -> None:
    (tmp_path / "a.pth").write_text("not found")
    torch.save({"words": "no tensor"}, tmp_path / "b.pth")
    for name, says in (("a.pth", "a.pth can't be read as weights"), ("b.pth", "b.pth")):
        with pytest.raises(ValueError, match=says) as caught:
            reader.read_detector(tmp_path / name)
        assert "https://" in str(caught.value)


def test_where_there_is_no_file_at_all_it_says_where_to_get_one() -> None:
    loader = pack_module("nodes.selection").TrueFillLoadDetector
    with pytest.raises(
        FileNotFoundError, match=r"There is no groundingdino_swint_ogc\.pth in .*grounding-dino.*https://.*\.pth"
    ):
        loader.execute("groundingdino_swint_ogc.pth")
    assert "https://" in str(loader.validate_inputs("groundingdino_swint_ogc.pth"))
    assert "There is no file in" in str(loader.validate_inputs(""))
    # Another node will name it.
    assert loader.validate_inputs(None) is True


SCALED = {
    (100, 140): (800, 1120),
    (120, 36): (1333, 400),
    # So thin that the authors' rule gives them a side of 0, or fewer places than the 900 that are looked at.
    (1, 1): (800, 800),
    (1, 300): (33, 1200),
    (4096, 1): (1333, 33),
    (8, 4096): (25, 1536),
    (24, 1024): (33, 1322),
}


@pytest.mark.parametrize("size", list(SCALED), ids=str)
def test_detections_are_the_networks_boxes_and_words(small_detector, size: tuple[int, int]) -> None:
    """The package's own steps, literally: scale, ask, sigmoid, the best token of each phrase, corners in pixels."""
    picture, phrases = squares(*size), ["red cup", "spoon"]
    found = small_detector.detect(picture, phrases)
    pixels = F.interpolate(picture.movedim(-1, 0)[None], size=SCALED[size], mode="bilinear", antialias=True)[0]
    output = answers(small_detector.patcher.model.network, pixels, "red cup. spoon.")
    fits = output.logits[0].sigmoid()
    assert len(found) == 900
    for query in range(0, 900, 37):
        # [CLS] red cup . spoon . [SEP]
        scores = {"red cup": float(fits[query, 1:3].max()), "spoon": float(fits[query, 4])}
        one = found[query]
        assert one.label == max(scores, key=lambda phrase: scores[phrase])
        assert one.score == pytest.approx(max(scores.values()), abs=1e-5)
        x, y, wide, high = output.pred_boxes[0, query].tolist()
        corners = (
            (x - wide / 2) * size[1],
            (y - high / 2) * size[0],
            (x + wide / 2) * size[1],
            (y + high / 2) * size[0],
        )
        clipped = [min(max(side, 0.0), limit) for side, limit in zip(corners, (size[1], size[0]) * 2, strict=True)]
        assert one.box == pytest.approx(clipped, abs=0.01)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((500, 500), (800, 800)),
        ((300, 1000), (400, 1333)),
        ((36, 1333), (36, 1333)),
        *SCALED.items(),
    ],
    ids=str,
)
def test_pictures_are_scaled_as_published(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert detect.scaled_size(*size, queries=900) == expected


def test_wrong_pictures_and_texts_are_refused(small_detector) -> None:
    broken = squares(40, 40)
    broken[3, 4, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^'image' holds values that are NaN or infinite"):
        small_detector.detect(broken, ["cup"])
    with pytest.raises(ValueError, match="has 302 tokens, but the detector reads 256 at most"):
        small_detector.detect(squares(40, 40), [f"cup {number}" for number in range(100)])
    with pytest.raises(ValueError, match="in which there is no word"):
        small_detector.detect(squares(40, 40), ["cup", "\u200b"])
