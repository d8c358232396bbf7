"""Columns find their inputs, and rows become graphs."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from devtools.batch.inputs import Target, fill_in, make_plan, read_graph, seed_of
from devtools.batch.table import Row
from devtools.paths import UserError
from truefill_testing.comfy_stand_in import NODES, graph

pytestmark = pytest.mark.quick


def plan(*columns, of=None, **maps):
    return make_plan(of or graph(), columns, maps, NODES)


def test_plain_names_find_what_they_can_only_mean():
    found = plan("name", "image", "mask", "prompt", "negative", "seed", "steps")
    assert found.targets == {
        "image": [Target("1", "image", "picture")],
        "prompt": [Target("2", "prompt", "STRING")],
        "negative": [Target("3", "text", "STRING")],
        "seed": [Target("4", "seed", "INT")],
        "steps": [Target("4", "steps", "INT")],
    }
    assert found.hole == "image" and found.pictures == ["image"]


def test_ids_titles_and_maps_name_an_input():
    expected = [Target("3", "text", "STRING")]
    assert plan("3.text").targets["3.text"] == expected
    assert plan("Negative Prompt.text").targets["Negative Prompt.text"] == expected
    assert plan("words", words="3.text").targets["words"] == expected
    # A node without a title is called by its class.
    assert plan("KSampler.seed").targets["KSampler.seed"] == [Target("4", "seed", "INT")]


@pytest.mark.parametrize(
    ("columns", "maps", "said"),
    [
        (["9.text"], {}, "no node of the name '9'; take an id of 1 Example Photo"),
        (["3.words"], {}, "has no input 'words'; it has text"),
        (["4.positive"], {}, "linked to another node"),
        (["color"], {}, "'color' could mean no input"),
        (["mask"], {}, "goes with one picture, and 0 columns are pictures"),
        (["prompt", "2.prompt"], {}, "'prompt' and '2.prompt' go to the same input"),
        (["prompt"], {"text": "3.text"}, "--map names the column 'text'"),
    ],
)
def test_a_column_that_fits_nowhere_is_one_sentence(columns, maps, said):
    with pytest.raises(UserError, match=said):
        plan(*columns, **maps)


def test_two_nodes_of_a_name_and_two_prompts_have_to_be_told_apart():
    twice = {**graph(), "6": {"class_type": "TrueFillEncodePrompt", "inputs": {"prompt": "b", "strength": 1.0}}}
    with pytest.raises(UserError, match=r"2 nodes \(2, 6\)"):
        plan("TrueFillEncodePrompt.prompt", of=twice)
    with pytest.raises(UserError, match=r"'prompt' could mean the inputs 2.prompt, 6.prompt"):
        plan("prompt", of=twice)
    with pytest.raises(UserError, match="does not have the node Strange"):
        plan("prompt", of={"1": {"class_type": "Strange", "inputs": {}}})


def picture(path, values, mode):
    Image.fromarray(values, mode).save(path)


def test_a_row_fills_a_graph_and_leaves_it_as_it_was(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    hole = np.zeros((6, 9), np.uint8)
    hole[2:4, 3:7], hole[1, 1] = 255, 100
    picture(tmp_path / "a b.png", colors, "RGB")
    picture(tmp_path / "m.png", hole, "L")
    of, values = (
        graph(),
        {"image": "a b.png", "mask": "m.png", "prompt": "a star", "seed": "7", "2.strength": "0.5", "on": "no"},
    )
    found = plan(*values)
    made, uploads = fill_in(of, found, Row(1, "x", values), tmp_path)
    assert of == graph()
    assert made["2"]["inputs"] == {"prompt": "a star", "strength": 0.5}
    assert made["4"]["inputs"]["seed"] == 7 and made["4"]["inputs"]["on"] is False
    # The example makes room for the picture.
    assert made["1"]["class_type"] == "LoadImage" and len(uploads) == 1
    sent = np.asarray(Image.open(io.BytesIO(uploads[0].data)))
    assert (sent[..., :3] == colors).all() and (sent[..., 3] == 255 - hole).all()
    assert seed_of(made, found) == 7
    # What a row does not say stays.
    assert fill_in(of, found, Row(2, "y", {}), tmp_path) == (graph(), [])
    # Without a mask a picture goes as it is.
    _, (alone,) = fill_in(of, found, Row(3, "z", {"image": "a b.png"}), tmp_path)
    assert alone.data == (tmp_path / "a b.png").read_bytes()


def test_a_cameras_picture_is_turned_upright_with_its_mask(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    turned = Image.Exif()
    # Lies on its side: the first row is the right column.
    turned[0x0112] = 6
    Image.fromarray(colors).save(tmp_path / "a.png", exif=turned)
    hole = np.zeros((9, 6), np.uint8)
    hole[0, 5] = 255
    picture(tmp_path / "m.png", hole, "L")
    values = {"image": "a.png", "mask": "m.png"}
    _, (upload,) = fill_in(graph(), plan(*values), Row(1, "x", values), tmp_path)
    sent = np.asarray(Image.open(io.BytesIO(upload.data)))
    assert (sent[..., :3] == np.rot90(colors, -1)).all() and (sent[..., 3] == 255 - hole).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": "seven"}, "row 4, seed: 'seven' is not a whole number"),
        ({"seed": 1.5}, "row 4, seed: '1.5' is not a whole number"),
        ({"2.strength": "high"}, "'high' is not a number"),
        ({"on": "perhaps"}, "'perhaps' is neither true nor false"),
        ({"image": "gone.png"}, "gone.png can't be read"),
        ({"image": "wide.png", "mask": "m.png"}, r"row 4: the mask has 9 x 6 pixels and the picture 10 x 6"),
        ({"image": "words.png", "mask": "m.png"}, "row 4: the picture or its mask is no picture"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence(tmp_path, values, said):
    picture(tmp_path / "m.png", np.zeros((6, 9), np.uint8), "L")
    picture(tmp_path / "wide.png", np.zeros((6, 10, 3), np.uint8), "RGB")
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(UserError, match=said):
        fill_in(graph(), plan(*values), Row(4, "x", values), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "not JSON"),
        ('{"nodes": []}', "Export \\(API\\)"),
        ("[]", "no graph in API format"),
        ('{"1": 2}', "API"),
    ],
)
def test_a_graph_that_is_none_is_one_sentence(tmp_path, text, said):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_graph(tmp_path / "g.json")
