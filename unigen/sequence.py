"""The sequence format: what a user writes, and the packed rows of ids that a model reads.

A `Document` is a list of `Segment`s, each a run of text, one image or a class, spoken by a role. A `Vocabulary` says
which row of the embedding table a text piece or an image code has; nothing else knows offsets. `pack` lays several
documents, already turned into `Tokens` by a family's template, into rows of one length.

This file refuses to know: tokenizers, templates, models, losses.

Shapes: B rows, L positions of a row, N images, h x w codes of an image.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigen.display import png_bytes, turns_html
from unigen.images import is_image, is_image_path, missing, read_image
from unigen.limits import shorten

Role = Literal["user", "assistant", "system"]
ROLES: tuple[Role, ...] = ("user", "assistant", "system")
"""system: text that says how to answer, for models that follow it (`Template.system`)."""
LONGEST = 50
"""How many times as long as wide a picture may be that a model reads."""


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


def square(image: Image.Image, size: int) -> np.ndarray:
    """The picture's centre square, resized: uint8 (size, size, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image)


Framing = Callable[[Image.Image, int], np.ndarray]
"""How a picture is brought to a square of so many pixels, uint8 (size, size, 3): `square`, or a family's own way."""


def to_pixels(images: Sequence[Any], size: int, frame: Framing = square) -> Tensor:
    """Pictures as float32 (N, 3, size, size) in [-1, 1].

    Args:
        images: all that `read_image` takes; uint8 arrays (size, size, 3) are taken as they are, without a frame.
    Raises:
        ValueError: for what cannot be read, and for a picture that is far too long: a frame may resize the whole of it
            before it cuts.
    """
    arrays = []
    for image in images:
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (size, size, 3)):
            picture = read_image(image)
            width, height = picture.size
            if max(width, height) > LONGEST * min(width, height):
                raise ValueError(f"image of {width}x{height} pixels is too long: at most {LONGEST} to 1, so cut it")
            image = frame(picture, size)
        arrays.append(image)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


class NotFinite(ValueError):
    """A model's numbers are infinite or nan."""

    def __init__(self, what: str, dtype: torch.dtype) -> None:
        held = str(dtype).removeprefix("torch.")
        others = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(held)
        advice = f"load it with dtype {others}" if others else "its checkpoint may be damaged"
        super().__init__(f"{what} of this model are not finite in {held}: {advice}")


def to_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """Pictures from float pixels in [-1, 1]. Raises NotFinite where one of them is no number."""
    if not bool(pixels_BCHW.isfinite().all()):
        raise NotFinite("pixels", pixels_BCHW.dtype)
    array = ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


@dataclass(frozen=True, eq=False)
class Preview:
    """An image of an answer before it is finished, as it looks now. picture: which of the answer's images; number: of
    its previews. Both begin at 0."""

    image: Image.Image
    picture: int
    number: int

    def _repr_png_(self) -> bytes:
        return png_bytes(self.image)


@dataclass(eq=False)
class Segment:
    """A run of text; or one image: a path, a PIL image, an array or tensor of pixels, or codes int64 (h, w), of a
    generator with a tokenizer of its own (P,); or, for models that draw classes, a class by its number or name."""

    text: str | None = None
    image: Image.Image | np.ndarray | str | Path | Tensor | None = None
    role: Role = "user"
    label: int | str | None = None

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

    def to_json(self) -> dict[str, Any]:
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
    def from_json(cls, data: dict[str, Any]) -> Segment:
        if not isinstance(data, dict):
            raise ValueError(f"a segment in JSON is an object with a text, an image or a label, not {shorten(data)}")
        image = data.get("image")
        if image is None:
            return cls(text=data.get("text"), role=data.get("role", "user"), label=data.get("label"))
        match image:
            case {"codes": codes}:
                value: Any = _codes(codes)
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
    """Interleaved text and images with chat roles. In training, what the assistant says is learnt. size: width and
    height in pixels of the pictures that it asks for, of models that draw any."""

    segments: list[Segment] = field(default_factory=list)
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.segments, list) or not all(isinstance(one, Segment) for one in self.segments):
            what = shorten(self.segments)
            raise ValueError(
                f"a document is a list of Segment, not {what}: Document.of makes one of words and pictures"
            )

    @classmethod
    def of(cls, prompt: Any) -> Document:
        """A document from what users pass: a string, an image, a list of both, the number of a class, or a document
        (which is copied).

        Images are all that `unigen.images.read_image` takes. A string that ends like the name of a picture file
        (`unigen.images.is_image_path`) is that picture; all other strings are words, and `Segment(text=...)` always is.
        Integer tensors of at most two dimensions, but uint8, are codes.

        Raises:
            ValueError: for a prompt of another type, an empty one, a picture file that does not exist, and what is
                given in Python as a picture and cannot be read as one.
        """
        if isinstance(prompt, Document):
            return cls(list(prompt.segments), prompt.size)
        if isinstance(prompt, (str, Segment)) or is_number(prompt) or is_image(prompt):
            prompt = [prompt]
        if not isinstance(prompt, (list, tuple)):
            raise ValueError(f"a prompt is text, an image or a list of both, not {type(prompt).__name__}")
        document = cls([part if isinstance(part, Segment) else _segment(part) for part in prompt])
        document.check_filled()
        return document

    def check_filled(self) -> None:
        """Raises ValueError where there is nothing but blanks."""
        if not any(s.image is not None or s.label is not None or (s.text or "").strip() for s in self.segments):
            raise ValueError("the prompt is empty: say what to draw or ask")

    def characters(self) -> int:
        """How many characters its texts have, blanks in a row as one."""
        return sum(len(" ".join(segment.text.split())) for segment in self.segments if segment.text)

    def images(self) -> list[Any]:
        return [s.image for s in self.segments if s.image is not None]

    def to_json(self) -> dict[str, Any]:
        size = {} if self.size is None else {"size": list(self.size)}
        return {"segments": [segment.to_json() for segment in self.segments]} | size

    def _repr_html_(self) -> str:
        return turns_html((segment.role, _displayed(segment)) for segment in self.segments)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Document:
        if not isinstance(data, dict) or not isinstance(data.get("segments"), list):
            raise ValueError(f"a document in JSON is an object with a list of segments, not {shorten(data)}")
        size = data.get("size")
        if size is not None and not (isinstance(size, (list, tuple)) and len(size) == 2):
            raise ValueError(f"the size of a document is a width and a height, not {shorten(size)}")
        return cls(
            [Segment.from_json(segment) for segment in data["segments"]], None if size is None else (size[0], size[1])
        )


