"""Illustrated stories of 3-5 pages with recurring characters, and the text corpus of the whole world.

Each frame's text names just what its picture shows: the characters with their colours, a prop, and a place that tells
the background; `page_facts` reads it back. Does not depend on: fonts, pixels, models.

    tale = story(np.random.default_rng(0), references=2)
    tale.request, tale.references, tale.pages
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from unigen.toyworld.language import (
    Facts,
    caption,
    descriptive_caption,
    expansion,
    extract_facts,
    noisy_caption,
    noun_phrase,
    parse_caption,
    questions,
    sample_edit,
    sample_judgement,
    short_caption,
)
from unigen.toyworld.scenes import (
    BACKGROUNDS,
    Group,
    Scene,
    allowed_colors,
    held_out_combinations,
    place_objects,
    sample_scene,
)

Character = tuple[str, str | None]  # name, colour or None (natural)

CHARACTERS = tuple(
    "witch robot horse cat dog bird raven elephant penguin snowman butterfly turtle frog crab bee rabbit ghost cow "
    "dragon owl fish whale".split()
)
_FLYING_CHARACTERS = {"witch", "bird", "raven", "butterfly", "bee", "ghost", "dragon", "owl"}
_PROPS = tuple(
    "moon star tree house sunflower rose apple pizza mushroom cactus cake donut boat balloon key crown umbrella guitar "
    "fireworks castle hat heart rocket car bike plane bus pumpkin clock banana".split()
)
_SHELTERS = tuple("moon star tree umbrella castle balloon plane rocket mushroom fireworks sunflower house".split())
_NUMBER_WORDS = {3: "three", 4: "four", 5: "five"}

# background: (how a text names it, has it a ground plane); the first word group names one background only
PLACES: dict[str, tuple[tuple[str, bool], ...]] = {
    "white": (("in the white snow", True), ("in the white clouds", False)),
    "black": (("in the black night", False), ("on a black road", True)),
    "grey": (("in the grey fog", False), ("on the grey rocks", True)),
    "blue": (("in the blue sky", False), ("by the blue sea", True)),
    "green": (("on the green grass", True), ("in the green forest", False)),
    "yellow": (("on the yellow sand", True), ("in the yellow light", False)),
    "pink": (("in the pink morning", False), ("on the pink meadow", True)),
    "brown": (("on the brown hill", True), ("in the brown cave", False)),
}
assert set(PLACES) == set(BACKGROUNDS)


@dataclass(frozen=True)
class StoryBeat:
    """What happens on one page."""

    texts: tuple[str, ...]
    """Of which one is drawn."""
    character_indices: tuple[int, ...]
    """Who is seen."""
    props: tuple[str, ...] = ()
    """Of which one is drawn."""
    relation: str | None = None
    """Where the first character is as seen from the prop."""


_FIRST, _SECOND, _BOTH = (0,), (1,), (0, 1)
_BEATS = {
    "open": StoryBeat(
        ("once upon a time {a} lived {place}.", "one day {a} woke up {place}.", "this is the story of {a} {place}."),
        _FIRST,
    ),
    "home": StoryBeat(("once there was {a} with {prop} {place}.", "{a} lived near {prop} {place}."), _FIRST, _PROPS),
    "friends": StoryBeat(
        ("{a} and {b} were good friends {place}.", "once upon a time {a} and {b} lived {place}."), _BOTH
    ),
    "meet": StoryBeat(("then {a} met {b} {place}.", "soon {a} saw {b} {place} and said hello."), _BOTH),
    "find": StoryBeat(
        ("{a} and {b} found {prop} {place}.", "{a} gave {prop} to {b} {place}.", "{a} showed {b} {prop} {place}."),
        _BOTH,
        _PROPS,
    ),
    "play": StoryBeat(
        ("{a} and {b} played with {prop} all day {place}.", "{a} and {b} danced around {prop} {place}."), _BOTH, _PROPS
    ),
    "lose": StoryBeat(("but then {a} was lost and alone {place}.", "{a} was sad and alone {place}."), _FIRST),
    "alone": StoryBeat(("{b} waited alone {place}.", "{b} was lost {place} and cried."), _SECOND),
    "search": StoryBeat(
        ("{a} looked everywhere and came to {prop} {place}.", "{a} asked for help at {prop} {place}."), _FIRST, _PROPS
    ),
    "again": StoryBeat(("at last {a} found {b} again {place}.", "{a} saw {b} {place} and was happy again."), _BOTH),
    "over": StoryBeat(
        ("{a} {flew} over {prop} {place}.", "look, {a} {flew} over {prop} {place}!"), _FIRST, _PROPS, "above"
    ),
    "discover": StoryBeat(
        ("{a} found {prop} {place}.", "{a} wanted {prop} and got it {place}.", "{a} dreamed of {prop} {place}."),
        _FIRST,
        _PROPS,
    ),
    "rest": StoryBeat(
        ("{a} rested under {prop} {place}.", "{a} sat under {prop} {place} and sang."), _FIRST, _SHELTERS, "below"
    ),
    "end": StoryBeat(
        ("in the end {a} and {b} went to sleep {place}.", "{a} and {b} went home happy {place}. the end."), _BOTH
    ),
    "party": StoryBeat(
        ("{a} and {b} had a party with {prop} {place}. the end.",),
        _BOTH,
        ("cake", "fireworks", "guitar", "pizza", "balloon"),
    ),
    "sleep": StoryBeat(
        ("in the end {a} fell asleep under {prop} {place}.", "at night {a} slept under {prop} {place}."),
        _FIRST,
        _SHELTERS,
        "below",
    ),
    "home again": StoryBeat(("{a} went home happy {place}. the end.", "and {a} smiled {place}. the end."), _FIRST),
}
_PLOTS = {
    1: (
        ("open", "discover", "sleep"),
        ("home", "over", "home again"),
        ("open", "over", "discover", "home again"),
        ("open", "lose", "search", "home again"),
        ("home", "lose", "over", "rest", "sleep"),
        ("open", "search", "rest", "discover", "home again"),
    ),
    2: (
        ("open", "meet", "end"),
        ("friends", "find", "end"),
        ("open", "meet", "find", "end"),
        ("home", "meet", "play", "party"),
        ("friends", "alone", "again", "party"),
        ("friends", "over", "find", "end"),
        ("friends", "lose", "search", "again", "end"),
        ("open", "over", "meet", "play", "party"),
        ("friends", "play", "alone", "again", "end"),
        ("open", "meet", "lose", "again", "party"),
    ),
}


@dataclass(frozen=True)
class Story:
    """An illustrated story."""

    request: str
    """Text of the request."""
    characters: tuple[Character, ...]
    """One or two."""
    references: tuple[Scene, ...]
    """Pictures of them, where the request refers to such."""
    pages: tuple[tuple[str, Scene], ...]
    """The text and the picture of each."""


def _pick(rng: np.random.Generator, choices: tuple) -> str:
    return choices[int(rng.integers(len(choices)))]


def story(rng: np.random.Generator, references: int = 0, held_out: bool | None = False, size: int = 64) -> Story:
    """A story with one or two characters (as many as references, 0-2, where there are any). held_out: False holds no
    held-out combination in any picture, True has characters that are one, None as they come. ValueError for other
    numbers of references.
    """
    if references not in (0, 1, 2):
        raise ValueError(f"a story takes 0, 1 or 2 reference pictures, not {references}")
    number = references or (2 if rng.random() < 0.75 else 1)
    while True:
        names = [CHARACTERS[k] for k in rng.choice(len(CHARACTERS), size=number, replace=False)]
        cast = tuple((name, _pick(rng, allowed_colors(name)) if rng.random() < 0.5 else None) for name in names)
        is_held_out = bool(held_out_combinations([(name, color, 1) for name, color in cast]))
        if held_out is None or is_held_out == held_out:
            break
    plot = _PLOTS[number][int(rng.integers(len(_PLOTS[number])))]
    pages, introduced_ids = [], set[int]()
    for beat in plot:
        pages.append(_make_page(_BEATS[beat], introduced_ids, cast, rng, held_out, size))
        introduced_ids.update(_BEATS[beat].character_indices)
    pictures = tuple(
        place_objects(rng, ((name, color, 1),), _pick(rng, tuple(BACKGROUNDS)), size=size)
        for name, color in cast[:references]
    )
    return Story(_request(cast, references, len(plot), rng), cast, pictures, tuple(pages))


def _make_page(
    beat: StoryBeat,
    introduced_ids: set[int],
    cast: tuple[Character, ...],
    rng: np.random.Generator,
    held_out: bool | None,
    size: int,
) -> tuple[str, Scene]:
    groups: list[Group] = [(*cast[k], 1) for k in beat.character_indices]
    background = _pick(rng, tuple(PLACES))
    place_phrase, ground = PLACES[background][int(rng.integers(2))]
    words = {
        "a": _name(cast[0], 0 in introduced_ids),
        "place": place_phrase,
        "flew": "flew" if cast[0][0] in _FLYING_CHARACTERS else "jumped",
    }
    if len(cast) > 1:
        words["b"] = _name(cast[1], 1 in introduced_ids)
    while beat.props:
        prop: Group = (_pick(rng, beat.props), None, 1)
        if held_out is not False or not held_out_combinations([*groups, prop]):
            groups.append(prop)
            words["prop"] = noun_phrase(prop)
            break
    scene = place_objects(rng, tuple(groups), background, beat.relation, ground, size)
    if ground and not scene.ground:  # there was no room on the ground: tell the place without one
        words["place"] = next(text for text, flat in PLACES[background] if not flat)
    return _pick(rng, beat.texts).format(**words), scene


def _name(character: Character, is_introduced: bool) -> str:
    """As in "a blue witch", "the blue witch" once introduced: always with the colour, so that each page can be drawn
    from its own text.
    """
    indefinite = noun_phrase((*character, 1))
    return "the " + indefinite.split(" ", 1)[1] if is_introduced else indefinite


def _request(cast: tuple[Character, ...], references: int, length: int, rng: np.random.Generator) -> str:
    requested_characters = tuple((name, color if rng.random() < 0.75 else None) for name, color in cast)
    names = noun_phrase((*requested_characters[0], 1))
    if len(cast) == 2:
        second_name = noun_phrase((*requested_characters[1], 1))
        if rng.random() < 0.6:
            owner = "her" if cast[0][0] in ("witch", "cow") else _pick(rng, ("his", "her"))
            second_name = f"{owner} {second_name.split(' ', 1)[1]}"
        names += f" and {second_name}"
    if references:
        is_plural = references == 2
        these = "these two images" if is_plural else "this image"
        them = names if rng.random() < 0.3 else ("them" if is_plural else "it")
        text = _pick(
            rng, (f"follow the identity of {these}: a story about {them}", f"{these}: tell me a story about {them}")
        )
    else:
        text = _pick(
            rng, ("a story about {}", "a story about {}", "tell me a story about {}", "write a story about {}", "{}")
        )
        text = text.format(names)
    return text + (f" in {_NUMBER_WORDS[length]} pictures" if rng.random() < 0.2 else "")


def page_facts(text: str) -> Facts:
    """The facts that a frame's text states, its place read as background and ground."""
    for background, ways in PLACES.items():
        for place_phrase, ground in ways:
            if place_phrase in text.lower():
                facts = parse_caption(text.lower().replace(place_phrase, " "))
                return replace(facts, background=background, ground=ground)
    return parse_caption(text)


