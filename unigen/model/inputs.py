"""Inputs of the backbone: documents as ids and spans of vectors, and the one function that builds inputs from them.

    inputs = build_inputs(model, ids_BL, spans)                    # training: packed rows; inference: one step
    hidden_BLD = backbone(inputs.embeds_BLD, ..., inputs.attend_until_BL)

Ids are embedded by the backbone's table. An `InputSpan` replaces the embeddings of some positions, by features of a
picture from a vision encoder or by vectors of a generator in its images, or sets how far positions attend.
Shapes: B rows, L positions, D width, N images, M images of one layout, P positions of an image, h x w codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unigen.batch import Batch, InputSpan, Tokens, Vocabulary
from unigen.generators.base import Generator, GeneratorModel
from unigen.model.template import Template
from unigen.tokenizers.quantize import check_codes


@dataclass(frozen=True)
class PromptSpan:
    """Positions of a prompt that read a picture's features."""

    start: int
    """The first position."""
    stop: int
    """The position after the last."""
    features_PD: Tensor
    """The features (P, D), P = stop - start."""


@dataclass(frozen=True)
class PromptIds:
    """A document as the backbone reads it: ids and spans of features."""

    ids: list[int]
    """Ids (L,), 0 where a span replaces them."""
    spans: list[PromptSpan] = field(default_factory=list)
    """Spans of features, in order, without overlap."""

    def vocabulary_ids(self) -> set[int]:
        """The set of ids in the prompt, without positions of spans."""
        ids: list[int] = []
        position = 0
        for span in self.spans:
            ids += self.ids[position : span.start]
            position = span.stop
        return {*ids, *self.ids[position:]}


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of one pass of the backbone."""

    embeds_BLD: Tensor
    """Embeddings (B, L, D)."""
    attend_until_BL: Tensor | None
    """The last position of its row that each position attends to; None where all are causal."""


def build_inputs(
    model: GeneratorModel, ids_BL: Tensor, spans: Sequence[InputSpan], mask_device: torch.device | None = None
) -> ModelInputs:
    """Embed ids, and replace the embeddings of spans.

    Args:
        model: embeds the ids.
        ids_BL: one for each position, a valid one also where a span replaces its embedding.
        spans: applied in order; a later one replaces an earlier one. Gradients flow into their embeddings.
        mask_device: where `attend_until_BL` is put; None: where the ids are.
    """
    embeds_BLD, attend_until_BL = model.embed(ids_BL), None
    for span in spans:
        if span.embeds is not None:
            embeds = span.embeds.to(embeds_BLD)
            if isinstance(span.rows, Tensor) and isinstance(span.positions, Tensor):
                embeds_BLD = embeds_BLD.index_put((span.rows, span.positions), embeds)
            else:
                embeds_BLD[span.rows, span.positions] = embeds
        if span.attend_until is not None:
            if attend_until_BL is None:
                num_rows, length = ids_BL.shape
                attend_until_BL = torch.arange(length, device=mask_device or ids_BL.device).repeat(num_rows, 1)
            attend_until_BL[span.rows, span.positions] = span.attend_until
    return ModelInputs(embeds_BLD, attend_until_BL)


def prompt_ids(tokens: Tokens, vocabulary: Vocabulary, template: Template) -> PromptIds:
    """The ids of one document whose pictures are encoded, and the spans of those that are features.

    Args:
        tokens: the document as a template lays it out, with pictures as codes (h, w) or features (P, D).
        vocabulary: gives the ids of codes.
        template: gives the layout of codes.

    Raises:
        ValueError: a picture has another number of codes than its place, or codes that are not in the vocabulary.
    """
    ids, spans = list(tokens.ids), []
    for (start, stop), image in zip(tokens.spans, tokens.images, strict=True):
        if image.is_floating_point():
            spans.append(PromptSpan(start, stop, image))
            continue
        layout = template.layout((image.shape[0], image.shape[1]))
        if layout.num_ids != stop - start:
            raise ValueError(f"a picture of {tuple(image.shape)} codes is of another size than this model reads")
        check_codes(image, vocabulary.image_size)
        ids[start:stop] = layout.to_ids(vocabulary.image_ids(image))
    return PromptIds(ids, spans)


def place_image_ids(batch: Batch, images_M: Tensor, ids_Mhw: Tensor, row_end: Sequence[int]) -> Batch:
    """Put the ids of some images into a batch. A span may hold text before its codes.

    Args:
        batch: packed rows; it is not changed.
        images_M: indices of images.
        ids_Mhw: their codes as ids of the vocabulary.
        row_end: ids after each row of codes.
    """
    ends = torch.tensor(row_end, dtype=ids_Mhw.dtype).to(ids_Mhw.device).expand(*ids_Mhw.shape[:2], -1)
    ids_MP = torch.cat((ids_Mhw, ends), 2).flatten(1)
    spans_M3 = batch.spans_N3[images_M.to(batch.spans_N3.device)]
    from_end_P = torch.arange(ids_MP.shape[1], 0, -1, device=spans_M3.device)
    ids_BL = batch.ids_BL.clone()
    ids_BL[spans_M3[:, :1], spans_M3[:, 2:] - from_end_P] = ids_MP
    return replace(batch, ids_BL=ids_BL)


def attention_span(batch: Batch, generator: Generator) -> InputSpan | None:
    """How far positions attend in all images of a generator; None where they are causal.

    Args:
        batch: packed rows.
        generator: name of the generator of the images.
    """
    offsets = generator.attend_until()
    if offsets is None:
        return None
    rows_M1, positions_MP = batch.span_positions(batch.images_of(generator.name))
    margin = (len(offsets) - positions_MP.shape[1]) // 2
    around_L = torch.arange(-margin, positions_MP.shape[1] + margin, device=positions_MP.device)
    attend_until_ML = positions_MP[:, :1] + torch.tensor(offsets, device=positions_MP.device)
    return InputSpan(rows_M1, positions_MP[:, :1] + around_L, attend_until=attend_until_ML)
