"""Documents: prompts, chats and answers of text and images. A `Document` is a list of `Segment`s, each a text, an image
or a class, with a role. `unigen.batch` lays documents out as ids.

Does not depend on: tokenizers, templates, models, losses.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigen.media.display import png_bytes, turns_html
from unigen.media.images import ImageSource, is_image, is_image_path, missing_file_message, read_image
from unigen.utils.text import check_text, shorten

SegmentImage = Image.Image | np.ndarray | str | Path | Tensor
"""An image as a segment holds it: pixels, the path of a file, or codes."""
Role = Literal["user", "assistant", "system"]
ROLES: tuple[Role, ...] = ("user", "assistant", "system")
"""system: text that says how to answer, for models that follow it (`Template.system`)."""


@dataclass(frozen=True, eq=False)
class Preview:
    """An image of an answer before it is finished, as it looks now."""

    image: Image.Image
    image_index: int
    """Index of the image in the answer, from 0."""
    preview_index: int
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
    """Number or name of a class, for class-conditional models."""

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
        assert self.image is not None
        return {"role": self.role, "image": _image_to_json(self.image)}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Segment:
        """The segment that `to_json` wrote.

        Raises:
            ValueError: the data has another form, or an image in it cannot be read.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a segment in JSON is an object with a text, an image or a label, not {shorten(data)}")
        fields: dict[str, Any] = dict(data)
        image, role = fields.get("image"), fields.get("role", "user")
        if image is None:
            return cls(text=fields.get("text"), role=role, label=fields.get("label"))
        return cls(image=_image_from_json(image), role=data.get("role", "user"))


