"""The synthetic world: the same everywhere, split cleanly, and drawn as its captions say."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from devtools.pack import pack_module

attributes = pack_module("training.world.attributes")
backgrounds = pack_module("training.world.backgrounds")
captions = pack_module("training.world.captions")
crops = pack_module("training.world.crops")
holes = pack_module("training.world.holes")
scenes = pack_module("training.world.scenes")
shapes = pack_module("training.world.shapes")
triplets = pack_module("training.world.triplets")

SIZE = attributes.SIZE
ITEM = attributes.SceneObject("star", "red", "plain", 128.0, 120.0, 50.0, 10.0, 30.0, 0.2)


def alone(item) -> np.ndarray:
    """The mask of an object that nothing covers."""
    return scenes.render_objects(np.zeros((SIZE, SIZE, 3), dtype=np.float32), (item,))[0]


@pytest.fixture(scope="module")
def some_scenes() -> list:
    return [scenes.make_scene("dev", index) for index in range(60)]


def test_a_scene_depends_on_split_and_index_only():
    first, again = scenes.make_scene("train", 7), scenes.make_scene("train", 7)
    assert first.layout == again.layout and first.global_caption == again.global_caption
    np.testing.assert_array_equal(first.picture, again.picture)
    np.testing.assert_array_equal(first.masks, again.masks)


def test_the_world_is_the_one_that_models_were_trained_on():
    """A failure here means that WORLD_VERSION has to be raised and the models trained again."""
    assert attributes.WORLD_VERSION == 1
    assert [scenes.make_scene("train", index).global_caption for index in range(3)] == [
        "an orange dotted triangle, a white checkered triangle, an orange dotted moon and a white dotted moon on a wooden table",
        "a yellow striped circle and a yellow dotted cross in front of green hills",
        "a pink dotted heart, a purple dotted circle, a blue heart, a yellow checkered heart and an orange triangle at sunset",
    ]


def test_no_layout_occurs_in_two_splits():
    layouts = [scenes.plan_scene(split, index) for split in attributes.SPLITS for index in range(400)]
    layouts += [triplets.make_triplet(split, index).scene.layout for split in attributes.SPLITS for index in range(20)]
    # An empty triplet scene has nothing to tell it from another one.
    layouts = [layout for layout in layouts if layout.objects]
    assert len(set(layouts)) == len(layouts)


@pytest.mark.parametrize(("split", "index"), [("validation", 0), ("train", -1)])
def test_there_are_no_other_splits_and_indices(split, index):
    with pytest.raises(ValueError, match=r"split|index"):
        scenes.make_scene(split, index)


def test_pictures_and_masks_have_their_shapes(some_scenes):
    for scene in some_scenes:
        count = len(scene.layout.objects)
        assert 1 <= count <= scenes.MAX_OBJECTS
        assert scene.picture.shape == (SIZE, SIZE, 3) and scene.picture.dtype == np.uint8
        assert scene.masks.shape == (count, SIZE, SIZE) and scene.masks.dtype == bool
        assert len(scene.local_captions) == count
    assert {len(scene.layout.objects) for scene in some_scenes} == {1, 2, 3, 4, 5}
    assert {scene.layout.background for scene in some_scenes} == set(backgrounds.BACKGROUNDS)


def test_objects_hardly_hide_each_other(some_scenes):
    for scene in some_scenes:
        assert scene.masks.sum(axis=0).max() <= 1
        for item, mask in zip(scene.layout.objects, scene.masks, strict=True):
            assert mask.sum() > 0.8 * alone(item).sum()


def test_no_two_objects_of_a_scene_are_called_the_same(some_scenes):
    for scene in some_scenes:
        kinds = [(item.shape, item.colour) for item in scene.layout.objects]
        assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("colour", attributes.COLOURS)
@pytest.mark.parametrize("shape", attributes.SHAPES)
def test_a_plain_object_has_the_colour_of_its_name(shape, colour):
    item = replace(ITEM, shape=shape, colour=colour)
    picture = np.full((SIZE, SIZE, 3), 128.0, dtype=np.float32)
    mask = scenes.render_objects(picture, (item,))[0]
    mean = picture[mask].mean(axis=0)
    nearest = min(attributes.COLOURS, key=lambda name: np.linalg.norm(mean - attributes.COLOURS[name]))
    assert nearest == colour
    np.testing.assert_allclose(mean, attributes.COLOURS[colour], atol=12)


@pytest.mark.parametrize("pattern", attributes.PATTERNS[1:])
@pytest.mark.parametrize("colour", attributes.COLOURS)
def test_a_pattern_shows_both_of_its_tones(colour, pattern):
    item = replace(ITEM, shape="square", colour=colour, pattern=pattern, radius=32.0)
    picture = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    pixels = picture[scenes.render_objects(picture, (item,))[0]]
    pixels = picture[alone(item)]
    for tone in (attributes.COLOURS[colour], attributes.PATTERN_TONES[colour]):
        share = (np.abs(pixels - tone).max(axis=1) < 25).mean()
        assert 0.15 < share < 0.85


@pytest.mark.parametrize("radius", [28.0, 60.0])
def test_shapes_differ_from_each_other(radius):
    masks = {shape: alone(replace(ITEM, shape=shape, radius=radius)) for shape in attributes.SHAPES}
    for one, other in itertools.combinations(attributes.SHAPES, 2):
        overlap = (masks[one] & masks[other]).sum() / (masks[one] | masks[other]).sum()
        assert overlap < 0.9, (one, other)


def test_edges_are_smooth_and_areas_true():
    circle = replace(ITEM, shape="circle", radius=40.0)
    polygons = shapes.outlines(circle)
    box = shapes.bounds(polygons[0], 2.0)
    covered = shapes.draw(polygons, box)
    assert covered.sum() == pytest.approx(np.pi * (0.88 * 40.0) ** 2, rel=0.01)
    assert ((covered > 0.05) & (covered < 0.95)).sum() > 100
    rows, columns = np.indices(covered.shape)
    centre = [(covered * axis).sum() / covered.sum() + 0.5 for axis in (columns, rows)]
    np.testing.assert_allclose(np.add(centre, box[:2]), (circle.x, circle.y), atol=0.1)


def test_turning_turns():
    upright, turned = (alone(replace(ITEM, shape="triangle", angle=angle)) for angle in (0.0, 25.0))
    assert (upright & turned).sum() / (upright | turned).sum() < 0.9


def test_captions_name_what_is_there(some_scenes):
    for scene in some_scenes:
        for item, caption in zip(scene.layout.objects, scene.local_captions, strict=True):
            assert item.shape in caption.split() and item.colour in caption.split()
            assert (item.pattern in caption.split()) == (item.pattern != "plain")
            assert caption in scene.global_caption
        assert backgrounds.PHRASES[scene.layout.background][0] in scene.global_caption


def test_the_usual_words():
    assert captions.local_caption("star", "red", "striped") == "a red striped star"
    assert captions.local_caption("ring", "orange", "plain") == "an orange ring"
    objects = (replace(ITEM, pattern="striped"), replace(ITEM, shape="circle", colour="blue"))
    assert captions.global_caption(objects, "wood") == "a red striped star and a blue circle on a wooden table"


@pytest.mark.parametrize("wrong", [("blob", "red", "plain"), ("star", "mauve", "plain"), ("star", "red", "tartan")])
def test_captions_refuse_what_the_world_does_not_have(wrong):
    with pytest.raises(ValueError, match="The world has no"):
        captions.local_caption(*wrong)


def test_varied_captions_name_the_same_things():
    layout = scenes.plan_scene("train", 5)
    variants = {scenes.scene_caption("train", 5, variant) for variant in range(20)}
    assert len(variants) > 3
    for caption in variants:
        words = re.findall("[a-z]+", caption)
        for name in attributes.SHAPES:
            assert words.count(name) == sum(item.shape == name for item in layout.objects)
        for name in attributes.COLOURS:
            named = sum(item.colour == name for item in layout.objects)
            assert words.count(name) >= named
    assert scenes.scene_caption("train", 5, 3) == scenes.scene_caption("train", 5, 3)


def test_captions_may_leave_things_out_but_not_all():
    counts = []
    for index in range(60):
        words = scenes.scene_caption("train", index, 0, omission=0.5).replace(",", "").split()
        named = sum(word in attributes.SHAPES for word in words)
        there = len(scenes.plan_scene("train", index).objects)
        assert 1 <= named <= there
        counts.append(named / there)
    assert min(counts) < 1.0 and np.mean(counts) < 0.9


@pytest.mark.parametrize("kind", holes.KINDS)
def test_holes_have_a_sensible_size(kind):
    for seed in range(40):
        layout = scenes.plan_scene("train", seed)
        hole = holes.hole_mask(np.random.default_rng(seed), layout.objects, kind)
        assert hole.shape == (SIZE, SIZE) and hole.dtype == bool
        if kind == "everything":
            assert hole.all()
        else:
            assert 0.008 < hole.mean() < 0.6


def test_scene_holes_vary_and_repeat():
    first = holes.scene_hole("train", 3)
    np.testing.assert_array_equal(first, holes.scene_hole("train", 3))
    assert (first != holes.scene_hole("train", 3, variant=1)).any()
    assert not any(holes.scene_hole("train", index).all() for index in range(50))


def test_there_are_no_other_holes():
    with pytest.raises(ValueError, match="no kind of hole"):
        holes.hole_mask(np.random.default_rng(0), (), "spiral")


@pytest.mark.parametrize("shape", attributes.SHAPES)
def test_a_grown_hull_covers_its_object(shape):
    item = replace(ITEM, shape=shape)
    mask, hull = alone(item), holes.polygon_mask(holes.grown_hull(item, 4.0))
    assert not (mask & ~hull).any()
    assert hull.sum() < 3.2 * mask.sum()


def test_triplets_ask_for_what_the_scene_does_not_suggest():
    kinds = set()
    for index in range(60):
        triplet = triplets.make_triplet("dev", index)
        kinds.add(triplet.kind)
        assert triplet.hole.shape == (SIZE, SIZE) and 0.01 < triplet.hole.mean() < 0.5
        assert triplet.shape not in {item.shape for item in triplet.scene.layout.objects}
        assert triplet.colour not in {item.colour for item in triplet.scene.layout.objects}
        assert triplet.prompt == captions.local_caption(triplet.shape, triplet.colour, triplet.pattern)
        for mask in triplet.scene.masks:
            assert (mask & triplet.hole).sum() < 0.3 * mask.sum()
    assert kinds == set(triplets.KINDS)


def test_triplets_do_not_ask_for_the_removed_object(monkeypatch):
    asked = []
    find = triplets._removed_hole
    monkeypatch.setattr(
        triplets, "_removed_hole", lambda rng, layout, kind: asked.append(layout) or find(rng, layout, kind)
    )
    removals = 0
    for index in range(40):
        asked.clear()
        triplet = triplets.make_triplet("dev", index)
        if triplet.kind != "free place":
            removals += 1
            # The last layout that was tried is the one that was taken.
            objects = asked[-1].objects
            assert len(objects) == len(triplet.scene.layout.objects) + 1
            assert triplet.shape not in {item.shape for item in objects}
            assert triplet.colour not in {item.colour for item in objects}
    assert removals > 10


def test_crops_carry_the_labels_of_their_object():
    colours = tuple(attributes.COLOURS)
    nothing = 0
    for index in range(120):
        crop = crops.make_crop("dev", index, worn=False)
        assert crop.picture.shape == (crops.CROP, crops.CROP, 3) and crop.picture.dtype == np.uint8
        if crop.shape == crops.NOTHING:
            nothing += 1
            assert crop.colour == crop.pattern == crops.IGNORED
        elif attributes.PATTERNS[crop.pattern] == "plain" and attributes.SHAPES[crop.shape] in ("circle", "square"):
            middle = crop.picture[28:36, 28:36].reshape(-1, 3).mean(axis=0)
            nearest = min(colours, key=lambda name: np.linalg.norm(middle - attributes.COLOURS[name]))
            assert nearest == colours[crop.colour]
    assert 3 < nothing < 40
