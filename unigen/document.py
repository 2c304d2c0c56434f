"""The sequence format: what a user writes, and the packed rows of ids that a model reads.

A `Document` is a list of `Segment`s, each a run of text, one image or a class, spoken by a role. A `Vocabulary` says
which row of the embedding table a text piece or an image code has; nothing else knows offsets. `pack` lays several
documents, already turned into `Tokens` by a family's template, into rows of one length.

Does not depend on: tokenizers, templates, models, losses.

Shapes: B rows, L positions of a row, N images, h x w codes of an image.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigen.media.display import png_bytes, turns_html
from unigen.media.images import ImageSource, is_image, is_image_path, missing_file_message, read_image
from unigen.utils.text import shorten

SegmentImage = Image.Image | np.ndarray | str | Path | Tensor
"""An image as a segment holds it: pixels, the path of a file, or codes."""
Role = Literal["user", "assistant", "system"]
ROLES: tuple[Role, ...] = ("user", "assistant", "system")
"""system: text that says how to answer, for models that follow it (`Template.system`)."""


def check_text(name: str, text: Any) -> str:
    """The text. Raises ValueError for what is none, and for one that UTF-8 cannot hold: half of a character, as a cut
    in JSON's \\u notation leaves it, or bytes of another encoding on a command line."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text (str), not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise ValueError(f"{name} is not valid Unicode ({half} is half a character): write it as UTF-8") from error
    return text


@dataclass(frozen=True, eq=False)
class Preview:
    """An image of an answer before it is finished, as it looks now."""

    image: Image.Image
    picture: int
    """Index of the image in the answer, from 0."""
    number: int
    """Index of the preview among those of the image, from 0."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self.image)


@dataclass(eq=False)
class Segment:
    """One part of a document: a text, an image or a class label, and exactly one of them.

    Raises:
        ValueError: for none or several of them, a value of another type, or an unknown role.
    """

    text: str | None = None
    image: SegmentImage | None = None
    """A path, a PIL image, an array or tensor of pixels, or codes: int64 (h, w), or (P,) of a generator with an image
    tokenizer of its own."""
    role: Role = "user"
    label: int | str | None = None
    """Number or name of a class, for models that draw classes."""

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.text, self.image, self.label)) != 1:
            raise ValueError("a segment holds text, an image or a label, and exactly one of them")
        if self.text is not None:
            check_text("text", self.text)
        if self.image is not None and not (isinstance(self.image, str) or is_image(self.image)):
            raise ValueError(f"an image is a path, a PIL image, an array or a tensor, not {type(self.image).__name__}")
        if self.label is not None and (isinstance(self.label, bool) or not isinstance(self.label, (Integral, str))):
            raise ValueError(f"a label is the number or the name of a class, not {type(self.label).__name__}")
        if not isinstance(self.role, str) or self.role not in ROLES:
            raise ValueError(f"unknown role {shorten(self.role)}: one of {', '.join(ROLES)}")
        if self.role == "system" and self.text is None:
            raise ValueError("a system message holds text alone")
        if isinstance(self.image, Tensor) and (self.image.ndim > 2 or self.image.dtype == torch.uint8):
            self.image = read_image(self.image)

    def to_json(self) -> dict[str, object]:
        """The segment as plain values for `json.dump`: an image as its path, its codes, or a PNG in base64."""
        if self.text is not None:
            return {"role": self.role, "text": self.text}
        if self.label is not None:
            return {"role": self.role, "label": self.label}
        if isinstance(self.image, Tensor):
            return {"role": self.role, "image": {"codes": self.image.tolist()}}
        if isinstance(self.image, (str, Path)):
            return {"role": self.role, "image": {"path": str(self.image)}}
        buffer = io.BytesIO()
        assert self.image is not None
        read_image(self.image).save(buffer, format="PNG")
        return {"role": self.role, "image": {"png": base64.b64encode(buffer.getvalue()).decode()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Segment:
        """The segment that `to_json` wrote.

        Raises:
            ValueError: the data has another form, or an image in it cannot be read.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a segment in JSON is an object with a text, an image or a label, not {shorten(data)}")
        image = data.get("image")
        if image is None:
            return cls(text=data.get("text"), role=data.get("role", "user"), label=data.get("label"))
        match image:
            case {"codes": codes}:
                value: SegmentImage = _codes_from_json(codes)
            case {"path": str(path)}:
                value = path
            case {"png": str(png)}:
                try:
                    value = read_image(base64.b64decode(png))
                except binascii.Error as error:
                    raise ValueError(f"the png of an image in JSON is not base64: {error}") from error
            case _:
                raise ValueError("an image in JSON is one of {'path': ...}, {'png': base64} or {'codes': [[...]]}")
        return cls(image=value, role=data.get("role", "user"))


