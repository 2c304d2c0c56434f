"""What a caption says: `Facts` of a scene, captions of several registers, their parser, and scenes made to match a
prompt.

Does not depend on: fonts, pixels, models. `parse_caption` is the inverse of `caption` and `descriptive_caption` and
tolerant of the rest, so that a caption written by a model is scored by comparing facts, and a prompt becomes an oracle
scene:

    facts = parse_caption("a photo of two pink cats and a car on a green background")
    scene = scene_from_facts(facts, np.random.default_rng(0))
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from unigen.toyworld.scenes import (
    BACKGROUNDS,
    COLORS,
    MAX_COUNT,
    NUMBER_WORDS,
    OBJECT_EMOJI,
    OPPOSITE,
    Group,
    Scene,
    SceneObject,
    clear_relation,
    groups_of,
    place_objects,
    plural,
    singular,
)


@dataclass(frozen=True)
class Facts:
    """What a caption states: groups (name, colour or None, count), background or None when unsaid, the relation of
    the first group to the second or None, and whether the picture has a ground plane.
    """

    groups: tuple[Group, ...]
    background: str | None = None
    relation: str | None = None
    ground: bool = False

    def canonical(self) -> Facts:
        """The same facts in alphabetical order, for comparison; two related groups stay in front, their relation
        turned with them.
        """
        split = 0 if self.relation is None else 2
        first, other_groups = (
            sorted(self.groups[:split], key=_group_sort_key),
            sorted(self.groups[split:], key=_group_sort_key),
        )
        turned = self.relation is not None and first != list(self.groups[:2])
        relation = OPPOSITE[self.relation] if turned and self.relation is not None else self.relation
        return Facts((*first, *other_groups), self.background, relation, self.ground)


def _group_sort_key(group: Group) -> tuple[str, str, int]:
    return group[0], group[1] or "", group[2]


def extract_facts(scene: Scene) -> Facts:
    """The facts of a scene; groups from left to right (top to bottom where the relation is vertical).

    A relation is stated only between two single objects, and only if it is unambiguous by GenEval's rule
    (`clear_relation`).
    """
    groups = groups_of(scene)

    def mean_x(group: Group) -> float:
        return float(np.mean([item.x for item in scene.objects if (item.name, item.color) == group[:2]]))

    groups = tuple(sorted(groups, key=mean_x))
    related = None
    if len(scene.objects) == 2 and len(groups) == 2:
        a, b = (_first_object(scene, group) for group in groups)
        related = clear_relation(a, b)
        if related == "below":
            groups, related = (groups[1], groups[0]), "above"
    return Facts(groups, scene.background, related, scene.ground)


def _first_object(scene: Scene, group: Group) -> SceneObject:
    return next(item for item in scene.objects if (item.name, item.color) == group[:2])


def compare_facts(predicted: Facts, target: Facts) -> dict[str, bool]:
    """Compare what a caption says with what holds.

    Args:
        predicted: facts of the caption.
        target: the true facts; what is missing of them is wrong, and so is what is not among them.

    Returns:
        Whether objects, counts, colors, background and relation are right.
    """
    a, b = predicted.canonical(), target.canonical()
    return {
        "objects": sorted(name for name, _, _ in a.groups) == sorted(name for name, _, _ in b.groups),
        "counts": sorted((name, n) for name, _, n in a.groups) == sorted((name, n) for name, _, n in b.groups),
        "colors": sorted((name, c or "") for name, c, _ in a.groups)
        == sorted((name, c or "") for name, c, _ in b.groups),
        "background": a.background == b.background,
        "relation": a.relation == b.relation,
    }


# --- writing --------------------------------------------------------------------------------------


def noun_form(name: str, count: int = 1) -> str:
    """The noun, singular or plural by the count."""
    return singular(name) if count == 1 else plural(name)


def with_article(words: str) -> str:
    """As in "a horse", "an apple"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun_phrase(group: Group) -> str:
    """As in "a blue horse", "three apples", "an owl"."""
    name, color, count = group
    words = (color + " " if color else "") + noun_form(name, count)
    return with_article(words) if count == 1 else f"{NUMBER_WORDS[count]} {words}"


def definite_phrase(group: Group, color: bool = True) -> str:
    """As in "the blue horse", "the apples"."""
    return "the " + (group[1] + " " if color and group[1] else "") + noun_form(group[0], group[2])