# --- the corpus -----------------------------------------------------------------------------------

_INSTRUCTIONS = (
    "describe the image.",
    "describe this picture in detail.",
    "what is in the picture?",
    "write a prompt in more detail for",
    "does the picture match the prompt?",
    "follow the identity of these two images: a story about them",
    "follow the identity of this image: a story about it",
    "hello! what can you do?",
    "i can draw pictures, describe them, edit them and tell stories.",
)


def text_corpus(n: int, seed: int = 0) -> Iterator[str]:
    """n lines of every kind of text in the world's language, for training a text tokenizer; needs no font. Line i
    depends on (seed, i) only.
    """
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        yield _LINE_SAMPLERS[int(rng.integers(len(_LINE_SAMPLERS)))](rng)


def _question_line(rng: np.random.Generator) -> str:
    qa = questions(sample_scene(rng), rng)[0]
    return f"{qa.question} {qa.answer}"


def _judgement_line(rng: np.random.Generator) -> str:
    prompt, ok, reason = sample_judgement(sample_scene(rng), rng)
    return f"{prompt}? {'yes' if ok else 'no'}, {reason}."


def _story_line(rng: np.random.Generator) -> str:
    tale = story(rng, references=int(rng.integers(3)))
    return " ".join([tale.request + ".", *(text for text, _ in tale.pages)])


_LINE_SAMPLERS = (
    lambda rng: caption(extract_facts(sample_scene(rng))),
    lambda rng: short_caption(sample_scene(rng), rng),
    lambda rng: descriptive_caption(sample_scene(rng), rng),
    lambda rng: noisy_caption(sample_scene(rng), rng),
    lambda rng: sample_edit(sample_scene(rng), rng).instruction,
    lambda rng: " : ".join(expansion(sample_scene(rng), rng)),
    lambda rng: _INSTRUCTIONS[int(rng.integers(len(_INSTRUCTIONS)))],
    _question_line,
    _judgement_line,
    _story_line,
    _story_line,
)
