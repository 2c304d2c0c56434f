"""The language of the rendered world beyond captions: questions, edits, verdicts, expansions of short prompts.

Refuses to know: fonts, pixels, models. Every function is pure in its random generator. Captions are re-exported from
`captions.py`.

    rng = np.random.default_rng(0)
    scene = sample_scene(rng)
    questions(scene, rng), edits(scene, rng).instruction, verdict(scene, rng)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from unigen.toyworld.captions import (
    Facts,
    caption,
    compare,
    definite,
    descriptive_caption,
    facts,
    listing,
    noisy_caption,
    noun,
    parse_caption,
    phrase,
    scene_from_facts,
    short_caption,
    shuffled,
    spot,
    with_article,
)
from unigen.toyworld.scenes import (
    BACKGROUNDS,
    COLORS,
    MAX_COUNT,
    NUMBERS,
    OBJECTS,
    OPPOSITE,
    RELATIONS,
    Group,
    Scene,
    groups_of,
    heldout_groups,
    insert_item,
    plural,
    swap_items,
    tints,
)

__all__ = [
    "EDITS",
    "Edit",
    "Facts",
    "QA",
    "Verdict",
    "caption",
    "compare",
    "definite",
    "descriptive_caption",
    "edits",
    "expansion",
    "facts",
    "listing",
    "noisy_caption",
    "noun",
    "parse_caption",
    "phrase",
    "places",
    "questions",
    "scene_from_facts",
    "short_caption",
    "shuffled",
    "totals",
    "verdict",
    "with_article",
]

EDITS = ("replace", "add", "remove", "recolour", "background")


@dataclass(frozen=True)
class QA:
    """A question about a picture with its short answer; kind: presence, count, colour, background, relation, place."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Edit:
    """An instruction and the scene after it; kind is one of EDITS."""

    instruction: str
    after: Scene
    kind: str


@dataclass(frozen=True)
class Verdict:
    """Does the picture satisfy the prompt, and one clause that says why (not)."""

    prompt: str
    ok: bool
    reason: str

    def __iter__(self):  # (prompt, ok, reason) unpacks
        return iter((self.prompt, self.ok, self.reason))


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    there = {item.name for item in scene.items}
    return _pick(rng, tuple(name for name in OBJECTS if name not in there))


# --- questions ------------------------------------------------------------------------------------