def join_phrases(parts: list[str]) -> str:
    """As in "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


_RELATION_PHRASES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
_RELATION_VARIANTS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def caption(facts: Facts) -> str:
    """The canonical caption: "a blue horse to the left of a red dog on a green background" ("on a green ground" with
    a ground plane).
    """
    parts = [noun_phrase(group) for group in facts.groups]
    if facts.relation is not None:
        parts[:2] = [f"{parts[0]} {_RELATION_PHRASES[facts.relation]} {parts[1]}"]
    text = join_phrases(parts)
    if facts.background is not None:
        text += f" on a {facts.background} {'ground' if facts.ground else 'background'}"
    return text


def choose(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    """One of the choices, each as likely as another."""
    return choices[int(rng.integers(len(choices)))]


def reorder_facts(facts: Facts, rng: np.random.Generator) -> Facts:
    """The same facts, told in another order."""
    if facts.relation is not None:
        if rng.random() < 0.5:
            return facts
        swapped = (facts.groups[1], facts.groups[0], *facts.groups[2:])
        return Facts(swapped, facts.background, OPPOSITE[facts.relation], facts.ground)
    groups = tuple(facts.groups[k] for k in rng.permutation(len(facts.groups)))
    return Facts(groups, facts.background, None, facts.ground)


def short_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt as people write it: with or without "a photo of", the relation, the background; in any order; all of
    it true.
    """
    facts = reorder_facts(extract_facts(scene), rng)
    parts = [noun_phrase(group) for group in facts.groups]
    if facts.relation is not None and rng.random() < 0.5:
        parts = [f"{parts[0]} {choose(rng, _RELATION_VARIANTS[facts.relation])} {parts[1]}"]
    text = join_phrases(parts)
    if rng.random() < 0.35:
        text = choose(rng, ("a photo of ", "a picture of ", "an image of ", "draw ", "a drawing of ")) + text
    if rng.random() < 0.65:
        noun = "ground" if facts.ground and rng.random() < 0.5 else "background"
        preposition = "on" if noun == "ground" or rng.random() < 0.7 else choose(rng, ("with", "against"))
        text += f" {preposition} a {facts.background} {noun}"
    return text


def position_phrase(item: SceneObject, size: int) -> str:
    """Where in the picture an object is, as in "at the top left"."""
    column = "left" if item.x < 0.38 * size else "right" if item.x > 0.62 * size else ""
    row = "top" if item.y < 0.38 * size else "bottom" if item.y > 0.62 * size else ""
    if not row and not column:
        return "in the middle"
    return "at the " + f"{row} {column}".strip()


def descriptive_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Several sentences: what there is, how it stands, where single objects are and how large, and the background.
    `parse_caption` reads all facts back.
    """
    facts = reorder_facts(extract_facts(scene), rng)
    parts = [noun_phrase(group) for group in facts.groups]
    several = facts.groups[0][2] > 1
    opening_verb = "there are " if several else "there is "
    opening = choose(rng, (opening_verb, "the picture shows ", "we see ", "this is a picture of "))
    if facts.relation is not None:
        sentences = [f"{opening}{parts[0]} {_RELATION_PHRASES[facts.relation]} {parts[1]}"]
    else:
        sentences = [opening + join_phrases(parts)]
    for group in facts.groups:
        if group[2] == 1 and rng.random() < 0.7:
            item = _first_object(scene, group)
            large = "large" if item.size > scene.size * 0.52 else "small" if item.size < scene.size * 0.35 else ""
            place = position_phrase(item, scene.size)
            sentences.append(
                f"{definite_phrase(group, color=False)} is " + (f"{large} and {place}" if large else place)
            )
    if scene.ground:
        sentences.append(choose(rng, ("the ground and the background are {}", "the background is {} with a ground")))
    else:
        sentences.append(
            choose(rng, ("the background is {}", "all on a {} background", "behind is a plain {} background"))
        )
    return ". ".join(sentences).format(scene.background) + "."


_FILLER = ("stock photo", "free clip art", "image", "icon", "wallpaper", "cute", "nice", "hd", "new", "best")


def noisy_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Like alt text from the web: words dropped, generic words added, sometimes nothing of use (Betker et al. 2023,
    section 2).
    """
    u = rng.random()
    if u < 0.12:
        return " ".join(choose(rng, _FILLER) for _ in range(1 + int(rng.integers(2)))) + f" {int(rng.integers(1000))}"
    words = caption(extract_facts(scene)).split(" on a ")[0].split() if u < 0.6 else short_caption(scene, rng).split()
    kept_words = [word for word in words if rng.random() > 0.3] or words[-1:]
    if rng.random() < 0.5:
        kept_words.insert(0 if rng.random() < 0.5 else len(kept_words), choose(rng, _FILLER))
    return " ".join(kept_words)


