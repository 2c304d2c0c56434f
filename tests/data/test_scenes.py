"""The rendered world without a font: sampling, bounds, the rule of relations, the held-out split."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from unigen.toyworld.scenes import (
    BACKGROUNDS,
    COLORS,
    MAX_COUNT,
    OBJECT_EMOJI,
    OPPOSITE,
    PLURALS,
    RELATIONS,
    Scene,
    SceneObject,
    allowed_colors,
    clear_relation,
    groups_of,
    held_out_combinations,
    is_held_out,
    place_objects,
    relation_of_boxes,
    sample_scene,
    spatial_relations,
)

NAMED = "horse cat dog apple pizza sunflower rose house rocket moon star tree car fish bird raven witch"
NAMED += " robot elephant penguin umbrella guitar fireworks snowman"


def scenes(n: int, seed: int = 0, **options) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **options) for _ in range(n)]


def test_vocabulary():
    assert len(OBJECT_EMOJI) >= 48 and set(NAMED.split()) <= set(OBJECT_EMOJI)
    assert len(set(OBJECT_EMOJI.values())) == len(OBJECT_EMOJI) and set(PLURALS) == set(OBJECT_EMOJI)
    assert len(COLORS) == 6 and len(BACKGROUNDS) == 8
    assert all(len(allowed_colors(name)) >= 4 for name in OBJECT_EMOJI)


def test_same_seed_same_scene():
    assert scenes(50) == scenes(50)
    assert scenes(50) != scenes(50, seed=1)


@pytest.mark.parametrize("size", [64, 96])
def test_objects_lie_inside_with_sizes_in_range(size):
    for scene in scenes(1500, size=size):
        assert 1 <= len(scene.objects) <= MAX_COUNT
        for item in scene.objects:
            x0, y0, x1, y1 = item.box()
            assert min(x0, y0) >= -1e-6 and max(x1, y1) <= size + 1e-6
            assert 18 <= item.size * 64 / size <= 48 + 1e-6 and abs(item.angle) <= 10


def test_positions_ignore_the_token_grid():
    x = np.array([item.x for scene in scenes(2000) for item in scene.objects])
    assert abs(np.mean(np.exp(2j * np.pi * x / 8))) < 0.05  # uniform modulo 8 pixels
    grid = np.round(x / 8) * 8
    assert abs(np.mean(np.exp(2j * np.pi * grid / 8))) > 0.9  # the check can fail


def test_shares_of_kinds():
    drawn = scenes(3000)
    assert 0.25 < np.mean([scene.ground for scene in drawn]) < 0.33
    counts = np.bincount([len(scene.objects) for scene in drawn], minlength=5)[1:] / len(drawn)
    assert counts.min() > 0.08
    colors = [item.color for scene in drawn for item in scene.objects]
    assert 0.4 < np.mean([color is None for color in colors]) < 0.6 and set(colors) == {None, *COLORS}
    assert all(
        item.color is None or item.color in allowed_colors(item.name) for scene in drawn for item in scene.objects
    )


def test_heldout_split():
    training, held = scenes(3000), scenes(500, held_out=True)
    assert not any(map(is_held_out, training)) and all(map(is_held_out, held))
    share = np.mean([is_held_out(scene) for scene in scenes(3000, held_out=None)])
    assert 0.08 < share < 0.25
    names = list(OBJECT_EMOJI)
    pairs = [held_out_combinations([(a, None, 1), (b, None, 1)]) for i, a in enumerate(names) for b in names[:i]]
    tinted = [held_out_combinations([(name, color, 1)]) for name in names for color in COLORS]
    counted = [held_out_combinations([(name, None, n)]) for name in names for n in (2, 3, 4)]
    for combinations in (pairs, tinted, counted):
        assert 0.05 < np.mean([bool(found) for found in combinations]) < 0.16
    assert not any(held_out_combinations([(name, None, 1)]) for name in names)
    assert held_out_combinations([("cat", None, 1), ("dog", None, 1)]) == held_out_combinations(
        [("dog", None, 1), ("cat", None, 1)]
    )


def geneval(a: SceneObject, b: SceneObject) -> set[str]:
    """GenEval's rule written once more from its definition (y points down)."""
    (aw, ah), (bw, bh) = a.extent(), b.extent()
    offset = (a.x - b.x, a.y - b.y)
    revised = [math.copysign(max(abs(o) - 0.1 * s, 0), o) for o, s in zip(offset, (aw + bw, ah + bh), strict=True)]
    if revised == [0, 0]:
        return set()
    dx, dy = (r / math.hypot(*offset) for r in revised)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def test_relation_is_genevals_rule():
    found = set()
    for scene in scenes(1500, held_out=None):
        if len(scene.objects) == 2:
            a, b = scene.objects
            assert set(spatial_relations(a, b)) == geneval(a, b)
            assert {OPPOSITE[name] for name in spatial_relations(a, b)} == set(spatial_relations(b, a))
            clear = clear_relation(a, b)
            found.add(clear)
            if clear is not None:
                assert spatial_relations(a, b) == (clear,) and clear_relation(b, a) == OPPOSITE[clear]
    assert found == {None, *RELATIONS}
    assert relation_of_boxes((10, 10, 4, 4), (10, 10, 4, 4)) == ()
    assert set(relation_of_boxes((0, 0, 4, 4), (40, 40, 4, 4))) == {"left of", "above"}


@pytest.mark.parametrize("wanted", RELATIONS)
@pytest.mark.parametrize("ground", [False, True])
def test_place_honours_the_relation(wanted, ground):
    rng = np.random.default_rng(3)
    grounded = 0
    for _ in range(60):
        a, b = (str(name) for name in rng.choice(list(OBJECT_EMOJI), 2, replace=False))
        scene = place_objects(rng, ((a, None, 1), (b, "red", 1)), "white", wanted, ground)
        items = {item.name: item for item in scene.objects}
        assert clear_relation(items[a], items[b]) == wanted
        grounded += scene.ground
    assert grounded >= 50 * ground


def test_size_falls_with_distance_on_the_ground():
    nearer = larger = 0
    for scene in scenes(2000):
        if scene.ground and len(groups_of(scene)) == 1 and len(scene.objects) > 1:
            far, near = scene.objects[0], scene.objects[-1]
            assert near.box()[3] >= far.box()[3]  # z-order follows the base
            if near.box()[3] - far.box()[3] > 8:
                nearer, larger = nearer + 1, larger + (near.size > far.size)
    assert nearer > 20 and larger / nearer > 0.9


def test_too_many_objects():
    with pytest.raises(ValueError, match="1 to 4 objects"):
        place_objects(np.random.default_rng(0), (("cat", None, 5),), "white")
    with pytest.raises(ValueError, match="1 to 4 objects"):
        place_objects(np.random.default_rng(0), (), "white")


def test_a_scene_is_a_value():
    scene = scenes(1)[0]
    assert replace(scene) == scene and hash(replace(scene)) == hash(scene)
