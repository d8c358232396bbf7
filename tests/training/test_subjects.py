"""Subjects of the synthetic world: the same thing in every view, and nothing that words could say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from devtools.pack import pack_module

subjects = pack_module("training.world.subjects")
attributes = pack_module("training.world.attributes")

SIZE = attributes.SIZE
PLAIN = subjects.View(128.0, 128.0, 60.0, 0.0, 0.0, 0.0, 1.0)


def seen(look, view) -> tuple[np.ndarray, np.ndarray]:
    """The picture of a subject alone, and its mask."""
    canvas = np.full((SIZE, SIZE, 3), 200.0, dtype=np.float32)
    return canvas, subjects.paint_subject(canvas, look, view)


def at_own_points(picture: np.ndarray, mask: np.ndarray, view) -> tuple[np.ndarray, np.ndarray]:
    """Colors [N, 3] at a grid of points of the subject itself, found by turning and scaling, and where they lie on it."""
    u, v = (of.ravel() for of in np.meshgrid(np.linspace(-0.7, 0.7, 29), np.linspace(-0.7, 0.7, 29)))
    angle = np.deg2rad(view.angle)
    x = view.x + view.radius * (u * np.cos(angle) - v * np.sin(angle))
    y = view.y + view.radius * (u * np.sin(angle) + v * np.cos(angle))
    rows, columns = np.rint(y).astype(int), np.rint(x).astype(int)
    return picture[rows, columns], mask[rows, columns]


@pytest.mark.quick
def test_a_quadruple_depends_on_its_arguments_only() -> None:
    first, again = (subjects.make_quadruple("train", 3, 5) for _ in range(2))
    for name in ("picture", "scene", "hole", "reference", "reference_mask"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    other = subjects.make_quadruple("train", 4, 5)
    assert not np.array_equal(other.picture, first.picture) and other.prompt == first.prompt


@pytest.mark.quick
def test_splits_have_no_subject_in_common() -> None:
    tones = [tuple(subjects.look_of(split, n).tones.ravel()) for split in attributes.SPLITS for n in range(50)]
    assert len(set(tones)) == len(tones)


def test_every_view_shows_the_same_surface() -> None:
    """At the same points of the subject there are the same colors, where it isn't the edge of two tones."""
    rng = np.random.default_rng(0)
    for number in range(8):
        look = subjects.look_of("dev", number)
        views = [replace(PLAIN, radius=r, angle=a, x=x) for r, a, x in ((90, 0, 128), (55, 35, 140), (70, -70, 110))]
        seen_by = [at_own_points(*seen(look, view), view) for view in views]
        inside = np.all([mask for _, mask in seen_by], axis=0)
        assert inside.sum() > 100
        for colours, _ in seen_by[1:]:
            apart = np.abs(colours - seen_by[0][0]).max(axis=1)[inside]
            assert np.median(apart) < 8, number
            assert (apart > 60).mean() < 0.1, number
        other = subjects.look_of("dev", 100 + int(rng.integers(100)))
        stranger = at_own_points(*seen(replace(other, shape=look.shape), views[0]), views[0])[0]
        assert (np.abs(stranger - seen_by[0][0]).max(axis=1)[inside] > 30).mean() > 0.5, number


def test_light_changes_brightness_and_nothing_else() -> None:
    look = subjects.look_of("dev", 1)
    (plain, mask), (dim, _) = seen(look, PLAIN), seen(look, replace(PLAIN, brightness=0.5))
    # Away from the edge, where the background shines through.
    inner = np.all([np.roll(mask, (down, right), (0, 1)) for down in (-3, 0, 3) for right in (-3, 0, 3)], axis=0)
    np.testing.assert_allclose(dim[inner], 0.5 * plain[inner], atol=0.01)


def test_the_hole_covers_the_subject_and_only_it() -> None:
    for index in range(30):
        q = subjects.make_quadruple("dev", index, index)
        changed = (q.picture != q.scene).any(axis=2)
        assert changed.any() and changed[q.hole].mean() > 0.2
        # Its shadow may reach out of the hole, and out of it only.
        outside = np.abs(q.picture.astype(int) - q.scene).max(axis=2)[~q.hole]
        assert (outside > 0).mean() < 0.06 and (q.picture[~q.hole].astype(int) <= q.scene[~q.hole]).all()
        assert q.prompt.split()[-1] in attributes.SHAPES
        assert 0.05 < q.reference_mask.mean() < 0.5
        assert not any(word in q.prompt for word in (*attributes.COLOURS, *attributes.PATTERNS[1:]))
