"""The language of the rendered world beyond captions: questions, edits, verdicts, expansions of short prompts.

Does not depend on: fonts, pixels, models. Every function is pure in its random generator. Captions are re-exported from
`judge_captions.py`.

    rng = np.random.default_rng(0)
    scene = sample_scene(rng)
    questions(scene, rng), sample_edit(scene, rng).instruction, sample_judgement(scene, rng)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from unigen.toyworld.captions import (
    Facts,
    caption,
    compare_facts,
    definite_phrase,
    descriptive_caption,
    extract_facts,
    join_phrases,
    noisy_caption,
    noun_form,
    noun_phrase,
    parse_caption,
    position_phrase,
    reorder_facts,
    scene_from_facts,
    short_caption,
    with_article,
)
from unigen.toyworld.scenes import (
    BACKGROUNDS,
    COLORS,
    MAX_COUNT,
    NUMBER_WORDS,
    OBJECT_EMOJI,
    OPPOSITE,
    RELATIONS,
    Group,
    Scene,
    allowed_colors,
    groups_of,
    held_out_combinations,
    insert_object,
    plural,
    replace_objects,
)

__all__ = [
    "EDITS",
    "Edit",
    "Facts",
    "QAPair",
    "Judgement",
    "caption",
    "compare_facts",
    "definite_phrase",
    "descriptive_caption",
    "sample_edit",
    "expansion",
    "extract_facts",
    "join_phrases",
    "noisy_caption",
    "noun_form",
    "parse_caption",
    "noun_phrase",
    "position_questions",
    "questions",
    "scene_from_facts",
    "short_caption",
    "reorder_facts",
    "count_questions",
    "sample_judgement",
    "with_article",
]

EDITS = ("replace", "add", "remove", "recolour", "background")


@dataclass(frozen=True)
class QAPair:
    """A question about a picture with its short answer; kind: presence, count, colour, background, relation, place."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Edit:
    """An instruction and what it makes of a scene."""

    instruction: str
    """In words."""
    edited_scene: Scene
    """The scene after it."""
    kind: str
    """One of `EDITS`."""


@dataclass(frozen=True)
class Judgement:
    """Whether a picture shows what a prompt says."""

    prompt: str
    """In the words of captions."""
    is_satisfied: bool
    """Whether it does."""
    reason: str
    """One clause that says why, or why not."""

    def __iter__(self):  # (prompt, ok, reason) unpacks
        return iter((self.prompt, self.is_satisfied, self.reason))


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _absent_object(scene: Scene, rng: np.random.Generator) -> str:
    present_names = {item.name for item in scene.objects}
    return _pick(rng, tuple(name for name in OBJECT_EMOJI if name not in present_names))


# --- questions ------------------------------------------------------------------------------------


def questions(scene: Scene, rng: np.random.Generator) -> list[QAPair]:
    """Some questions of every kind that the scene allows, in random order; "yes" and "no" balanced, "one" and
    "natural" thinned out.
    """
    facts = extract_facts(scene)
    pairs = [
        *_presence_questions(scene, facts, rng),
        *_count_questions(scene, facts, rng),
        *_color_questions(facts, rng),
        *_relation_questions(facts, rng),
    ]
    return [pairs[k] for k in rng.permutation(len(pairs))]


def _presence_questions(scene: Scene, facts: Facts, rng: np.random.Generator) -> list[QAPair]:
    present_names, alternative = facts.groups[int(rng.integers(len(facts.groups)))], _absent_object(scene, rng)
    colored = present_names[1] is not None and rng.random() < 0.5
    yes = (
        with_article(noun_form(present_names[0]))
        if not colored
        else f"a {present_names[1]} {noun_form(present_names[0])}"
    )
    no = with_article(noun_form(alternative))
    if colored and rng.random() < 0.5:  # the right object in a wrong colour
        corrupted_facts = _pick(
            rng, tuple(color for color in allowed_colors(present_names[0]) if color != present_names[1])
        )
        no = f"a {corrupted_facts} {noun_form(present_names[0])}"
    form = _pick(rng, ("is there {}?", "do you see {}?", "does the picture show {}?"))
    return [QAPair(form.format(yes), "yes", "presence"), QAPair(form.format(no), "no", "presence")]


