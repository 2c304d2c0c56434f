"""Token sequences for training: the vocabulary, the layout of a document as tokens, and packed batches.

Shapes: B rows, L positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unigen.media.pixels import stack_images
from unigen.options import DEFAULT_GENERATOR


@dataclass(frozen=True)
class Vocabulary:
    """Which id a piece of text or an image code has. Ids of image codes are one range, after or among the text's.

    id(code) = text_size + code        (Liquid, arXiv 2412.04332, section 3)
    """

    text_size: int
    """Ids of pieces of text and special tokens."""
    image_size: int
    """Image codes."""
    image_offset: int | None = None
    """The first id of an image code; None: after the text."""
    code_order: tuple[int, ...] | None = None
    """The code of each id of the range, where it is not in order (Chameleon)."""
    separate_head: bool = False
    """Are codes scored by a head of their own, never beside text?"""

    @property
    def size(self) -> int:
        """Rows of the embedding table: text, image codes, and what lies between."""
        return max(self.text_size, self.image_stop)

    @property
    def image_start(self) -> int:
        """The first id of an image code."""
        return self.text_size if self.image_offset is None else self.image_offset

    @property
    def image_stop(self) -> int:
        """The id after the last image code."""
        return self.image_start + self.image_size

    def image_ids(self, codes: Tensor) -> Tensor:
        """Ids of codes, of the same shape."""
        if self.code_order is not None:
            codes = torch.tensor(self.code_order, device=codes.device).argsort()[codes]
        return codes + self.image_start

    def image_codes(self, ids: Tensor) -> Tensor:
        """Codes of ids of images, of the same shape: the inverse of `image_ids`."""
        codes = ids - self.image_start
        return codes if self.code_order is None else torch.tensor(self.code_order, device=ids.device)[codes]

    def is_image(self, ids: Tensor) -> Tensor:
        """Which ids are image codes: a bool tensor of the same shape."""
        return (ids >= self.image_start) & (ids < self.image_stop)


@dataclass(frozen=True)
class Layout:
    """How a picture of h x w codes stands among ids: begin token, prefix, rows of codes, suffix."""

    grid: tuple[int, int]
    """Rows and columns of codes."""
    prefix: tuple[int, ...] = ()
    """Ids between the begin token and the first row."""
    row_end_ids: tuple[int, ...] = ()
    """Ids after each row."""
    suffix: tuple[int, ...] = ()
    """Ids after the last row."""

    @property
    def num_ids(self) -> int:
        """How many ids the rows are."""
        return self.grid[0] * (self.grid[1] + len(self.row_end_ids))

    def to_ids(self, ids_hw: Tensor) -> list[int]:
        """The ids of the rows."""
        return [id for row in ids_hw.tolist() for id in (*row, *self.row_end_ids)]

    def __len__(self) -> int:
        """Of all ids, the begin token among them."""
        return 1 + len(self.prefix) + self.num_ids + len(self.suffix)


@dataclass
class Tokens:
    """One document as ids, with places for its images."""

    ids: list[int] = field(default_factory=list)
    """0 in the places of images."""
    loss: list[bool] = field(default_factory=list)
    """Is the id a target of training?"""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Start and stop of each image's place."""
    images: list[Any] = field(default_factory=list)
    """As the segments hold them, or encoded."""
    handlers: list[str] = field(default_factory=list)
    """For each image, its generator or its reader: its place is laid out for that."""

    def add(self, ids: Sequence[int], loss: bool = False) -> None:
        """Append ids; `loss` says whether they are predicted."""
        self.ids.extend(ids)
        self.loss.extend([loss] * len(ids))

    def add_image(self, image: Any, length: int, loss: bool = False, handler: str = DEFAULT_GENERATOR) -> None:
        """Append an image as a span of `length` positions, laid out for one generator."""
        self.spans.append((len(self.ids), len(self.ids) + length))
        self.images.append(image)
        self.handlers.append(handler)
        self.add([0] * length, loss)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Batch:
    """Packed rows of documents."""

    ids_BL: Tensor
    """int64."""
    positions_BL: Tensor
    """int64; they begin at 0 in each document."""
    segments_BL: Tensor
    """int64, the number of the document in its row, from 1; 0 is padding."""
    loss_BL: Tensor
    """bool: is the id a target, predicted from the position before it? The first id of a document is none."""
    spans_N3: Tensor
    """int64: row, start and stop of each image."""
    images: Tensor | None = None
    """The N images in this order: pixels, codes or latents."""
    handlers: tuple[str, ...] = ()
    """For each image, the generator or the reader that its place is laid out for."""

    def __len__(self) -> int:
        return len(self.ids_BL)

    def images_of(self, name: str) -> Tensor:
        """Numbers (M,) of the images laid out for this generator or reader."""
        return torch.tensor([n for n, handler in enumerate(self.handlers) if handler == name], dtype=torch.int64)

    def span_positions(self, images_M: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (M, 1) and positions (M, P) of images whose spans have one length."""
        spans_M3 = self.spans_N3[images_M.to(self.spans_N3.device)]
        length = int(spans_M3[0, 2] - spans_M3[0, 1]) if len(spans_M3) else 0
        return spans_M3[:, :1], spans_M3[:, 1:2] + torch.arange(length, device=spans_M3.device)

    def image_mask(self, name: str | None = None) -> Tensor:
        """Which positions (B, L) lie in images: in all of them, or in those of one generator."""
        inside_BL = torch.zeros_like(self.loss_BL)
        for (row, start, stop), handler in zip(self.spans_N3.tolist(), self.handlers, strict=True):
            if name in (None, handler):
                inside_BL[row, start:stop] = True
        return inside_BL

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor replaced by what the function makes of it."""
        return Batch(
            function(self.ids_BL),
            function(self.positions_BL),
            function(self.segments_BL),
            function(self.loss_BL),
            function(self.spans_N3),
            None if self.images is None else function(self.images),
            self.handlers,
        )


@dataclass(frozen=True, eq=False)
class InputSpan:
    """What some positions of packed rows or of a step read, and how far they see."""

    rows: Tensor | int
    """Rows (M, 1) of M spans, or the row of one span."""
    positions: Tensor | slice
    """Positions (M, P) in these rows, or those of one span."""
    embeds: Tensor | None = None
    """Vectors (M, P, D) or (P, D) that are read in place of embeddings of ids; None: the ids are read."""
    attend_until: Tensor | int | None = None
    """The last position of its row that each position attends to, (M, P) or (P,); None is causal."""


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
    handlers: list[str] = []
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
            handlers += tokens.handlers
            at = stop
    spans_N3 = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
    stacked = stack_images(images, image_size) if images else None
    return Batch(ids, positions, segments, loss, spans_N3, stacked, tuple(handlers))
