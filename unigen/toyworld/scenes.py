"""The rendered world: randomly sampled scenes, the rule of relations, and the held-out split. Also re-exports
`SceneRenderer` and the names.

Needs numpy and PIL only, and no font until a `SceneRenderer` is made. Does not depend on: language (`language.py`),
models, torch. A scene is a pure function of its random generator:

    rng = np.random.default_rng(0)
    scene = sample_scene(rng)
    picture = SceneRenderer().render(scene)
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache

import numpy as np

from unigen.toyworld.objects import (
    ASPECTS,
    BACKGROUNDS,
    COLORS,
    HORIZON_HEIGHT,
    MAX_COUNT,
    NUMBER_WORDS,
    OBJECT_EMOJI,
    PLURALS,
    Scene,
    SceneObject,
    allowed_colors,
    plural,
    singular,
)
from unigen.toyworld.world import RenderedScene, SceneRenderer, find_font, ground_depth

__all__ = [
    "ASPECTS",
    "BACKGROUNDS",
    "COLORS",
    "Group",
    "HORIZON_HEIGHT",
    "SceneObject",
    "MAX_COUNT",
    "NUMBER_WORDS",
    "OBJECT_EMOJI",
    "OPPOSITE",
    "PLURALS",
    "RenderedScene",
    "RELATIONS",
    "Scene",
    "SceneRenderer",
    "clear_relation",
    "find_font",
    "ground_depth",
    "groups_of",
    "held_out_combinations",
    "insert_object",
    "is_held_out",
    "place_objects",
    "plural",
    "spatial_relations",
    "relation_of_boxes",
    "sample_groups",
    "sample_scene",
    "singular",
    "replace_objects",
    "allowed_colors",
]

Group = tuple[str, str | None, int]  # name, colour or None (natural), count

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MIN_SIZE, MAX_SIZE = 18.0, 48.0  # pixels in a picture of 64
_SIZES = {1: (26.0, 48.0), 2: (21.0, 34.0), 3: (18.0, 28.0), 4: (18.0, 25.0)}  # by the number of objects
_OVERLAP = 0.15  # largest share of a box under the boxes in front of it; keeps what the glyph itself loses under 20%
_NAMES = tuple(OBJECT_EMOJI)


def spatial_relations(a: SceneObject, b: SceneObject) -> tuple[str, ...]:
    """Where `a` is as seen from `b`, by GenEval's rule (Ghosh et al. 2023): the offset of centres, less 0.1 x (sum of
    the sides), over the length of the offset, is beyond 0.5. Zero, one or two of RELATIONS.
    """
    (aw, ah), (bw, bh) = a.extent(), b.extent()
    return relation_of_boxes((a.x, a.y, aw, ah), (b.x, b.y, bw, bh))


def relation_of_boxes(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float], limit: float = 0.5
) -> tuple[str, ...]:
    """`spatial_relations` of two boxes given as (centre x, centre y, width, height) in pixels."""
    dx, dy = _offset(a, b)
    relations = (("left of", dx < -limit), ("right of", dx > limit), ("above", dy < -limit), ("below", dy > limit))
    return tuple(name for name, holds in relations if holds)


def _offset(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> tuple[float, float]:
    offset = np.array([a[0] - b[0], a[1] - b[1]])
    revised = np.maximum(np.abs(offset) - 0.1 * np.array([a[2] + b[2], a[3] + b[3]]), 0) * np.sign(offset)
    if not revised.any():
        return 0.0, 0.0
    dx, dy = revised / np.linalg.norm(offset)
    return float(dx), float(dy)


def clear_relation(a: SceneObject, b: SceneObject) -> str | None:
    """The relation that a caption may state: beyond 0.6 on one axis and within 0.4 on the other; None when it is not
    that clear.
    """
    (aw, ah), (bw, bh) = a.extent(), b.extent()
    dx, dy = _offset((a.x, a.y, aw, ah), (b.x, b.y, bw, bh))
    if abs(dx) > 0.6 and abs(dy) < 0.4:
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 0.6 and abs(dx) < 0.4:
        return "above" if dy < 0 else "below"
    return None


# --- the held-out split ---------------------------------------------------------------------------


@cache
def _is_held_out_key(key: str) -> bool:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % 10 == 0


def held_out_combinations(groups: tuple[Group, ...] | list[Group]) -> tuple[str, ...]:
    """The held-out combinations among these groups, as keys like "pair:cat|dog", "color:cat|blue", "count:cat|3";
    empty in training.
    """
    keys = [f"color:{name}|{color}" for name, color, _ in groups if color is not None]
    keys += [f"count:{name}|{count}" for name, _, count in groups if count >= 2]
    names = sorted({name for name, _, _ in groups})
    keys += [f"pair:{a}|{b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    return tuple(key for key in keys if _is_held_out_key(key))


def groups_of(scene: Scene) -> tuple[Group, ...]:
    """The scene's objects counted by (name, colour), in the order in which they first occur from back to front."""
    counts: dict[tuple[str, str | None], int] = {}
    for item in scene.objects:
        counts[item.name, item.color] = counts.get((item.name, item.color), 0) + 1
    return tuple((name, color, count) for (name, color), count in counts.items())