def _count_questions(scene: Scene, facts: Facts, rng: np.random.Generator) -> list[QAPair]:
    totals: dict[str, int] = {}
    for name, _, count in facts.groups:
        totals[name] = totals.get(name, 0) + count
    form = _pick(rng, ("how many {} are there?", "how many {}?", "how many {} do you see?"))
    pairs = [
        QAPair(form.format(plural(name)), NUMBER_WORDS[count], "count")
        for name, count in totals.items()
        if count > 1 or rng.random() < 0.35
    ]
    if rng.random() < 0.12:
        pairs.append(QAPair(form.format(plural(_absent_object(scene, rng))), "zero", "count"))
    if rng.random() < 0.2:
        pairs.append(QAPair("how many objects are there?", NUMBER_WORDS[len(scene.objects)], "count"))
    return pairs


def _color_questions(facts: Facts, rng: np.random.Generator) -> list[QAPair]:
    pairs = []
    names = [name for name, _, _ in facts.groups]
    for name, color, count in facts.groups:
        if names.count(name) == 1 and (color is not None or rng.random() < 0.15):
            verb = "is" if count == 1 else "are"
            pairs.append(QAPair(f"what color {verb} the {noun_form(name, count)}?", color or "natural", "colour"))
    if rng.random() < 0.5 and facts.background is not None:
        form = _pick(rng, ("what color is the background?", "what is the color of the background?"))
        pairs.append(QAPair(form, facts.background, "background"))
    return pairs


def _relation_questions(facts: Facts, rng: np.random.Generator) -> list[QAPair]:
    if facts.relation is None:
        return []
    facts = reorder_facts(facts, rng)
    a, b, side = noun_form(facts.groups[0][0]), noun_form(facts.groups[1][0]), facts.relation
    assert side is not None
    to = {"left of": "to the left of", "right of": "to the right of"}
    pairs = [QAPair(f"where is the {a} as seen from the {b}?", side, "relation")]
    stated_relation = side if rng.random() < 0.5 else OPPOSITE[side] if rng.random() < 0.6 else _pick(rng, RELATIONS)
    answer = "yes" if stated_relation == side else "no"
    pairs.append(QAPair(f"is the {a} {to.get(stated_relation, stated_relation)} the {b}?", answer, "relation"))
    if rng.random() < 0.5:
        pairs.append(QAPair(f"what is {to.get(side, side)} the {b}?", a, "relation"))
    return pairs


def count_questions(scene: Scene, rng: np.random.Generator) -> list[QAPair]:
    """How many objects there are, and how many of each colour, whatever they are; in random order, kind "count". Not of
    a colour that something there has by nature."""
    form = _pick(rng, ("how many {} are there?", "how many {}?", "how many {} do you see?"))
    natural = [
        color
        for item in scene.objects
        if item.color is None
        for color in COLORS
        if color not in allowed_colors(item.name)
    ]
    colors = [item.color for item in scene.objects if item.color is not None and item.color not in natural]
    counts = {"objects": len(scene.objects)} | {f"{color} objects": colors.count(color) for color in colors}
    pairs = [QAPair(form.format(subject), NUMBER_WORDS[count], "count") for subject, count in counts.items()]
    return [pairs[k] for k in rng.permutation(len(pairs))]


def position_questions(scene: Scene, rng: np.random.Generator) -> list[QAPair]:
    """Where each object is that is the only one of its name, in random order; kind "place"."""
    names = [item.name for item in scene.objects]
    single = [item for item in scene.objects if names.count(item.name) == 1]
    form = _pick(rng, ("where is the {}?", "where do you see the {}?"))
    pairs = [QAPair(form.format(noun_form(item.name)), position_phrase(item, scene.size), "place") for item in single]
    return [pairs[k] for k in rng.permutation(len(pairs))]


