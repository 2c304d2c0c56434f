"""How a family lays documents out as ids: the protocol, and what templates of public models share.

Does not depend on: weights, how anything is generated. Families own their strings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from unigen.batch import Layout, Tokens
from unigen.document import Document, Segment
from unigen.media.pixels import center_crop_resize

Output = Literal["image", "text", "interleaved", "pair"]
OUTPUTS: tuple[Output, ...] = ("image", "text", "interleaved", "pair")
IMAGE_OUTPUTS: tuple[Output, ...] = ("image", "pair")
"""Outputs that are one picture, in "pair" with the text that is written with it."""


class UnsupportedError(ValueError):
    """A model cannot do what is asked, whatever it is given."""


def images_first(segments: Sequence[Segment]) -> list[Segment]:
    """The segments, with the pictures of each of the user's messages before its words, else in their order.

    For families that have learnt their questions so. A message is all that the user says before the assistant does."""
    ordered: list[Segment] = []
    for role, message in groupby(segments, key=lambda segment: segment.role):
        ordered += sorted(message, key=lambda segment: role == "user" and segment.image is None)
    return ordered


def split_system_messages(segments: Sequence[Segment]) -> tuple[str, list[Segment]]:
    """The text of all system messages, "" where there are none, and what the user and the assistant say."""
    system_texts = [(segment.text or "").strip() for segment in segments if segment.role == "system"]
    return "\n\n".join(system_texts), [segment for segment in segments if segment.role != "system"]


_POLITE_PREFIX = re.compile(r"^(?:please\b[\s,]*|(?:can|could|would|will) you\b\s*)+", re.IGNORECASE)
_QUESTION_START = re.compile(
    r"(?:what|which|who|whose|whom|where|when|why|how|is|are|am|was|were|do|does|did|has|have|can|could|should|would|will"
    r"|describe|caption|explain|tell(?!.*\bstory)|say|count|list|name|identify|classify|read|transcribe|translate|summari[sz]e|compare"
    r"|answer|see|know|guess)(?:'s|’s|s)?\b",
    re.IGNORECASE,
)


def is_question(text: str) -> bool:
    """Do English words ask for words: "what is this", "Describe the image.", "a dog, right?"? What is asked for
    politely is what is asked for: "can you make it red?" does not."""
    for sentence in re.split(r"(?<=[.!?？؟])\s+|\n", text):
        sentence_body = _POLITE_PREFIX.sub("", sentence.strip())
        is_polite = sentence_body != sentence.strip()
        if _QUESTION_START.match(sentence_body) or (not is_polite and sentence_body.endswith(("?", "？", "؟"))):
            return True
    return False


def default_output(document: Document, outputs: Sequence[Output]) -> Output:
    """What an answer holds where nobody says: text, where the last message asks about a picture of the conversation;
    else text and pictures as the model decides, else what it can."""
    last: list[str] = []
    for role, message in groupby(document.segments, key=lambda segment: segment.role):
        last = [segment.text or "" for segment in message] if role == "user" else last
    if "text" in outputs and document.images() and is_question("\n".join(last)):
        return "text"
    return next(output for output in ("interleaved", "text", "image") if output in outputs)


class Template(Protocol):
    """How a family lays a document out as ids, and reads ids as text."""

    outputs: tuple[Output, ...]
    """What the model can be asked for."""
    context_generator: str
    """The generator as which finished pictures stand in a document."""
    text_lengths: dict[str, int]
    """By generator, positions of text that a picture's segment opens with, where it does."""
    classes: tuple[str, ...]
    """Names of the classes that the model draws; empty where it draws words."""
    stop_token_ids: tuple[int, ...]
    """Ids that end an answer."""
    variable_size: bool
    """May pictures be of any size?"""
    num_guidance_scales: int
    """One less than the branches that guidance has."""
    supports_system: bool
    """Are system messages followed in text?"""
    settings: dict[str, Any]
    """What unigen.json stores of the template."""
    begin_ids: dict[str, int]
    """By generator, the token that begins a picture; without it the prompt itself does."""
    num_candidates: int
    """Captions of which the best is chosen, if nothing else is asked for."""

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """A picture as pixels (H, W, 3), uint8, of `size` along a side."""
        ...

    def layout(self, grid: tuple[int, int]) -> Layout:
        """How a picture of so many rows and columns of codes stands among ids."""
        ...

    def encode(self, document: Document, *, uncond: bool = False, generator: str = "next-token") -> Tokens:
        """A whole document for training.

        Args:
            document: ends with what the assistant says or draws.
            uncond: lay it out for guidance's other branch.
            generator: writes the assistant's last picture.
        """
        ...

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """A document up to where the model goes on.

        Args:
            document: the prompt.
            output: what is asked for.
            branch: of guidance; 0 sees all.
        """
        ...

    def bidirectional_prefix(self, ids: Sequence[int]) -> int:
        """How many of a prompt's ids, the first, see each other, as in a prefix language model; 0 is causal."""
        ...

    def prefix_text_ids(self, document: Document, generator: str) -> list[int]:
        """The ids of the text that a picture's segment of this generator opens with."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, as the user reads it."""
        ...

    def mask_to_cells(self, mask: Image.Image, size: int, grid: tuple[int, int]) -> np.ndarray:
        """The codes (h, w), bool, that a mask marks, for pictures of `size` pixels along a side."""
        ...