def is_held_out(scene: Scene) -> bool:
    """Does the scene hold a combination that never occurs in training (10% of pairs, of (object, colour), of (object,
    count >= 2))?
    """
    return bool(held_out_combinations(groups_of(scene)))


# --- sampling -------------------------------------------------------------------------------------


def sample_groups(rng: np.random.Generator, held_out: bool | None = False) -> tuple[tuple[Group, ...], bool]:
    """What a scene holds, at most four objects, and whether two objects are to stand in a clear relation."""
    while True:
        u = rng.random()
        if u < 0.28:
            counts: tuple[int, ...] = (1,)
        elif u < 0.52:
            counts = (int(rng.integers(2, MAX_COUNT + 1)),)
        elif u < 0.86:
            counts = (1, 1)
        else:
            counts = ((2, 1), (1, 2), (1, 1, 1), (2, 2), (3, 1))[int(rng.integers(5))]
        chosen = rng.choice(len(_NAMES), size=len(counts), replace=False)
        groups = tuple((_NAMES[k], _color(rng, _NAMES[k]), n) for k, n in zip(chosen, counts, strict=True))
        related = counts == (1, 1) and rng.random() < 0.65
        if held_out is None or bool(held_out_combinations(groups)) == held_out:
            return groups, related


def _color(rng: np.random.Generator, name: str) -> str | None:
    choices = allowed_colors(name)
    return choices[int(rng.integers(len(choices)))] if rng.random() < 0.5 else None