# --- reading --------------------------------------------------------------------------------------

_NOUNS = {singular(name): (name, False) for name in OBJECT_EMOJI}
_NOUNS |= {plural(name): (name, True) for name in OBJECT_EMOJI if plural(name) != singular(name)}
_NOUNS |= {
    "fishes": ("fish", True),
    "bicycle": ("bike", False),
    "bicycles": ("bike", True),
    "doughnut": ("donut", False),
}
_NOUNS |= {"doughnuts": ("donut", True), "cacti": ("cactus", True)}
_COUNTS = {
    "a": 1,
    "an": 1,
    **{word: k for k, word in enumerate(NUMBER_WORDS)},
    **{str(k): k for k in range(MAX_COUNT + 1)},
}
_IGNORED_WORDS = {"large", "small", "big", "little", "single", "natural"}
_RELATION_WORDS = {"left of": "left of", "right of": "right of", "above": "above", "over": "above", "below": "below"}
_RELATION_WORDS |= {"under": "below", "beneath": "below", "underneath": "below"}
_RELATION = re.compile(r"\b(left of|right of|above|over|below|underneath|under|beneath)\b")
_BACKGROUND_NAMES = "|".join(BACKGROUNDS).replace("grey", "grey|gray")
_BACKGROUND_PATTERN = re.compile(rf"\b({_BACKGROUND_NAMES}) (background|ground)\b")
_BACKGROUND_SENTENCE_PATTERN = re.compile(
    rf"\b(background|ground)(?: and the background)? (?:is|are) ({_BACKGROUND_NAMES})\b(?P<with> with a ground)?"
)


def parse_caption(text: str) -> Facts:
    """The facts that a caption states; never fails, but what it does not know is missing. "the horse" repeats a group
    named before; a plural without a number counts as two.
    """
    words_text = " ".join(re.sub(r"[^a-z0-9 ]+", " ", text.lower()).split())
    background, ground = None, False
    if match := _BACKGROUND_PATTERN.search(words_text):
        background, ground = match[1], match[2] == "ground"
    elif match := _BACKGROUND_SENTENCE_PATTERN.search(words_text):
        background, ground = match[2], match[1] == "ground" or match["with"] is not None
    words_text = _BACKGROUND_SENTENCE_PATTERN.sub(" ", _BACKGROUND_PATTERN.sub(" ", words_text))

    groups: list[Group] = []
    starts: list[int] = []  # where each group's noun stands in the text
    position = 0
    words = words_text.split()
    offsets = []
    words_text = " ".join(words)
    for word in words:
        offsets.append(position)
        position += len(word) + 1
    for k, word in enumerate(words):
        if word not in _NOUNS:
            continue
        name, is_plural = _NOUNS[word]
        color, j = None, k - 1
        if j >= 0 and words[j] in COLORS:
            color, j = words[j], j - 1
        while j >= 0 and words[j] in _IGNORED_WORDS:
            j -= 1
        before = words[j] if j >= 0 else ""
        if before in ("the", "is", "her", "his", "its") and any(name == group[0] for group in groups):
            continue
        count = _COUNTS.get(before, 2 if is_plural else 1)
        if count == 0 or (name, color) in [group[:2] for group in groups]:
            continue
        groups.append((name, color, count))
        starts.append(offsets[k])

    relation = None
    for match in _RELATION.finditer(words_text):
        groups_before = [k for k, start in enumerate(starts) if start < match.start()]
        groups_after = [k for k, start in enumerate(starts) if start > match.start()]
        if groups_before and groups_after:
            a, b = groups_before[-1], groups_after[0]
            other_groups = [group for k, group in enumerate(groups) if k not in (a, b)]
            groups, relation = [groups[a], groups[b], *other_groups], _RELATION_WORDS[match[1]]
            break
    if background == "gray":
        background = "grey"
    return Facts(tuple(groups), background, relation, ground)


def scene_from_facts(facts: Facts, rng: np.random.Generator, size: int = 64) -> Scene:
    """A scene that satisfies the facts: the oracle of the evaluation. Where the facts do not give them, the
    background is random and colours are natural.

    ValueError for no object or more than four. A relation is honoured between single objects only."""
    related = facts.relation is not None and len(facts.groups) >= 2 and facts.groups[0][2] == facts.groups[1][2] == 1
    background = facts.background or choose(rng, tuple(BACKGROUNDS))
    return place_objects(rng, facts.groups, background, facts.relation if related else None, facts.ground, size)
