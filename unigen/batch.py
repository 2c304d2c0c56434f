"""Token sequences for training: the vocabulary, the layout of a document as tokens, and packed batches.

Shapes: B rows, L positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unigen.media.pixels import stack_images


@dataclass(frozen=True)
class Vocabulary:
    """Which id an image code has: text_size pieces of text and specials, among them or after them the image codes, in a
    row but in any order.

    after the text, in order: id(code) = text_size + code        (Liquid, arXiv 2412.04332, section 3)
    else `first` is the first of them, and `order` names their codes    (Chameleon)
    separate_head: are codes scored by a head of their own, never beside text?
    """

    text_size: int
    image_size: int
    image_offset: int | None = None
    code_order: tuple[int, ...] | None = None
    separate_head: bool = False

    @property
    def size(self) -> int:
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
        if self.code_order is not None:
            codes = torch.tensor(self.code_order, device=codes.device).argsort()[codes]
        return codes + self.image_start

    def image_codes(self, ids: Tensor) -> Tensor:
        codes = ids - self.image_start
        return codes if self.code_order is None else torch.tensor(self.code_order, device=ids.device)[codes]

    def is_image(self, ids: Tensor) -> Tensor:
        return (ids >= self.image_start) & (ids < self.image_stop)


@dataclass(frozen=True)
class Layout:
    """How a picture of h x w codes stands among ids: a begin token, `opening`, its rows, each with `row_end` after it,
    then `closing`."""

    grid: tuple[int, int]
    prefix: tuple[int, ...] = ()
    row_end_ids: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

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

    def images_of(self, name: str) -> Tensor:
        """Numbers (M,) of the images laid out for this generator."""
        return torch.tensor([n for n, writer in enumerate(self.writers) if writer == name], dtype=torch.int64)

    def span_positions(self, images_M: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (M, 1) and positions (M, P) of images whose spans have one length."""
        spans_M3 = self.spans_N3[images_M.to(self.spans_N3.device)]
        length = int(spans_M3[0, 2] - spans_M3[0, 1]) if len(spans_M3) else 0
        return spans_M3[:, :1], spans_M3[:, 1:2] + torch.arange(length, device=spans_M3.device)

    def image_mask(self, name: str | None = None) -> Tensor:
        """Which positions (B, L) lie in images: in all of them, or in those of one generator."""
        inside_BL = torch.zeros_like(self.loss_BL)
        for (row, start, stop), writer in zip(self.spans_N3.tolist(), self.writers, strict=True):
            if name in (None, writer):
                inside_BL[row, start:stop] = True
        return inside_BL

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device))

    def pin_memory(self) -> Batch:
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
            self.writers,
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
    """The last position of its row that each position sees, (M, P) or (P,); None: each sees those before it."""


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