ConditionKind = Literal["mask", "boxes", "depth", "reference"]
CONDITION_KINDS: tuple[ConditionKind, ...] = ("mask", "boxes", "depth", "reference")
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of width and height in [0, 1]."""


@dataclass(eq=False)
class Condition:
    """What a picture has to follow beside the words: a mask, boxes, a depth map or a reference picture. A generator
    says which kinds it takes (`Generator.conditions`).

    Raises:
        ValueError: for an unknown kind, or a value of another type.
    """

    kind: ConditionKind
    value: SegmentImage | list[Box]
    """Boxes for "boxes", else a picture: all that `unigen.media.images.read_image` takes."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in CONDITION_KINDS:
            raise ValueError(f"unknown condition {shorten(self.kind)}: one of {', '.join(CONDITION_KINDS)}")
        if self.kind == "boxes":
            self.value = _to_boxes(self.value)
        elif not (isinstance(self.value, str) or is_image(self.value)):
            raise ValueError(f"the condition {self.kind} is a picture, not {type(self.value).__name__}")

    def to_json(self) -> dict[str, object]:
        """The condition as plain values for `json.dump`."""
        if isinstance(self.value, list):
            return {"kind": self.kind, "boxes": [list(box) for box in self.value]}
        return {"kind": self.kind, "image": _image_to_json(self.value)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Condition:
        """The condition that `to_json` wrote.

        Raises:
            ValueError: the data has another form, or an image in it cannot be read.
        """
        if not isinstance(data, dict) or ("boxes" in data) == ("image" in data):
            raise ValueError(f"a condition in JSON is an object with a kind and boxes or an image, not {shorten(data)}")
        value = data["boxes"] if "boxes" in data else _image_from_json(data["image"])
        return cls(data.get("kind", ""), value)


@dataclass(eq=False)
class Document:
    """Text and images in order, each with a role of a chat. In training, the loss is on the segments of the assistant.

    Raises:
        ValueError: `segments` is no list of `Segment`.
    """

    segments: list[Segment] = field(default_factory=list)
    size: tuple[int, int] | None = None
    """Width and height in pixels of the generated images, for models of several sizes."""
    conditions: dict[str, Condition] = field(default_factory=dict)
    """By a name of the user's, what the images to be drawn have to follow."""

    def __post_init__(self) -> None:
        if not isinstance(self.conditions, dict) or not all(isinstance(c, Condition) for c in self.conditions.values()):
            raise ValueError(f"conditions of a document are a dict of Condition, not {shorten(self.conditions)}")
        if not isinstance(self.segments, list) or not all(isinstance(one, Segment) for one in self.segments):
            description = shorten(self.segments)
            raise ValueError(
                f"a document is a list of Segment, not {description}: Document.of makes one of words and pictures"
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
            return cls(list(prompt.segments), prompt.size, dict(prompt.conditions))
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

    def check_conditions(self, name: str, supported: Collection[str] = ()) -> None:
        """Refuse conditions that are not supported.

        Args:
            name: of what draws or answers, for the error.
            supported: the kinds of conditions that it takes.

        Raises:
            ValueError: the document has a condition of another kind.
        """
        if unsupported := {c.kind: None for c in self.conditions.values() if c.kind not in supported}:
            takes = f"it takes {', '.join(sorted(supported))}" if supported else "it takes none"
            raise ValueError(f"{name} takes no condition {', '.join(unsupported)}: leave that out, {takes}")

    def num_characters(self) -> int:
        """How many characters its texts have, blanks in a row as one."""
        return sum(len(" ".join(segment.text.split())) for segment in self.segments if segment.text)

    def images(self) -> list[SegmentImage]:
        """The images of the segments, in order, as they were given."""
        return [s.image for s in self.segments if s.image is not None]

    def to_json(self) -> dict[str, object]:
        """The document as plain values for `json.dump`; `from_json` reads it again."""
        data: dict[str, object] = {"segments": [segment.to_json() for segment in self.segments]}
        if self.size is not None:
            data["size"] = list(self.size)
        if self.conditions:
            data["conditions"] = {name: condition.to_json() for name, condition in self.conditions.items()}
        return data

    def _repr_html_(self) -> str:
        return turns_html((segment.role, _display_value(segment)) for segment in self.segments)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Document:
        """The document that `to_json` wrote.

        Raises:
            ValueError: the data has another form, or an image in it cannot be read.
        """
        segments = data.get("segments") if isinstance(data, dict) else None
        if not isinstance(segments, list):
            raise ValueError(f"a document in JSON is an object with a list of segments, not {shorten(data)}")
        size = data.get("size")
        if size is not None and not (isinstance(size, (list, tuple)) and len(size) == 2):
            raise ValueError(f"the size of a document is a width and a height, not {shorten(size)}")
        conditions = data.get("conditions", {})
        if not isinstance(conditions, dict):
            raise ValueError(f"conditions of a document in JSON are an object by name, not {shorten(conditions)}")
        return cls(
            [Segment.from_json(segment) for segment in segments],
            None if size is None else (size[0], size[1]),
            {name: Condition.from_json(condition) for name, condition in conditions.items()},
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


def _to_boxes(boxes: object) -> list[Box]:
    """Boxes as tuples. Raises ValueError for what are none."""
    if not isinstance(boxes, (list, tuple)):
        raise ValueError(f"boxes are a list of (left, top, right, bottom), not {shorten(boxes)}")
    result: list[Box] = []
    for box in boxes:
        is_box = isinstance(box, (list, tuple)) and len(box) == 4
        if not is_box or not all(isinstance(side, Real) and not isinstance(side, bool) for side in box):
            raise ValueError(f"a box is four numbers, left, top, right and bottom, not {shorten(box)}")
        left, top, right, bottom = map(float, box)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"a box is given in shares of width and height, left < right and top < bottom, not {box}")
        result.append((left, top, right, bottom))
    return result


def _image_to_json(image: SegmentImage) -> dict[str, object]:
    """An image as its path, its codes, or a PNG in base64."""
    if isinstance(image, Tensor) and image.ndim <= 2 and image.dtype != torch.uint8:
        return {"codes": image.tolist()}
    if isinstance(image, (str, Path)):
        return {"path": str(image)}
    buffer = io.BytesIO()
    read_image(image).save(buffer, format="PNG")
    return {"png": base64.b64encode(buffer.getvalue()).decode()}


def _image_from_json(image: object) -> SegmentImage:
    match image:
        case {"codes": codes}:
            return _codes_from_json(codes)
        case {"path": str(path)}:
            return path
        case {"png": str(png)}:
            try:
                return read_image(base64.b64decode(png))
            except binascii.Error as error:
                raise ValueError(f"the png of an image in JSON is not base64: {error}") from error
        case _:
            raise ValueError("an image in JSON is one of {'path': ...}, {'png': base64} or {'codes': [[...]]}")


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
