"""Captions, their parser, questions, edits, verdicts and stories: all true of the scene, all without a font."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from unigen.toyworld.language import (
    EDITS,
    Facts,
    caption,
    compare_facts,
    count_questions,
    descriptive_caption,
    expansion,
    extract_facts,
    noisy_caption,
    noun_form,
    parse_caption,
    position_questions,
    questions,
    reorder_facts,
    sample_edit,
    sample_judgement,
    scene_from_facts,
    short_caption,
)
from unigen.toyworld.scenes import (
    BACKGROUNDS,
    NUMBER_WORDS,
    OBJECT_EMOJI,
    OPPOSITE,
    Scene,
    SceneObject,
    clear_relation,
    groups_of,
    is_held_out,
    sample_scene,
)
from unigen.toyworld.stories import page_facts, story, text_corpus


def pairs(n: int, seed: int = 0, held_out: bool | None = None):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield sample_scene(rng, held_out=held_out), rng


def test_canonical_captions():
    said = Facts((("horse", "blue", 1), ("dog", "red", 1)), "green", "left of")
    assert caption(said) == "a blue horse to the left of a red dog on a green background"
    assert caption(Facts((("apple", None, 3),), "white")) == "three apples on a white background"
    assert (
        caption(Facts((("cat", "pink", 2), ("owl", None, 1)), "grey", None, True))
        == "two pink cats and an owl on a grey ground"
    )


def test_captions_parse_back():
    for scene, rng in pairs(2500):
        true = extract_facts(scene)
        for text in (caption(true), caption(reorder_facts(true, rng)), descriptive_caption(scene, rng)):
            assert parse_caption(text).canonical() == true.canonical(), text


def test_short_captions_are_true_and_varied():
    with_background = with_relation = 0
    for scene, rng in pairs(1500):
        true, said = extract_facts(scene), parse_caption(short_caption(scene, rng))
        assert set(said.groups) == set(true.groups)
        assert said.background in (None, true.background)
        if said.relation is not None:
            assert said.canonical().relation == true.canonical().relation
        with_background += said.background is not None
        with_relation += said.relation is not None
    assert 800 < with_background < 1150 and 200 < with_relation < 400


@pytest.mark.parametrize(
    ("text", "groups", "background", "relation"),
    [
        ("A photo of three Apples!", (("apple", None, 3),), None, None),
        ("a cat under a red umbrella", (("cat", None, 1), ("umbrella", "red", 1)), None, "below"),
        (
            "dogs, 2 pink cows and an owl against a gray background",
            (("dog", None, 2), ("cow", "pink", 2), ("owl", None, 1)),
            "grey",
            None,
        ),
        ("a firework and three fireworks", (("fireworks", None, 1),), None, None),
        ("two fish", (("fish", None, 2),), None, None),
        ("", (), None, None),
        ("nothing known here", (), None, None),
    ],
)
def test_tolerant_parser(text, groups, background, relation):
    assert parse_caption(text) == Facts(groups, background, relation)


def test_compare_names_what_is_wrong():
    true = Facts((("cat", "blue", 1), ("dog", None, 1)), "white", "left of")
    assert all(compare_facts(Facts((("dog", None, 1), ("cat", "blue", 1)), "white", "right of"), true).values())
    wrong = {
        "objects": Facts((("cow", "blue", 1), ("dog", None, 1)), "white", "left of"),
        "counts": Facts((("cat", "blue", 2), ("dog", None, 1)), "white", "left of"),
        "colors": Facts((("cat", "red", 1), ("dog", None, 1)), "white", "left of"),
        "background": Facts(true.groups, None, "left of"),
        "relation": Facts(true.groups, "white", "above"),
    }
    for attribute, said in wrong.items():
        assert not compare_facts(said, true)[attribute]


def test_oracle_scenes_satisfy_their_prompt():
    for scene, rng in pairs(800):
        true = extract_facts(scene)
        made = extract_facts(scene_from_facts(true, rng))
        assert set(made.groups) == set(true.groups) and made.background == true.background
        if true.relation is not None:
            assert made.canonical() == Facts(true.groups, true.background, true.relation, made.ground).canonical()
    with pytest.raises(ValueError):
        scene_from_facts(parse_caption("nothing"), np.random.default_rng(0))


def answer(question: str, scene: Scene) -> str | None:
    """An independent reader of the simpler questions."""
    words = question.rstrip("?").split()
    if question.startswith("how many"):
        if words[2] == "objects":
            return NUMBER_WORDS[len(scene.objects)]
        return NUMBER_WORDS[sum(words[2] in (item.name + "s", item.name) for item in scene.objects)]
    if question.startswith(("is there", "do you see", "does the picture show")):
        color, name = (words[-2], words[-1]) if words[-2] not in ("a", "an") else (None, words[-1])
        return "yes" if any(item.name == name and color in (None, item.color) for item in scene.objects) else "no"
    return None


def test_answers_are_true_and_balanced():
    kinds: Counter = Counter()
    answers: Counter = Counter()
    irregular = ("firework", "witches", "snowmen", "butterflies", "cactuses", "buses")
    for scene, rng in pairs(1500):
        for qa in questions(scene, rng):
            kinds[qa.kind] += 1
            answers[qa.kind, qa.answer] += 1
            if not any(word in qa.question for word in irregular):
                assert answer(qa.question, scene) in (None, qa.answer), (qa, scene)
            if qa.kind == "background":
                assert qa.answer == scene.background
            if qa.question.startswith("where is the"):
                a, b = sorted(
                    scene.objects,
                    key=lambda item: qa.question.index(f" {'firework' if item.name == 'fireworks' else item.name}"),
                )
                assert clear_relation(a, b) == qa.answer
    assert set(kinds) == {"presence", "count", "colour", "background", "relation"} and min(kinds.values()) > 200
    assert answers["presence", "yes"] == answers["presence", "no"]
    assert answers["count", "one"] < 0.6 * kinds["count"] and answers["colour", "natural"] < 0.3 * kinds["colour"]


def test_totals_count_whatever_there_is():
    """Objects, and each colour, but for one that something has by nature: that apple is red too."""
    things = (("apple", None, 12, 12), ("dog", "red", 40, 12), ("car", "blue", 12, 40), ("car", "blue", 40, 40))
    scene = Scene(tuple(SceneObject(*thing, size=16, angle=0) for thing in things), "white")
    asked = count_questions(scene, np.random.default_rng(0))
    said = {qa.question.split(" are")[0].split(" do")[0].rstrip("?"): qa.answer for qa in asked}
    assert said == {"how many objects": "four", "how many blue objects": "two"}
    for scene, rng in pairs(200):
        found, colors = count_questions(scene, rng), {item.color for item in scene.objects} - {None}
        assert {qa.kind for qa in found} == {"count"} and 1 <= len(found) <= 1 + len(colors)


def test_places_are_those_of_single_objects():
    said = Counter()
    for scene, rng in pairs(300):
        found = position_questions(scene, rng)
        single = [item for item in scene.objects if sum(item.name == other.name for other in scene.objects) == 1]
        assert len(found) == len(single)
        for item in single:
            (qa,) = [qa for qa in found if qa.question.rstrip("?").endswith(f" the {noun_form(item.name)}")]
            words = qa.answer.split()
            assert qa.kind == "place" and qa.question.startswith("where ")
            assert ("left" in words, "right" in words) == (item.x < 0.38 * scene.size, item.x > 0.62 * scene.size)
            assert ("top" in words, "bottom" in words) == (item.y < 0.38 * scene.size, item.y > 0.62 * scene.size)
            said[qa.answer] += 1
    assert len(said) == 9 and "in the middle" in said


def test_edits_change_only_what_they_say():
    kinds: Counter = Counter()
    for scene, rng in pairs(1500, held_out=False):
        edit = sample_edit(scene, rng)
        kinds[edit.kind] += 1
        after, before = edit.edited_scene, scene
        assert not is_held_out(after) and after != before
        kept = set(before.objects) & set(after.objects)
        gone, new = set(before.objects) - kept, set(after.objects) - kept
        if edit.kind == "background":
            assert after.objects == before.objects and edit.instruction.endswith(after.background)
            continue
        assert after.background == before.background
        if edit.kind == "add":
            assert not gone and len(new) == 1
        elif edit.kind == "remove":
            assert not new and len({(item.name, item.color) for item in gone}) == 1
        else:
            assert len(gone) == len(new) and len({(item.name, item.color) for item in gone}) == 1
            assert len({(item.name, item.color) for item in new}) == 1
        if edit.kind == "recolour":
            assert {(i.name, i.x, i.y, i.size) for i in gone} == {(i.name, i.x, i.y, i.size) for i in new}
            assert {item.color for item in new} <= set(edit.instruction.split())
        for item in after.objects:
            x0, y0, x1, y1 = item.box()
            assert min(x0, y0) >= -1e-6 and max(x1, y1) <= after.size + 1e-6
    assert set(kinds) == set(EDITS) and min(kinds.values()) > 80
    with pytest.raises(ValueError, match="unknown kind"):
        sample_edit(scene, rng, kind="explode")
    assert sample_edit(scene, rng, kind="background").kind == "background"


def test_verdicts_are_right():
    ok = 0
    for scene, rng in pairs(2000):
        prompt, good, reason = sample_judgement(scene, rng)
        said, true = parse_caption(prompt).canonical(), extract_facts(scene).canonical()
        holds = set(said.groups) == set(true.groups) and said.background in (None, true.background)
        holds &= said.relation in (None, true.relation)
        assert holds == good, (prompt, reason, scene)
        ok += good
        assert reason
    assert 900 < ok < 1100


def test_expansions_and_noise():
    blank = 0
    for scene, rng in pairs(400):
        short, long = expansion(scene, rng)
        assert len(long) > len(short)
        assert set(parse_caption(short).groups) == set(parse_caption(long).groups) == set(groups_of(scene))
        text = noisy_caption(scene, rng)
        assert text
        blank += not parse_caption(text).groups
    assert 20 < blank < 200


def test_stories_say_what_they_show():
    for seed in range(400):
        tale = story(np.random.default_rng(seed), references=seed % 3, held_out=False)
        assert 3 <= len(tale.pages) <= 5 and len(tale.references) == seed % 3
        seen: Counter = Counter()
        for text, scene in tale.pages:
            said = page_facts(text)
            assert set(said.groups) == set(groups_of(scene)), text
            assert (said.background, said.ground) == (scene.background, scene.ground), text
            if said.relation is not None:
                items = {item.name: item for item in scene.objects}
                related = clear_relation(items[said.groups[0][0]], items[said.groups[1][0]])
                assert related == said.relation, text
            assert not is_held_out(scene)
            seen.update((item.name, item.color) for item in scene.objects)
        assert all(seen[character] >= 2 for character in tale.characters)
        for (name, color), reference in zip(tale.characters, tale.references, strict=False):
            assert groups_of(reference) == ((name, color, 1),)


def test_another_seed_another_story():
    tales = {tuple(text for text, _ in story(np.random.default_rng(seed)).pages) for seed in range(60)}
    assert len(tales) == 60
    assert story(np.random.default_rng(7)) == story(np.random.default_rng(7))
    for seed in range(20):
        tale = story(np.random.default_rng(seed), held_out=True)
        assert any(is_held_out(scene) for _, scene in tale.pages)
    with pytest.raises(ValueError, match="0, 1 or 2"):
        story(np.random.default_rng(0), references=3)


def test_corpus_is_seeded_and_small():
    lines = list(text_corpus(1500, 0))
    assert len(lines) == 1500 and lines[:40] == list(text_corpus(40, 0)) and lines[:40] != list(text_corpus(40, 1))
    text = " ".join(lines)
    assert len(set(text)) < 60 and len(set(text.split())) < 900
    assert set(BACKGROUNDS) <= set(text.replace(".", " ").split())
    assert sum(name in text for name in OBJECT_EMOJI) == len(OBJECT_EMOJI)


def test_opposites_parse():
    a, b = SceneObject("cat", None, 16, 32, 20, 0), SceneObject("dog", None, 48, 32, 20, 0)
    said = extract_facts(Scene((b, a), "white"))
    assert said.groups[0][0] == "cat" and said.relation == "left of"
    turned = Facts((said.groups[1], said.groups[0]), "white", OPPOSITE["left of"])
    assert turned.canonical() == said.canonical()