def _displayed(segment: Segment) -> Any:
    """A segment as a notebook shows it: a picture, or text."""
    if segment.image is None:
        return f"class {segment.label}" if segment.text is None else segment.text
    if isinstance(segment.image, Tensor):
        return f"image given as {'x'.join(map(str, segment.image.shape))} codes"
    try:
        return read_image(segment.image)
    except ValueError as error:
        return str(error)


def _segment(part: Any) -> Segment:
    """A part of a prompt that is no segment yet."""
    if isinstance(part, str):
        if not is_image_path(part):
            return Segment(text=part)
        if not os.path.exists(part):
            raise ValueError(f"{missing(part)} (if these are words, end them otherwise or give Segment(text=...))")
        return Segment(image=Path(part))
    if is_number(part):
        return Segment(label=int(part))
    if isinstance(part, (Path, Image.Image, np.ndarray)) or is_codes(part):
        return Segment(image=part)
    if is_image(part):
        return Segment(image=read_image(part))
    raise ValueError(f"a prompt is text, an image or a list of both, not {type(part).__name__}")


def is_number(value: Any) -> bool:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _codes(rows: Any) -> Tensor:
    """Codes that stand in JSON."""
    try:
        codes = np.asarray(rows)
    except ValueError:  # rows of different lengths
        codes = np.zeros(0)
    if codes.dtype.kind not in "iu" or codes.ndim not in (1, 2) or not codes.size:
        raise ValueError(f"codes in JSON are rows of whole numbers, all of one length, not {shorten(rows)}")
    return torch.from_numpy(codes.astype(np.int64))


def as_words(prompt: Any) -> Any:
    """A string as words, whatever it ends in; anything else as it is."""
    return Segment(text=prompt) if isinstance(prompt, str) else prompt


def is_codes(image: Any) -> bool:
    """Whether an image is given as its codes (h, w) or (P,), integers of any type but uint8, and not as pixels."""
    kinds = (torch.int64, torch.int32, torch.int16)
    return isinstance(image, Tensor) and image.ndim in (1, 2) and image.dtype in kinds


@dataclass(frozen=True)
class Vocabulary:
    """Which id an image code has: text_size pieces of text and specials, among them or after them the image codes, in a
    row but in any order.

    after the text, in order: id(code) = text_size + code        (Liquid, arXiv 2412.04332, section 3)
    else `first` is the first of them, and `order` names their codes    (Chameleon)
    own_head: are codes scored by a head of their own, never beside text?
    """

    text_size: int
    image_size: int
    start: int | None = None
    order: tuple[int, ...] | None = None
    own_head: bool = False

    @property
    def size(self) -> int:
        return max(self.text_size, self.stop)

    @property
    def first(self) -> int:
        """The first id of an image code."""
        return self.text_size if self.start is None else self.start

    @property
    def stop(self) -> int:
        """The id after the last image code."""
        return self.first + self.image_size

    def image_ids(self, codes: Tensor) -> Tensor:
        if self.order is not None:
            codes = torch.tensor(self.order, device=codes.device).argsort()[codes]
        return codes + self.first

    def codes(self, ids: Tensor) -> Tensor:
        codes = ids - self.first
        return codes if self.order is None else torch.tensor(self.order, device=ids.device)[codes]

    def is_image(self, ids: Tensor) -> Tensor:
        return (ids >= self.first) & (ids < self.stop)


