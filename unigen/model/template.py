"""Templates lay documents out as ids: the protocol, and base classes for the templates of public models.

Each family defines its own strings. Does not depend on: weights, how anything is generated.
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
from unigen.options import DEFAULT_GENERATOR

Output = Literal["image", "text", "interleaved", "joint"]
OUTPUTS: tuple[Output, ...] = ("image", "text", "interleaved", "joint")
"""The outputs that can be requested."""
IMAGE_OUTPUTS: tuple[Output, ...] = ("image", "joint")
"""Outputs that are one picture; in "joint" it comes with a text."""


class UnsupportedError(ValueError):
    """The model does not support the request, whatever the prompt."""


def images_first(segments: Sequence[Segment]) -> list[Segment]:
    """The segments, with the pictures of each user message before its words, and else in their order.

    For families that were trained on questions in this order. A message is all content of the user before the assistant
    does.
    """
    ordered: list[Segment] = []
    for role, message in groupby(segments, key=lambda segment: segment.role):
        ordered += sorted(message, key=lambda segment: role == "user" and segment.image is None)
    return ordered


def split_system_messages(segments: Sequence[Segment]) -> tuple[str, list[Segment]]:
    """The text of all system messages, "" where there are none, and all other segments."""
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
    """Whether English words ask for words: "what is this", "Describe the image.", "a dog, right?".

    A polite phrase counts as the request in it: "can you make it red?" asks for a picture.
    """
    for sentence in re.split(r"(?<=[.!?？؟])\s+|\n", text):
        sentence_body = _POLITE_PREFIX.sub("", sentence.strip())
        is_polite = sentence_body != sentence.strip()
        if _QUESTION_START.match(sentence_body) or (not is_polite and sentence_body.endswith(("?", "？", "؟"))):
            return True
    return False


def default_output(document: Document, outputs: Sequence[Output]) -> Output:
    """The output of an answer where none is requested.

    It is text where the last message asks about a picture of the conversation. Else it is text and pictures as the
    model decides, else what the model can do.

    Args:
        document: the prompt.
        outputs: the outputs of the model.
    """
    last: list[str] = []
    for role, message in groupby(document.segments, key=lambda segment: segment.role):
        last = [segment.text or "" for segment in message] if role == "user" else last
    if "text" in outputs and document.images() and is_question("\n".join(last)):
        return "text"
    return next(output for output in ("interleaved", "text", "image") if output in outputs)


class Template(Protocol):
    """Lays documents out as ids, and reads ids as text; one per family."""

    outputs: tuple[Output, ...]
    """The outputs of the model."""
    context_generator: str
    """The generator whose layout finished pictures have in a document."""
    text_lengths: dict[str, int]
    """Positions of text at the start of a picture's segment, by generator; only where there are some."""
    classes: tuple[str, ...]
    """Names of the classes of a class-conditional model; empty for a text-conditional one."""
    stop_token_ids: tuple[int, ...]
    """Ids that end an answer."""
    variable_size: bool
    """Whether pictures may be of any size."""
    num_guidance_scales: int
    """The number of guidance scales: one less than the branches of guidance."""
    supports_system: bool
    """Whether system messages are followed in text."""
    settings: dict[str, object]
    """Settings of the template, saved in unigen.json."""
    begin_ids: dict[str, int]
    """The begin token of a picture, by generator. Without one, the picture follows the prompt directly."""
    num_candidates: int
    """The number of captions from which the best is chosen, by default."""

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Resize and crop a picture.

        Args:
            image: RGB.
            size: pixels along a side; an upper bound where pictures may be of any size.

        Returns:
            Pixels (H, W, 3), uint8.
        """
        ...

    def layout(self, grid: tuple[int, int]) -> Layout:
        """The layout of a picture of so many rows and columns of codes among ids."""
        ...

    def encode(self, document: Document, *, uncond: bool = False, generator: str = DEFAULT_GENERATOR) -> Tokens:
        """Lay out a whole document for training.

        Args:
            document: ends with the assistant's text or image.
            uncond: lay it out for the unconditional branch of guidance.
            generator: name of the generator of the assistant's last image.
        """
        ...

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out a document up to where the model goes on.

        Args:
            document: the prompt.
            output: the requested output.
            branch: guidance branch; 0 has the whole prompt.

        Raises:
            ValueError: the model does not read such a document.
        """
        ...

    def bidirectional_prefix(self, ids: Sequence[int]) -> int:
        """The number of ids at the start of a prompt that attend to each other (prefix LM); 0 is causal."""
        ...

    def prefix_text_ids(self, document: Document, generator: str) -> list[int]:
        """The ids of the text at the start of a picture's segment of this generator."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        ...

    def mask_to_cells(self, mask: Image.Image, size: int, grid: tuple[int, int]) -> np.ndarray:
        """The codes, bool (h, w), that a mask marks, for pictures of `size` pixels along a side."""
        ...


def touched_cells(mask: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """The codes of which a mask marks any pixel.

    Args:
        mask: square, white (128 and above) where it marks.
        grid: rows and columns of codes.

    Returns:
        Bool (h, w).
    """
    mask_HW = np.asarray(mask) >= 128
    rows, columns = (np.arange(n) * len(mask_HW) // n for n in grid)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask_HW, rows, 0), columns, 1)


class PretrainedTemplate:
    """A base class for templates of public models, with next-token and no text in the segment of a picture."""

    outputs: tuple[Output, ...] = ("image", "text")
    context_generator = DEFAULT_GENERATOR
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
        self.settings: dict[str, object] = {}

    def preprocess(self, image: Image.Image, size: int) -> np.ndarray:
        """Pixels (size, size, 3), uint8, of the centre of a picture."""
        return center_crop_resize(image, size)

    def bidirectional_prefix(self, ids: Sequence[int]) -> int:
        """0: attention is causal."""
        return 0

    def prefix_text_ids(self, document: Document, generator: str) -> list[int]:
        """No ids: pictures have no text in their segments."""
        return []

    def mask_to_cells(self, mask: Image.Image, size: int, grid: tuple[int, int]) -> np.ndarray:
        """The codes, bool (h, w), of which the mask marks any pixel."""
        return touched_cells(mask, grid)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


class ImageOnlyTemplate(PretrainedTemplate):
    """A base class for models that generate images only. The codes of an image directly follow the prompt."""

    outputs: tuple[Output, ...] = ("image",)

    def __init__(self, tokenizer: Any, num_codes: int) -> None:
        super().__init__(tokenizer)
        self.num_codes = num_codes
        self.stop_token_ids = ()
        self.begin_ids = {}

    def layout(self, grid: tuple[int, int]) -> Layout:
        """Codes in raster order, and nothing else."""
        return Layout(grid)

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out a prompt; see `Template.prompt`. Families define it."""
        raise TypeError("a template of a model that generates images defines prompt()")

    def encode(self, document: Document, *, uncond: bool = False, generator: str = DEFAULT_GENERATOR) -> Tokens:
        """Lay out a prompt and its picture for training; see `Template.encode`. The loss is on the picture."""
        *prompt_segments, last = document.segments
        tokens = self.prompt(Document(prompt_segments), output="image", branch=uncond)
        tokens.add_image(last.image, self.num_codes, loss=True)
        return tokens


class ClassTemplate(ImageOnlyTemplate):
    """The template of class-conditional models: a prompt is the id of its class. The unconditional id follows those of
    the classes.
    """

    def __init__(self, count: int, num_codes: int) -> None:
        """
        Args:
            count: classes.
            num_codes: codes of a picture.
        """
        super().__init__(None, num_codes)
        self.classes = tuple(map(str, range(count)))

    def prompt(self, document: Document, *, output: Output, branch: int = 0) -> Tokens:
        """Lay out one class; see `Template.prompt`.

        Raises:
            ValueError: the document is other than one class, or there is no such class.
        """
        count = len(self.classes)
        labels = [segment.label for segment in document.segments]
        if len(labels) != 1 or labels[0] is None:
            raise ValueError(
                f"this model generates images by class, not from text: give one class from 0 to {count - 1}"
            )
        if str(labels[0]) not in self.classes:
            raise ValueError(f"unknown class {labels[0]!r}: give a number from 0 to {count - 1}")
        tokens = Tokens()
        tokens.add([count if branch else int(labels[0])])
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """No text."""
        return ""