# --- edits ----------------------------------------------------------------------------------------


def sample_edit(scene: Scene, rng: np.random.Generator, kind: str | None = None, held_out: bool | None = False) -> Edit:
    """One edit of the scene; all other objects stay where they are. `kind` is random when None, and replaced by
    another where the scene does not allow it. With held_out=False an edit of a training scene yields a training scene.
    """
    if kind is not None and kind not in EDITS:
        raise ValueError(f"unknown kind of edit {kind!r}: choose from {', '.join(EDITS)}")
    keep = held_out is not None and not held_out_combinations(groups_of(scene))
    order = [EDITS[k] for k in rng.permutation(len(EDITS))]
    if kind is not None:
        order = [kind] + [alternative for alternative in order if alternative != kind]
    for name in order:
        for _ in range(12):
            edit = _EDITORS[name](scene, rng)
            if edit is None:
                break
            if not keep or not held_out_combinations(groups_of(edit.edited_scene)):
                return edit
    raise AssertionError("a background can always be changed")


def _members(scene: Scene, group: Group) -> list[int]:
    return [k for k, item in enumerate(scene.objects) if (item.name, item.color) == group[:2]]


def _pick_group(scene: Scene, rng: np.random.Generator) -> tuple[Group, str]:
    """A group of the scene and how to call it."""
    groups = groups_of(scene)
    group = groups[int(rng.integers(len(groups)))]
    needs_color = [name for name, _, _ in groups].count(group[0]) > 1
    return group, definite_phrase(group, color=needs_color or rng.random() < 0.5)


def _color(rng: np.random.Generator, name: str) -> str | None:
    return _pick(rng, allowed_colors(name)) if rng.random() < 0.4 else None


def _replace(scene: Scene, rng: np.random.Generator) -> Edit | None:
    group, called = _pick_group(scene, rng)
    for _ in range(12):
        name = _absent_object(scene, rng)
        color = _color(rng, name)
        after = replace_objects(scene, set(_members(scene, group)), name, color)
        if after is not None:
            new = noun_phrase((name, color, group[2]))
            new = new if group[2] == 1 else new.split(" ", 1)[1]  # "the apples with pizzas"
            form = _pick(rng, ("replace {} with {}", "swap {} for {}", "turn {} into {}"))
            return Edit(form.format(called, new), after, "replace")
    return None