@dataclass(frozen=True)
class Layout:
    """How a picture of h x w codes stands among ids: a begin token, `opening`, its rows, each with `row_end` after it,
    then `closing`."""

    grid: tuple[int, int]
    opening: tuple[int, ...] = ()
    row_end: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """How many ids the rows are."""
        return self.grid[0] * (self.grid[1] + len(self.row_end))

    def lay(self, ids_hw: Tensor) -> list[int]:
        """The ids of the rows."""
        return [id for row in ids_hw.tolist() for id in (*row, *self.row_end)]

    def __len__(self) -> int:
        """Of all ids, the begin token among them."""
        return 1 + len(self.opening) + self.rows + len(self.closing)


@dataclass
class Tokens:
    """One document as ids. `loss[i]`: id i is a target. `images[k]` fills the ids of `spans[k] = (start, stop)`, laid
    out as the generator `writers[k]` writes it."""

    ids: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)

    def add(self, ids: Sequence[int], loss: bool = False) -> None:
        self.ids.extend(ids)
        self.loss.extend([loss] * len(ids))

    def add_image(self, image: Any, length: int, loss: bool = False, writer: str = "next-token") -> None:
        self.spans.append((len(self.ids), len(self.ids) + length))
        self.images.append(image)
        self.writers.append(writer)
        self.add([0] * length, loss)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Batch:
    """Packed rows. Segment id 0 is padding; positions restart with each document; the first id of none is a target.

    ids_BL int64; positions_BL int64; segments_BL int64; loss_BL bool (id i is predicted from position i-1);
    spans_N3 int64: row, start and stop of image n; images: the N pictures, as pixels or codes, in the same order;
    writers: the N generators that they are laid out for.
    """

    ids_BL: Tensor
    positions_BL: Tensor
    segments_BL: Tensor
    loss_BL: Tensor
    spans_N3: Tensor
    images: Tensor | None = None
    writers: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids_BL)

    def written_by(self, name: str) -> Tensor:
        """Numbers (M,) of the images laid out for this generator."""
        return torch.tensor([n for n, writer in enumerate(self.writers) if writer == name], dtype=torch.int64)

    def places(self, images_M: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (M, 1) and positions (M, P) of images whose spans have one length."""
        spans_M3 = self.spans_N3[images_M.to(self.spans_N3.device)]
        length = int(spans_M3[0, 2] - spans_M3[0, 1]) if len(spans_M3) else 0
        return spans_M3[:, :1], spans_M3[:, 1:2] + torch.arange(length, device=spans_M3.device)

    def inside(self, name: str | None = None) -> Tensor:
        """Which positions (B, L) lie in images: in all of them, or in those of one generator."""
        inside_BL = torch.zeros_like(self.loss_BL)
        for (row, start, stop), writer in zip(self.spans_N3.tolist(), self.writers, strict=True):
            if name in (None, writer):
                inside_BL[row, start:stop] = True
        return inside_BL

    def to(self, device: torch.device | str) -> Batch:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return Batch(**moved)

    def pin_memory(self) -> Batch:
        return Batch(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})


def pack(rows: Sequence[Sequence[Tokens]], length: int, image_size: int) -> Batch:
    """Lay documents end to end, each list of them in a row of `length` positions.

    image_size: side in pixels to which pictures are brought; images given as codes or latents, tensors of one shape,
    stay so. All images of a batch are of one kind. Raises ValueError where a row's documents do not fit.
    """
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    positions, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    loss = torch.zeros(len(rows), length, dtype=torch.bool)
    spans: list[tuple[int, int, int]] = []
    images: list[Any] = []
    writers: list[str] = []
    for b, documents in enumerate(rows):
        at = 0
        for number, tokens in enumerate(documents, start=1):
            stop = at + len(tokens)
            if stop > length:
                raise ValueError(f"documents of {stop} ids do not fit a row of {length}: raise `length` or drop one")
            ids[b, at:stop] = torch.tensor(tokens.ids, dtype=torch.int64)
            loss[b, at + 1 : stop] = torch.tensor(tokens.loss[1:], dtype=torch.bool)
            positions[b, at:stop] = torch.arange(len(tokens))
            segments[b, at:stop] = number
            spans += [(b, at + first, at + last) for first, last in tokens.spans]
            images += tokens.images
            writers += tokens.writers
            at = stop
    spans_N3 = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
    stacked = stack_images(images, image_size) if images else None
    return Batch(ids, positions, segments, loss, spans_N3, stacked, tuple(writers))


def stack_images(images: Sequence[Any], size: int, frame: Framing = square) -> Tensor:
    """What is given as tensors, codes or latents, stacked (N, ...); else pixels (N, 3, size, size) in [-1, 1]."""
    if all(isinstance(image, Tensor) for image in images):
        return torch.stack(list(images))
    if any(isinstance(image, Tensor) for image in images):
        raise ValueError("a batch mixes images given as codes with images given as pixels: encode all or none")
    return to_pixels(images, size, frame)
