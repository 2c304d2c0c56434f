"""Options of requests to the local engine, and all groups of options that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from unigen.options import DRAWING, WRITING, GroupType, OptionGroup, find_groups, option
from unigen.utils.option_types import COUNT, MAX_IMAGES, SEED, FloatRange, IntRange, Name, Size, Text

ROOMS = ("unigen.inference.options", "unigen.samplers.options", "unigen.generators.options", "unigen.diffusion.options")
"""Modules and packages of which the local engine takes the groups, in the order in which they are listed."""
CANDIDATES = IntRange(1, 64)
MAX_TOKENS = IntRange(1, 1_000_000)
PREVIEWS = IntRange(0, 64)
VARIATION = FloatRange(0, 1, "1 is all of the picture", above=True)


@dataclass(frozen=True)
class AnswerCount(OptionGroup):
    """How many answers are made."""

    outputs = DRAWING | WRITING

    n: int = option(1, "how many: out-0.png, out-1.png, ...", COUNT, cli="-n", served=IntRange(1, 16), reported=False)
    "Answers, with seeds seed, seed + 1, .."
    candidates: int = option(
        1,
        "candidates for each answer, of which the best-scoring one is kept",
        CANDIDATES,
        served=IntRange(1, 8),
        reported=False,
    )
    "Answers of which each is the best."


@dataclass(frozen=True)
class RequestOptions(OptionGroup):
    """Options of every model."""

    outputs = DRAWING | WRITING

    seed: int = option(0, "same seed, same result", SEED)
    "Seed of all random numbers."
    size: tuple[int, int] | None = option(
        None, "of pictures in pixels, for models of several sizes", Size(), metavar="WxH", reported=False
    )
    "Width and height in pixels; None is what the document says, or the model's own."
    generator: str | None = option(None, "how pictures are generated", Name())
    "Name of the generator of pictures; None is next-token, or the model's first."


@dataclass(frozen=True)
class AnswerLimits(OptionGroup):
    """Where an answer ends."""

    outputs = WRITING

    max_tokens: int = option(256, "tokens of text of an answer", MAX_TOKENS)
    "Tokens of text."
    max_images: int = option(8, "pictures of an answer in text and pictures", MAX_IMAGES)
    "Pictures of an interleaved answer."


@dataclass(frozen=True)
class Previews(OptionGroup):
    """Pictures shown while they are made."""

    previews: int = option(
        0,
        "of each picture at most, before it is finished",
        PREVIEWS,
        cli="",
        http="partial_images",
        served=IntRange(0, 3),
        reported=False,
    )
    "Of each picture at most, where its generator has any (`Engine.stream`)."


@dataclass(frozen=True)
class PromptOptions(OptionGroup):
    """What a prompt says besides."""

    negative_prompt: str = option(
        "",
        "of a diffusers pipeline: what pictures should not show",
        Text(),
        cli="--negative",
        metavar="WORDS",
        off="",
    )
    "What pictures are not to show."


@dataclass(frozen=True)
class VariationOptions(OptionGroup):
    """Regeneration of a random part of an image."""

    outputs = frozenset({"inpaint"})

    variation: float = option(
        0.5,
        "share of the image to regenerate, at random positions",
        VARIATION,
        cli="--vary",
        reported=False,
    )
    "Share of the codes that is sampled again."


@cache
def local_groups() -> tuple[GroupType, ...]:
    """All groups of options that the local engine takes."""
    return tuple(group for room in ROOMS for group in find_groups(room))