@dataclass(eq=False)
class Document:
    """Text and images in order, each with a role of a chat. In training, the segments of the assistant are learnt.

    Raises:
        ValueError: `segments` is no list of `Segment`.
    """

    segments: list[Segment] = field(default_factory=list)
    size: tuple[int, int] | None = None
    """Width and height in pixels of the images to be drawn, for models that draw several sizes."""

    def __post_init__(self) -> None:
        if not isinstance(self.segments, list) or not all(isinstance(one, Segment) for one in self.segments):
            what = shorten(self.segments)
            raise ValueError(
                f"a document is a list of Segment, not {what}: Document.of makes one of words and pictures"
            )

    @classmethod
    def of(cls, prompt: Prompt) -> Document:
        """A document from what users pass: a string, an image, a list of both, the number of a class, or a document
        (which is copied).

        Images are all that `unigen.media.images.read_image` takes. A string that ends like the name of a picture file
        (`unigen.media.images.is_image_path`) is that picture; all other strings are words, and `Segment(text=...)`
        always is. Integer tensors of at most two dimensions, but uint8, are codes.

        Raises:
            ValueError: for a prompt of another type, an empty one, a picture file that does not exist, and what is
                given in Python as a picture and cannot be read as one.
        """
        if isinstance(prompt, Document):
            return cls(list(prompt.segments), prompt.size)
        parts: object = prompt
        if isinstance(prompt, (str, Segment)) or is_class_index(prompt) or is_image(prompt):
            parts = [prompt]
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"a prompt is text, an image or a list of both, not {type(prompt).__name__}")
        document = cls([part if isinstance(part, Segment) else _to_segment(part) for part in parts])
        document.check_not_empty()
        return document

    def check_not_empty(self) -> None:
        """Raises ValueError where there is nothing but blanks."""
        if not any(s.image is not None or s.label is not None or (s.text or "").strip() for s in self.segments):
            raise ValueError("the prompt is empty: say what to draw or ask")

    def characters(self) -> int:
        """How many characters its texts have, blanks in a row as one."""
        return sum(len(" ".join(segment.text.split())) for segment in self.segments if segment.text)

    def images(self) -> list[SegmentImage]:
        """The images of the segments, in order, as they were given."""
        return [s.image for s in self.segments if s.image is not None]

    def to_json(self) -> dict[str, object]:
        """The document as plain values for `json.dump`; `from_json` reads it again."""
        data: dict[str, object] = {"segments": [segment.to_json() for segment in self.segments]}
        return data if self.size is None else data | {"size": list(self.size)}

    def _repr_html_(self) -> str:
        return turns_html((segment.role, _display_value(segment)) for segment in self.segments)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Document:
        """The document that `to_json` wrote.

        Raises:
            ValueError: the data has another form, or an image in it cannot be read.
        """
        if not isinstance(data, dict) or not isinstance(data.get("segments"), list):
            raise ValueError(f"a document in JSON is an object with a list of segments, not {shorten(data)}")
        size = data.get("size")
        if size is not None and not (isinstance(size, (list, tuple)) and len(size) == 2):
            raise ValueError(f"the size of a document is a width and a height, not {shorten(size)}")
        return cls(
            [Segment.from_json(segment) for segment in data["segments"]], None if size is None else (size[0], size[1])
        )


Prompt: TypeAlias = "str | int | Segment | Document | ImageSource | Sequence[str | int | Segment | ImageSource]"
"""What `Document.of` makes a document from."""


def _display_value(segment: Segment) -> Image.Image | str:
    """A segment as a notebook shows it: a picture, or text."""
    if segment.image is None:
        return segment.text if segment.text is not None else f"class {segment.label}"
    if isinstance(segment.image, Tensor):
        return f"image given as {'x'.join(map(str, segment.image.shape))} codes"
    try:
        return read_image(segment.image)
    except ValueError as error:
        return str(error)


def _to_segment(part: object) -> Segment:
    """A part of a prompt that is no segment yet."""
    if isinstance(part, str):
        if not is_image_path(part):
            return Segment(text=part)
        if not os.path.exists(part):
            raise ValueError(
                f"{missing_file_message(part)} (if these are words, end them otherwise or give Segment(text=...))"
            )
        return Segment(image=Path(part))
    if is_class_index(part):
        return Segment(label=int(part))
    if isinstance(part, (Path, Image.Image, np.ndarray)) or is_codes(part):
        return Segment(image=part)
    if is_image(part):
        return Segment(image=read_image(part))
    raise ValueError(f"a prompt is text, an image or a list of both, not {type(part).__name__}")


def is_class_index(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _codes_from_json(rows: object) -> Tensor:
    """Codes that stand in JSON."""
    try:
        codes: np.ndarray = np.asarray(rows)
    except ValueError:  # rows of different lengths
        codes = np.zeros(0)
    if codes.dtype.kind not in "iu" or codes.ndim not in (1, 2) or not codes.size:
        raise ValueError(f"codes in JSON are rows of whole numbers, all of one length, not {shorten(rows)}")
    return torch.from_numpy(codes.astype(np.int64))


PromptT = TypeVar("PromptT")


def as_text(prompt: str | PromptT) -> Segment | PromptT:
    """A string as words, whatever it ends in; anything else as it is."""
    return Segment(text=prompt) if isinstance(prompt, str) else prompt


def is_codes(image: object) -> TypeGuard[Tensor]:
    """Whether an image is given as its codes (h, w) or (P,), integers of any type but uint8, and not as pixels."""
    kinds = (torch.int64, torch.int32, torch.int16)
    return isinstance(image, Tensor) and image.ndim in (1, 2) and image.dtype in kinds