def _add(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if len(scene.objects) >= MAX_COUNT:
        return None
    name = _absent_object(scene, rng)
    color = _color(rng, name)
    after = insert_object(scene, rng, name, color)
    if after is None:
        return None
    return Edit(_pick(rng, ("add {}", "put {} in the picture")).format(noun_phrase((name, color, 1))), after, "add")


def _remove(scene: Scene, rng: np.random.Generator) -> Edit | None:
    if len(groups_of(scene)) < 2:
        return None
    group, called = _pick_group(scene, rng)
    removed_indices = set(_members(scene, group))
    objects = tuple(item for k, item in enumerate(scene.objects) if k not in removed_indices)
    return Edit(
        _pick(rng, ("remove {}", "take {} away", "delete {}")).format(called), replace(scene, objects=objects), "remove"
    )


def _recolor(scene: Scene, rng: np.random.Generator) -> Edit | None:
    group, called = _pick_group(scene, rng)
    used_colors = {item.color for item in scene.objects if item.name == group[0]}
    color = _pick(rng, tuple(color for color in allowed_colors(group[0]) if color not in used_colors))
    members = set(_members(scene, group))
    objects = tuple(replace(item, color=color) if k in members else item for k, item in enumerate(scene.objects))
    form = _pick(rng, ("make {} {}", "paint {} {}", "change the color of {} to {}"))
    return Edit(form.format(called, color), replace(scene, objects=objects), "recolour")


def _background(scene: Scene, rng: np.random.Generator) -> Edit | None:
    color = _pick(rng, tuple(name for name in BACKGROUNDS if name != scene.background))
    form = _pick(rng, ("change the background to {}", "make the background {}"))
    return Edit(form.format(color), replace(scene, background=color), "background")


_EDITORS = {"replace": _replace, "add": _add, "remove": _remove, "recolour": _recolor, "background": _background}


# --- verdicts and expansions ----------------------------------------------------------------------


def sample_judgement(scene: Scene, rng: np.random.Generator) -> Judgement:
    """A prompt that the scene satisfies (half of the time) or misses in one attribute, and why in one clause."""
    facts = reorder_facts(extract_facts(scene), rng)
    if rng.random() < 0.3:
        facts = replace(facts, background=None, ground=False)
    if rng.random() < 0.5:
        return Judgement(
            caption(facts), True, "the picture shows " + join_phrases([noun_phrase(group) for group in facts.groups])
        )
    keep = not held_out_combinations(facts.groups)
    while True:
        corrupted_facts, reason = _corrupt_facts(facts, rng)
        if not keep or not held_out_combinations(corrupted_facts.groups):
            return Judgement(caption(corrupted_facts), False, reason)


def _corrupt_facts(facts: Facts, rng: np.random.Generator) -> tuple[Facts, str]:
    """Facts that differ from the true ones in one attribute, and the difference in words."""
    k = int(rng.integers(len(facts.groups)))
    name, color, count = facts.groups[k]
    is_are, present_names = ("is", "there is") if count == 1 else ("are", "there are")
    kinds = ["object", "count"] + ["color"] * (color is not None)
    kinds += ["background"] * (facts.background is not None) + ["relation"] * (2 * (facts.relation is not None))
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "background":
        alternative = _pick(rng, tuple(shade for shade in BACKGROUNDS if shade != facts.background))
        return replace(facts, background=alternative), f"the background is {facts.background}, not {alternative}"
    if kind == "relation":
        assert facts.relation is not None
        a, b = (noun_form(group[0]) for group in facts.groups[:2])
        stated_relation = OPPOSITE[facts.relation]
        return replace(
            facts, relation=stated_relation
        ), f"the {a} is {facts.relation} the {b}, not {stated_relation} it"
    if kind == "color":
        alternative = _pick(rng, tuple(tint for tint in allowed_colors(name) if tint != color))
        new: Group = (name, alternative, count)
        reason = f"the {noun_form(name, count)} {is_are} {color}, not {alternative}"
    elif kind == "count":
        room = MAX_COUNT - sum(group[2] for group in facts.groups) + count
        number = int(rng.choice([n for n in range(1, max(room, 2) + 1) if n != count]))
        new = (name, color, number)
        reason = f"{present_names} {NUMBER_WORDS[count]} {noun_form(name, count)}, not {NUMBER_WORDS[number]}"
    else:
        names = [group[0] for group in facts.groups]
        alternative = _pick(rng, tuple(choice for choice in OBJECT_EMOJI if choice not in names))
        new = (alternative, color if color in allowed_colors(alternative) else None, count)
        reason = f"there is no {noun_form(alternative)}"
    groups = tuple(new if j == k else group for j, group in enumerate(facts.groups))
    relation = facts.relation if all(group[2] == 1 for group in groups) else None
    return replace(facts, groups=groups, relation=relation), reason


def expansion(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A short prompt and a descriptive one for the same picture (prompt expansion)."""
    facts = reorder_facts(extract_facts(scene), rng)
    short = Facts(
        facts.groups, facts.background if rng.random() < 0.3 else None, facts.relation if rng.random() < 0.7 else None
    )
    return caption(short), descriptive_caption(scene, rng)