def sample_scene(rng: np.random.Generator, size: int = 64, held_out: bool | None = False) -> Scene:
    """A scene of 1-4 objects. held_out: False never yields a held-out combination, True always, None as they come."""
    groups, related = sample_groups(rng, held_out)
    target_relation = RELATIONS[int(rng.integers(4))] if related else None
    background = tuple(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    return place_objects(rng, groups, background, target_relation, ground=bool(rng.random() < 0.3), size=size)


def place_objects(
    rng: np.random.Generator,
    groups: tuple[Group, ...],
    background: str,
    target_relation: str | None = None,
    ground: bool = False,
    size: int = 64,
) -> Scene:
    """A scene with these groups at random places; `target_relation` is that of the first object to the second.

    Objects lie wholly inside the picture and cover each other by 20% at most. ValueError for more than four objects.
    """
    names = [(name, color) for name, color, count in groups for _ in range(count)]
    if not 1 <= len(names) <= MAX_COUNT:
        raise ValueError(f"a scene holds 1 to {MAX_COUNT} objects, not {len(names)}: ask for fewer")
    order = rng.permutation(len(names))
    for attempt in range(400):
        shrink = max(0.0, 1 - attempt / 200)  # the sizes move to the small end when they do not fit
        draw = _sample_grounded if ground else _sample_floating
        items = [
            draw(rng, name, color, len(names), shrink, target_relation, k, size)
            for k, (name, color) in enumerate(names)
        ]
        if target_relation is not None and clear_relation(items[0], items[1]) != target_relation:
            continue
        stack = sorted(items, key=lambda item: item.box()[3]) if ground else [items[k] for k in order]
        if all(_covered_share(stack, k) <= _OVERLAP for k in range(len(stack))):
            return Scene(tuple(stack), background, size, ground)
    if ground:
        return place_objects(rng, groups, background, target_relation, ground=False, size=size)
    raise AssertionError(f"no place found for {groups} {target_relation}")


def replace_objects(scene: Scene, indices: set[int], name: str, color: str | None) -> Scene | None:
    """The scene with other objects in the place of the chosen ones: same centre and size (on the ground: same base),
    moved only as far as the picture's edge asks; None where they would hide too much.
    """
    items = list(scene.objects)
    for k in indices:
        old = items[k]
        new = replace(old, name=name, color=color)
        w, h = new.extent()
        y = old.box()[3] - h / 2 if scene.ground else old.y
        if max(w, h) > scene.size:
            return None
        items[k] = replace(new, x=min(max(old.x, w / 2), scene.size - w / 2), y=min(max(y, h / 2), scene.size - h / 2))
    return (
        replace(scene, objects=tuple(items))
        if all(_covered_share(items, k) <= _OVERLAP for k in range(len(items)))
        else None
    )


def insert_object(scene: Scene, rng: np.random.Generator, name: str, color: str | None) -> Scene | None:
    """The scene with one more object that hides none and is hidden by none beyond the bound, all others unmoved; None
    without room.
    """
    n = len(scene.objects) + 1
    draw = _sample_grounded if scene.ground else _sample_floating
    for attempt in range(60):
        item = draw(rng, name, color, n, 1 - attempt / 60, None, 0, scene.size)
        stack = [*scene.objects, item]
        if scene.ground:
            stack.sort(key=lambda one: one.box()[3])
        if all(_covered_share(stack, k) <= _OVERLAP for k in range(n)):
            return replace(scene, objects=tuple(stack))
    return None


def _covered_share(stack: list[SceneObject], k: int) -> float:
    """Share of the box of item k under the boxes in front of it, an upper bound (overlaps are added)."""
    x0, y0, x1, y1 = stack[k].box()
    area = 0.0
    for front in stack[k + 1 :]:
        u0, v0, u1, v1 = front.box()
        area += max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    return area / ((x1 - x0) * (y1 - y0))


def _sample_center(rng: np.random.Generator, extent: float, size: int, part: int) -> float:
    """A centre such that the object is inside; part 0 anywhere, -1 in the half near zero, +1 in the other half, as
    far as it fits.
    """
    low, high = extent / 2, size - extent / 2
    middle = (low + high) / 2
    if part < 0:
        high = middle
    elif part > 0:
        low = middle
    return float(rng.uniform(low, high))


def _placement_halves(target_relation: str | None, index: int) -> tuple[int, int]:
    """The half of the picture in x and in y to which a relation confines object 0 (and its opposite object 1)."""
    side = 1 if index == 0 else -1
    x = {"left of": -side, "right of": side}.get(target_relation or "", 0)
    y = {"above": -side, "below": side}.get(target_relation or "", 0)
    return x, y


def _sample_floating(
    rng: np.random.Generator,
    name: str,
    color: str | None,
    n: int,
    shrink: float,
    target_relation: str | None,
    index: int,
    size: int,
) -> SceneObject:
    low, high = _SIZES[n]
    side = (low + (high - low) * shrink * rng.random()) * size / 64
    at_origin = SceneObject(name, color, 0.0, 0.0, float(side), float(rng.uniform(-10, 10)))
    w, h = at_origin.extent()
    x_half, y_half = _placement_halves(target_relation, index)
    x, y = _sample_center(rng, w, size, x_half), _sample_center(rng, h, size, y_half)
    return SceneObject(name, color, x, y, at_origin.size, at_origin.angle)


def _sample_grounded(
    rng: np.random.Generator,
    name: str,
    color: str | None,
    n: int,
    shrink: float,
    target_relation: str | None,
    index: int,
    size: int,
) -> SceneObject:
    """The base stands on the ground plane: it gives the depth, and the size falls with it (linear perspective, +-6%
    of natural spread).
    """
    x_half, y_half = _placement_halves(target_relation, index)
    horizon = HORIZON_HEIGHT * size
    base = _sample_center(rng, 0.0, size, 0) * (1 - HORIZON_HEIGHT) + horizon
    if y_half:
        base = horizon + (size - horizon) * (rng.uniform(0.6, 1.0) if y_half > 0 else rng.uniform(0.05, 0.4))
    base = min(base, size - 0.5)
    near = (24.0 + (_SIZES[n][1] - 24.0) * shrink) if n > 1 else rng.uniform(34.0, 50.0)
    side = near * (1 - 0.5 * ground_depth(base, size)) * rng.uniform(0.94, 1.06)
    side = min(max(side, MIN_SIZE), MAX_SIZE) * size / 64
    at_origin = SceneObject(name, color, 0.0, 0.0, float(side), float(rng.uniform(-10, 10)))
    w, h = at_origin.extent()
    x = _sample_center(rng, w, size, x_half)
    return SceneObject(name, color, x, float(max(base - h / 2, h / 2)), at_origin.size, at_origin.angle)