def touched_cells(mask: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """The codes (h, w), bool, of which the mask marks any pixel.

    Args:
        mask: square, white (128 and above) where it marks.
        grid: rows and columns of codes.
    """
    mask_HW = np.asarray(mask) >= 128
    rows, columns = (np.arange(n) * len(mask_HW) // n for n in grid)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask_HW, rows, 0), columns, 1)


class PretrainedTemplate:
    """What templates of public models share: next-token, no text in a picture's span, special tokens by name."""

    outputs: tuple[Output, ...] = ("image", "text")
    context_generator = "next-token"
    num_candidates = 1
    variable_size = False
    num_guidance_scales = 1
    supports_system = False
    classes: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...]
    begin_ids: dict[str, int]

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text_lengths: dict[str, int] = {}
        self.settings: dict[str, Any] = {}

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        return center_crop_resize(image, size)

    def bidirectional_prefix(self, ids: Sequence[int]) -> int:
        return 0

    def prefix_text_ids(self, document: Document, generator: str) -> list[int]:
        return []

    def mask_to_cells(self, mask: Image.Image, size: int, grid: tuple[int, int]) -> np.ndarray:
        return touched_cells(mask, grid)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


class ImageOnlyTemplate(PretrainedTemplate):
    """Of models that draw and do nothing else: no token stands between a prompt and its picture of so many codes."""

    outputs: tuple[Output, ...] = ("image",)

    def __init__(self, tokenizer: Any, num_codes: int) -> None:
        super().__init__(tokenizer)
        self.num_codes = num_codes
        self.stop_token_ids = ()
        self.begin_ids = {}

    def layout(self, grid: tuple[int, int]) -> Layout:
        return Layout(grid)

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        raise TypeError("a template of a model that draws defines prompt()")

    def encode(self, document: Document, *, uncond: bool = False, generator: str = "next-token") -> Tokens:
        """What is asked for, and the picture of it."""
        *prompt_segments, last = document.segments
        tokens = self.prompt(Document(prompt_segments), output="image", branch=uncond)
        tokens.add_image(last.image, self.num_codes, loss=True)
        return tokens


class ClassTemplate(ImageOnlyTemplate):
    """Of models that draw classes: a prompt is the class's id, guidance's other branch the id after the last of
    them."""

    def __init__(self, count: int, num_codes: int) -> None:
        super().__init__(None, num_codes)
        self.classes = tuple(map(str, range(count)))

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        count = len(self.classes)
        labels = [segment.label for segment in document.segments]
        if len(labels) != 1 or labels[0] is None:
            raise ValueError(f"this model draws classes, not words: give one class from 0 to {count - 1}")
        if str(labels[0]) not in self.classes:
            raise ValueError(f"unknown class {labels[0]!r}: give a number from 0 to {count - 1}")
        tokens = Tokens()
        tokens.add([count if branch else int(labels[0])])
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        return ""