def questions(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """Some questions of every kind that the scene allows, in random order; "yes" and "no" balanced, "one" and
    "natural" thinned out.
    """
    said = facts(scene)
    found = [*_presence(scene, said, rng), *_counts(scene, said, rng), *_colours(said, rng), *_relations(said, rng)]
    return [found[k] for k in rng.permutation(len(found))]


def _presence(scene: Scene, said: Facts, rng: np.random.Generator) -> list[QA]:
    there, other = said.groups[int(rng.integers(len(said.groups)))], _absent(scene, rng)
    colored = there[1] is not None and rng.random() < 0.5
    yes = with_article(noun(there[0])) if not colored else f"a {there[1]} {noun(there[0])}"
    no = with_article(noun(other))
    if colored and rng.random() < 0.5:  # the right object in a wrong colour
        wrong = _pick(rng, tuple(color for color in tints(there[0]) if color != there[1]))
        no = f"a {wrong} {noun(there[0])}"
    form = _pick(rng, ("is there {}?", "do you see {}?", "does the picture show {}?"))
    return [QA(form.format(yes), "yes", "presence"), QA(form.format(no), "no", "presence")]


def _counts(scene: Scene, said: Facts, rng: np.random.Generator) -> list[QA]:
    totals: dict[str, int] = {}
    for name, _, count in said.groups:
        totals[name] = totals.get(name, 0) + count
    form = _pick(rng, ("how many {} are there?", "how many {}?", "how many {} do you see?"))
    found = [
        QA(form.format(plural(name)), NUMBERS[count], "count")
        for name, count in totals.items()
        if count > 1 or rng.random() < 0.35
    ]
    if rng.random() < 0.12:
        found.append(QA(form.format(plural(_absent(scene, rng))), "zero", "count"))
    if rng.random() < 0.2:
        found.append(QA("how many objects are there?", NUMBERS[len(scene.items)], "count"))
    return found


def _colours(said: Facts, rng: np.random.Generator) -> list[QA]:
    found = []
    names = [name for name, _, _ in said.groups]
    for name, color, count in said.groups:
        if names.count(name) == 1 and (color is not None or rng.random() < 0.15):
            verb = "is" if count == 1 else "are"
            found.append(QA(f"what color {verb} the {noun(name, count)}?", color or "natural", "colour"))
    if rng.random() < 0.5 and said.background is not None:
        form = _pick(rng, ("what color is the background?", "what is the color of the background?"))
        found.append(QA(form, said.background, "background"))
    return found


def _relations(said: Facts, rng: np.random.Generator) -> list[QA]:
    if said.relation is None:
        return []
    told = shuffled(said, rng)
    a, b, side = noun(told.groups[0][0]), noun(told.groups[1][0]), told.relation
    assert side is not None
    to = {"left of": "to the left of", "right of": "to the right of"}
    found = [QA(f"where is the {a} as seen from the {b}?", side, "relation")]
    shown = side if rng.random() < 0.5 else OPPOSITE[side] if rng.random() < 0.6 else _pick(rng, RELATIONS)
    answer = "yes" if shown == side else "no"
    found.append(QA(f"is the {a} {to.get(shown, shown)} the {b}?", answer, "relation"))
    if rng.random() < 0.5:
        found.append(QA(f"what is {to.get(side, side)} the {b}?", a, "relation"))
    return found


def totals(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """How many objects there are, and how many of each colour, whatever they are; in random order, kind "count". Not of
    a colour that something there has by nature."""
    form = _pick(rng, ("how many {} are there?", "how many {}?", "how many {} do you see?"))
    natural = [color for item in scene.items if item.color is None for color in COLORS if color not in tints(item.name)]
    colors = [item.color for item in scene.items if item.color is not None and item.color not in natural]
    counts = {"objects": len(scene.items)} | {f"{color} objects": colors.count(color) for color in colors}
    found = [QA(form.format(what), NUMBERS[count], "count") for what, count in counts.items()]
    return [found[k] for k in rng.permutation(len(found))]


def places(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """Where each object is that is the only one of its name, in random order; kind "place"."""
    names = [item.name for item in scene.items]
    single = [item for item in scene.items if names.count(item.name) == 1]
    form = _pick(rng, ("where is the {}?", "where do you see the {}?"))
    found = [QA(form.format(noun(item.name)), spot(item, scene.size), "place") for item in single]
    return [found[k] for k in rng.permutation(len(found))]


# --- edits ----------------------------------------------------------------------------------------


def edits(scene: Scene, rng: np.random.Generator, kind: str | None = None, heldout: bool | None = False) -> Edit:
    """One edit of the scene; all other objects stay where they are. `kind` is by lot when None, and replaced by
    another where the scene does not allow it. With heldout=False an edit of a training scene yields a training scene.
    """
    if kind is not None and kind not in EDITS:
        raise ValueError(f"unknown kind of edit {kind!r}: choose from {', '.join(EDITS)}")
    keep = heldout is not None and not heldout_groups(groups_of(scene))
    order = [EDITS[k] for k in rng.permutation(len(EDITS))]
    if kind is not None:
        order = [kind] + [other for other in order if other != kind]
    for name in order:
        for _ in range(12):
            edit = _EDITORS[name](scene, rng)
            if edit is None:
                break
            if not keep or not heldout_groups(groups_of(edit.after)):
                return edit
    raise AssertionError("a background can always be changed")


def _members(scene: Scene, group: Group) -> list[int]:
    return [k for k, item in enumerate(scene.items) if (item.name, item.color) == group[:2]]


def _target(scene: Scene, rng: np.random.Generator) -> tuple[Group, str]:
    """A group of the scene and how to call it."""
    groups = groups_of(scene)
    group = groups[int(rng.integers(len(groups)))]
    needs_color = [name for name, _, _ in groups].count(group[0]) > 1
    return group, definite(group, color=needs_color or rng.random() < 0.5)


def _color(rng: np.random.Generator, name: str) -> str | None:
    return _pick(rng, tints(name)) if rng.random() < 0.4 else None


def _replace(scene: Scene, rng: np.random.Generator) -> Edit | None:
    group, called = _target(scene, rng)
    for _ in range(12):
        name = _absent(scene, rng)
        color = _color(rng, name)
        after = swap_items(scene, set(_members(scene, group)), name, color)
        if after is not None:
            new = phrase((name, color, group[2]))
            new = new if group[2] == 1 else new.split(" ", 1)[1]  # "the apples with pizzas"
            form = _pick(rng, ("replace {} with {}", "swap {} for {}", "turn {} into {}"))
            return Edit(form.format(called, new), after, "replace")
    return None


def _add(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if len(scene.items) >= MAX_COUNT:
        return None
    name = _absent(scene, rng)
    color = _color(rng, name)
    after = insert_item(scene, rng, name, color)
    if after is None:
        return None
    return Edit(_pick(rng, ("add {}", "put {} in the picture")).format(phrase((name, color, 1))), after, "add")


def _remove(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if len(groups_of(scene)) < 2:
        return None
    group, called = _target(scene, rng)
    gone = set(_members(scene, group))
    items = tuple(item for k, item in enumerate(scene.items) if k not in gone)
    return Edit(
        _pick(rng, ("remove {}", "take {} away", "delete {}")).format(called), replace(scene, items=items), "remove"
    )


def _recolour(scene: Scene, rng: np.random.Generator) -> Edit | None:
    group, called = _target(scene, rng)
    taken = {item.color for item in scene.items if item.name == group[0]}
    color = _pick(rng, tuple(color for color in tints(group[0]) if color not in taken))
    members = set(_members(scene, group))
    items = tuple(replace(item, color=color) if k in members else item for k, item in enumerate(scene.items))
    form = _pick(rng, ("make {} {}", "paint {} {}", "change the color of {} to {}"))
    return Edit(form.format(called, color), replace(scene, items=items), "recolour")


def _background(scene: Scene, rng: np.random.Generator) -> Edit | None:
    color = _pick(rng, tuple(name for name in BACKGROUNDS if name != scene.background))
    form = _pick(rng, ("change the background to {}", "make the background {}"))
    return Edit(form.format(color), replace(scene, background=color), "background")


_EDITORS = {"replace": _replace, "add": _add, "remove": _remove, "recolour": _recolour, "background": _background}


# --- verdicts and expansions ----------------------------------------------------------------------


def verdict(scene: Scene, rng: np.random.Generator) -> Verdict:
    """A prompt that the scene satisfies (half of the time) or misses in one attribute, and why in one clause."""
    true = shuffled(facts(scene), rng)
    if rng.random() < 0.3:
        true = replace(true, background=None, ground=False)
    if rng.random() < 0.5:
        return Verdict(caption(true), True, "the picture shows " + listing([phrase(group) for group in true.groups]))
    keep = not heldout_groups(true.groups)
    while True:
        wrong, reason = _spoil(true, rng)
        if not keep or not heldout_groups(wrong.groups):
            return Verdict(caption(wrong), False, reason)


def _spoil(true: Facts, rng: np.random.Generator) -> tuple[Facts, str]:
    """Facts that differ from the true ones in one attribute, and the difference in words."""
    k = int(rng.integers(len(true.groups)))
    name, color, count = true.groups[k]
    is_are, there = ("is", "there is") if count == 1 else ("are", "there are")
    kinds = ["object", "count"] + ["color"] * (color is not None)
    kinds += ["background"] * (true.background is not None) + ["relation"] * (2 * (true.relation is not None))
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "background":
        other = _pick(rng, tuple(shade for shade in BACKGROUNDS if shade != true.background))
        return replace(true, background=other), f"the background is {true.background}, not {other}"
    if kind == "relation":
        assert true.relation is not None
        a, b = (noun(group[0]) for group in true.groups[:2])
        shown = OPPOSITE[true.relation]
        return replace(true, relation=shown), f"the {a} is {true.relation} the {b}, not {shown} it"
    if kind == "color":
        other = _pick(rng, tuple(tint for tint in tints(name) if tint != color))
        new: Group = (name, other, count)
        reason = f"the {noun(name, count)} {is_are} {color}, not {other}"
    elif kind == "count":
        room = MAX_COUNT - sum(group[2] for group in true.groups) + count
        number = int(rng.choice([n for n in range(1, max(room, 2) + 1) if n != count]))
        new = (name, color, number)
        reason = f"{there} {NUMBERS[count]} {noun(name, count)}, not {NUMBERS[number]}"
    else:
        names = [group[0] for group in true.groups]
        other = _pick(rng, tuple(choice for choice in OBJECTS if choice not in names))
        new = (other, color if color in tints(other) else None, count)
        reason = f"there is no {noun(other)}"
    groups = tuple(new if j == k else group for j, group in enumerate(true.groups))
    relation = true.relation if all(group[2] == 1 for group in groups) else None
    return replace(true, groups=groups, relation=relation), reason


def expansion(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A short prompt and a descriptive one for the same picture (prompt expansion)."""
    said = shuffled(facts(scene), rng)
    short = Facts(
        said.groups, said.background if rng.random() < 0.3 else None, said.relation if rng.random() < 0.7 else None
    )
    return caption(short), descriptive_caption(scene, rng)
