"""Metrics of finished pictures: against their definitions, on networks of the published layouts with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file

from devtools.pack import host_path, pack_module
from truefill_testing.random_dino import shallow_dino

metrics = pack_module("evaluation.picture_metrics")
Detection = pack_module("imaging.detections").Detection
triplets = pack_module("training.world.triplets")
scenes = pack_module("training.world.scenes")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A picture whose hole, a box, is another color than the original's."""
    folder = tmp_path_factory.mktemp("sample")
    scene = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    hole = np.zeros((64, 96), np.uint8)
    hole[10:40, 20:70] = 255
    made = np.where(hole[..., None] > 0, np.uint8(200), scene)
    made[0, 0] = scene[0, 0] ^ 1
    paths = {}
    for name, values in {"picture": made, "original": scene, "hole": hole}.items():
        paths[name] = folder / f"{name}.png"
        Image.fromarray(values).save(paths[name])
    return metrics.Sample(**paths, prompt="a red cup")


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory) -> Path:
    """A file of the published layout."""
    path = tmp_path_factory.mktemp("dino") / "groundingdino_swint_ogc.pth"
    torch.save(shallow_dino(), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP as transformers saves one, with the host's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(host_path() / "comfy" / "sd1_tokenizer")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


def other(sample, **changes):
    given = {name: getattr(sample, name) for name in ("picture", "original", "hole", "prompt")}
    return metrics.Sample(**{**given, **changes})


def test_the_background_is_what_is_not_hole(sample):
    found = metrics.make_metric("background", {})(sample)
    known = 64 * 96 - 30 * 50
    assert found["background max"] == pytest.approx(1.0, abs=1e-4)
    assert found["background mean"] == pytest.approx(1.0 / known, rel=1e-3)
    assert found["seam"] != 0


@pytest.mark.parametrize("name", ["background", "lpips"])
def test_there_is_no_figure_without_an_original_of_the_same_size(name, sample, alexnet, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    metric = metrics.make_metric(name, {"lpips": alexnet})
    for change in ({"original": None}, {"hole": None}, {"picture": tmp_path / "small.png"}):
        assert metric(other(sample, **change)) == {}


@pytest.mark.parametrize(("name", "key"), [("clip", "CLIP"), ("local-clip", "local CLIP")])
def test_clip_is_a_cosine_of_embeddings(name, key, sample, clip):
    found = metrics.make_metric(name, {"clip": clip})(sample)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    image = Image.open(sample.picture)
    image = image.crop((20, 10, 70, 40)) if name == "local-clip" else image
    with torch.no_grad():
        vision = model.vision_model(**processor.image_processor(image, return_tensors="pt")).pooler_output
        text = model.text_model(**processor.tokenizer(["a red cup"], return_tensors="pt")).pooler_output
        one, two = model.visual_projection(vision)[0], model.text_projection(text)[0]
    assert found == {key: pytest.approx(100 * float(one @ two / one.norm() / two.norm()), abs=1e-3)}
    assert metrics.make_metric(name, {"clip": clip})(other(sample, prompt=None)) == {}


def test_the_aesthetic_score_is_a_linear_head_on_the_normed_embedding(sample, clip, tmp_path):
    torch.manual_seed(1)
    # As published: linear layers with dropout between them.
    head = torch.nn.Sequential(
        torch.nn.Linear(12, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)
    )
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.pth")
    found = metrics.make_metric("aesthetic", {"clip": clip, "aesthetic": tmp_path / "head.pth"})(sample)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    given = transformers.CLIPImageProcessor.from_pretrained(clip)(Image.open(sample.picture), return_tensors="pt")
    with torch.no_grad():
        embedding = F.normalize(model.visual_projection(model.vision_model(**given).pooler_output))
        assert found == {"aesthetic": pytest.approx(float(head.eval()(embedding)), abs=1e-4)}
    torch.save({"layers.0.weight": torch.zeros(3, 768), "layers.0.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="whose embeddings have 12 values"):
        metrics.make_metric("aesthetic", {"clip": clip, "aesthetic": tmp_path / "other.pth"})


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    """A file of torchvision's layout."""
    from torchvision.models import alexnet as make

    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save({name: value for name, value in make(weights=None).state_dict().items() if "features" in name}, path)
    return path


def test_lpips_looks_at_the_background_alone(sample, alexnet, tmp_path):
    metric = metrics.make_metric("lpips", {"lpips": alexnet})
    first = metric(sample)["background LPIPS"]
    assert first > 0
    values = np.asarray(Image.open(sample.picture)).copy()
    values[10:40, 20:70] = 7
    Image.fromarray(values).save(tmp_path / "other hole.png")
    assert metric(other(sample, picture=tmp_path / "other hole.png"))["background LPIPS"] == first
    values[50:60] ^= 0x40
    Image.fromarray(values).save(tmp_path / "changed.png")
    assert metric(other(sample, picture=tmp_path / "changed.png"))["background LPIPS"] > 10 * first
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"is no AlexNet of torchvision, it has no features\.0\.weight"):
        metrics.make_metric("lpips", {"lpips": tmp_path / "empty.pth"})


def test_the_demo_asks_for_color_and_shape(tmp_path):
    metric = metrics.make_metric("demo", {})
    found = {}
    for index in range(4):
        triplet = triplets.make_triplet("test", index)
        Image.fromarray(triplet.scene.picture).save(tmp_path / "scene.png")
        Image.fromarray((255 * triplet.hole).astype(np.uint8)).save(tmp_path / "hole.png")
        asked = metrics.Sample(picture=tmp_path / "scene.png", hole=tmp_path / "hole.png", prompt=triplet.prompt)
        found[triplet.prompt] = metric(asked)
        assert metric(other(asked, prompt="a photo of my cat")) == {}
    # A scene whose hole nobody has filled does not show the thing.
    assert all(value in ({"as asked (demo)": 0.0}, {"as asked (demo)": 1.0}) for value in found.values())


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("clip", {}, r"CLIP was not named: get it from https://\S+ \(the whole folder\) and say --weights clip=PATH"),
        ("detector", {"detector": Path("/nowhere")}, "Grounding DINO is not at /nowhere: get it from"),
        ("aesthetic", {}, "The aesthetic predictor was not named"),
        ("lpips", {}, "AlexNet was not named"),
    ],
)
def test_missing_weights_are_a_sentence(name, weights, said):
    with pytest.raises(ValueError, match=said):
        metrics.make_metric(name, weights)


def test_a_folder_of_something_else_is_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no folder of CLIP in transformers' layout"):
        metrics.make_metric("clip", {"clip": tmp_path})
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is no Grounding DINO file"):
        metrics.make_metric("detector", {"detector": tmp_path / "other.safetensors"})


def test_a_thing_is_there_where_a_sure_box_has_its_middle_in_the_hole(sample, dino_file):
    metric = metrics.make_metric("detector", {"detector": dino_file})
    asked = []

    def detect(picture, phrases):
        asked.append((tuple(picture.shape), phrases))
        return found

    # What the network says of random weights means nothing; that it is asked, and with what, is seen first.
    assert metric(sample)["detected"] in (0.0, 1.0)
    metric._detector.detect = detect
    inside, beside = (30.0, 15.0, 60.0, 35.0), (0.0, 0.0, 20.0, 10.0)
    for boxes, wanted in ({inside: 0.31}, 1.0), ({inside: 0.29, beside: 0.9}, 0.0), ({}, 0.0):
        found = [Detection(box, "a red cup", score) for box, score in boxes.items()]
        assert metric(other(sample, prompt="A red cup. ")) == {"detected": wanted}
    assert asked[0] == ((64, 96, 3), ["a red cup"])
    assert metric(other(sample, hole=None)) == {}


def test_a_box_counts_by_its_middle():
    hole = torch.zeros(10, 10)
    hole[4:6, 4:6] = 1
    assert metrics._middle_in((0.0, 0.0, 10.0, 10.0), hole)
    assert not metrics._middle_in((0.0, 0.0, 4.0, 4.0), hole)
    assert not metrics._middle_in((0.0, 0.0, 30.0, 30.0), hole)
