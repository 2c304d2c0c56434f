"""Log-likelihoods of documents, for preference training, for scores, and to choose the best caption or image.

    log_p = log_likelihood(model, pack([[tokens], ..], length, size))     # of the assistant's segments, in nats

The best caption of an image, and the best image of a text, has the highest

    log p(caption | image) + w log p(image | caption)

as in MMI-bidi (Li et al. 2016, arXiv 1510.03055) and other noisy-channel models. The model that reads images also
generates them: as a generator it gives unseen combinations of words a fair likelihood, and an image that it generated
wrongly it may still read correctly. Does not depend on: how answers are sampled.

Shapes: B rows, L positions, D documents, N images of M codes in raster order, P other images with T losses each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan, pack
from unigen.document import Document, Segment
from unigen.generators.base import Generator
from unigen.inference.results import Score
from unigen.model.unified import UnifiedModel
from unigen.samplers.guidance import Guidance
from unigen.utils.numbers import NonFiniteError

if TYPE_CHECKING:
    from PIL.Image import Image

    AnswerT = TypeVar("AnswerT")

CAPTION_PROMPT = "describe this picture"
"""The question of a caption."""
CAPTION_WEIGHT, IMAGE_WEIGHT = 0.7, 0.3
"""w for captions of one image, and for images of one text, where it favours frequent images."""


def log_likelihood(
    model: UnifiedModel,
    batch: Batch,
    uncond: Batch | None = None,
    guidance: Guidance | None = None,
    temperature: float = 1.0,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Log-likelihoods of the trained segments of documents.

    Text has the softmax over all ids. Codes in raster order have the softmax over codes, with guidance and temperature
    as in sampling. An image of another generator has the negative sum of its losses: log p for next-scale (with
    guidance, too) and random order. A generator with one loss for an image has - codes x this mean: for masked
    prediction an estimate of a bound, under masks from `rng`; for a flow the squared error takes its place, as in
    Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908). A generator without `guided_loss` is scored without guidance.

    Args:
        model: the model.
        batch: packed rows with all ids.
        uncond: the same documents with unconditional prompts, for guidance.
        guidance: guidance under which images were sampled; None is none.
        temperature: temperature at which codes were sampled.
        rng: random generator of masks, orders, times and noise; None where no image needs one.

    Returns:
        log p (D,) of each document, in nats.
    """
    documents_B = batch.segments_BL.amax(1)
    first_index_B = documents_B.cumsum(0) - documents_B
    number_BL = first_index_B[:, None] + batch.segments_BL - 1
    image_generators = {
        name: model.generators[name]
        for name in sorted({*batch.handlers} & {*model.generators} - {model.template.context_generator})
    }
    is_guided = guidance is not None and guidance.num_branches > 1 and has_guided_likelihood(model, batch)
    start = None if rng is None else rng.get_state()
    sides = [_encode(model, batch, image_generators, rng)]
    if is_guided:
        assert uncond is not None, "guidance needs the unconditional branch"
        if rng is not None and start is not None:
            rng.set_state(start)
        sides.append(_encode(model, uncond, image_generators, rng))
    rows, positions, text = _text_log_probs(model, sides[0])
    total_D = text.new_zeros(int(documents_B.sum())).index_add(0, number_BL[rows, positions], text)

    for name, generator in image_generators.items():
        rows_P, start_P, _ = batch.spans_N3[batch.images_of(name).to(batch.spans_N3.device)].unbind(1)
        if guidance is not None and generator.guided_loss is not None:
            branches = [(side.hidden_BLD, side.targets[name]) for side in (*sides, sides[-1])][: guidance.num_branches]
            costs = generator.guided_loss(branches, guidance, temperature)
        else:
            costs = generator.loss(model, batch, sides[0].hidden_BLD, sides[0].targets[name])
        costs_PT = costs.unflatten(0, (len(rows_P), -1))
        codes = math.prod(model.image_tokenizer.grid) if costs_PT.shape[1] == 1 else 1
        total_D = total_D.index_add(0, number_BL[rows_P, start_P - 1], -codes * costs_PT.sum(1))

    image_indices_N = _drawn_images(model, batch)
    if len(image_indices_N):
        rows_N1, positions_NM, log_probs_NM = _code_log_probs(model, sides, image_indices_N, guidance, temperature)
        total_D = total_D.index_add(0, number_BL[rows_N1, positions_NM][:, 0], log_probs_NM.sum(-1))
    return total_D


@dataclass(frozen=True)
class _EncodedBatch:
    """A batch and its hidden states."""

    batch: Batch
    """Packed rows with all ids."""
    hidden_BLD: Tensor
    """Hidden states of the backbone."""
    targets: dict[str, object]
    """The targets of each generator, by its name."""


def _encode(
    model: UnifiedModel, batch: Batch, generators: Mapping[str, Generator], rng: torch.Generator | None
) -> _EncodedBatch:
    """Run the backbone on a batch with the inputs of generators, which draw from `rng`."""
    spans: list[InputSpan] = []
    targets: dict[str, object] = {}
    for name, generator in generators.items():
        assert rng is not None, f"the inputs of {name} are random: give rng"
        generator_spans, targets[name] = generator.prepare(model, batch, rng)
        spans += generator_spans
    return _EncodedBatch(batch, model.hidden_states(batch, spans), targets)


def _text_log_probs(model: UnifiedModel, side: _EncodedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, positions and log-probabilities (T,) of the trained ids of text."""
    batch = side.batch
    rows, positions = (batch.loss_BL & ~batch.image_mask()).nonzero(as_tuple=True)
    logits_TV = model.logits(side.hidden_BLD[rows, positions - 1])
    return rows, positions, _token_log_probs(logits_TV, batch.ids_BL[rows, positions])


def _drawn_images(model: UnifiedModel, batch: Batch) -> Tensor:
    """Indices (N,) of the images that are trained as codes in raster order."""
    image_indices_N = batch.images_of(model.template.context_generator).to(batch.spans_N3.device)
    return image_indices_N[batch.loss_BL[batch.spans_N3[image_indices_N, 0], batch.spans_N3[image_indices_N, 1]]]


def _code_log_probs(
    model: UnifiedModel,
    sides: Sequence[_EncodedBatch],
    image_indices_N: Tensor,
    guidance: Guidance | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, 1), positions (N, M) and log-probabilities (N, M) of the codes of images, with guidance where there are
    two sides."""
    image_start, image_stop = model.vocabulary.image_start, model.vocabulary.image_stop
    batch = sides[0].batch
    rows_N1, positions_NM = batch.span_positions(image_indices_N)
    is_code_M = model.vocabulary.is_image(batch.ids_BL[rows_N1, positions_NM])[0]  # and no id that ends a row
    branches = []
    for side in sides:
        side_rows_N1, side_positions_NM = side.batch.span_positions(image_indices_N)
        states = side.hidden_BLD[side_rows_N1, side_positions_NM[:, is_code_M] - 1]
        branches.append(model.logits(states, image_start, image_stop).float())
    logits = branches[0]
    if len(branches) > 1:
        assert guidance is not None
        logits = guidance.combine(branches)
    positions_NM = positions_NM[:, is_code_M]
    ids_NM = batch.ids_BL[rows_N1, positions_NM] - image_start
    return rows_N1, positions_NM, _token_log_probs(logits / temperature, ids_NM)


@torch.inference_mode()
def score_document(model: UnifiedModel, document: Document, per_token: bool = False) -> Score:
    """Log-likelihood of the assistant's segments in a document: text among all ids, codes of images among codes.

    Args:
        model: the model.
        document: with at least one segment of the assistant; its images are images or codes.
        per_token: whether to return the log-probability of each id.

    Returns:
        The score of the ids that such a document has as targets in training; the end of a turn is one of them.

    Raises:
        ValueError: the assistant has no segment.
    """
    if not any(segment.role == "assistant" for segment in document.segments):
        raise ValueError("this document has no text or image of the assistant: there is nothing to score")
    tokens = model.template.encode(model.encode_document(document))
    batch = model.insert_image_ids(pack([[tokens]], len(tokens), model.image_tokenizer.image_size).to(model.device))
    side = _encode(model, batch, {}, None)
    log_probs_L = side.hidden_BLD.new_full((len(tokens),), math.nan, dtype=torch.float32)
    _, positions, text = _text_log_probs(model, side)
    log_probs_L[positions] = text
    image_indices_N = _drawn_images(model, batch)
    if len(image_indices_N):
        _, positions_NM, codes_NM = _code_log_probs(model, [side], image_indices_N)
        log_probs_L[positions_NM] = codes_NM
    scored_L = ~log_probs_L.isnan()
    log_probs_T = log_probs_L[scored_L].cpu()
    ids = batch.ids_BL[0, : len(tokens)][scored_L].tolist()
    return Score(float(log_probs_T.sum()), ids, log_probs_T if per_token else None)


def has_guided_likelihood(model: UnifiedModel, batch: Batch) -> bool:
    """Whether a batch has images whose log-likelihood includes guidance.

    Args:
        model: the model.
        batch: packed rows.
    """
    guided = {name for name, generator in model.generators.items() if generator.guided_loss is not None}
    return not {*batch.handlers}.isdisjoint({model.template.context_generator, *guided})


def _token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="none").view(ids.shape)


def mutual_score(model: UnifiedModel, documents: Sequence[Document], texts: Sequence[str], weight: float) -> Tensor:
    """How well texts match images: log p(text | image) + weight log p(image | text).

    Args:
        model: the model.
        documents: D documents with one image each, given as codes, and its question.
        texts: of each document the text.
        weight: w.

    Returns:
        Scores (D,), in nats.
    """
    captions: list[Document] = []
    drawings: list[Document] = []
    for document, text in zip(documents, texts, strict=True):
        picture = next(segment.image for segment in document.segments if segment.image is not None)
        captions.append(Document([*document.segments, Segment(text=text, role="assistant")]))
        drawings.append(Document([Segment(text=text), Segment(image=picture, role="assistant")]))
    return _unpacked_log_likelihood(model, captions) + weight * _unpacked_log_likelihood(model, drawings)


@torch.inference_mode()
def rerank_captions(model: UnifiedModel, documents: Sequence[Document], captions: Sequence[Sequence[str]]) -> list[str]:
    """The best caption of each image; the first of equals.

    Args:
        model: compares the captions.
        documents: documents with one image each, given as codes, and its question.
        captions: of each document the candidates.

    Raises:
        NonFiniteError: a score is not finite.
    """
    repeated_documents = [document for document, texts in zip(documents, captions, strict=True) for _ in texts]
    scores = mutual_score(model, repeated_documents, [text for texts in captions for text in texts], CAPTION_WEIGHT)
    return _argmax_per_group(captions, scores, model.dtype)


@torch.inference_mode()
def rerank_images(model: UnifiedModel, words: Sequence[str], pictures: Sequence[Sequence[Image]]) -> list[Image]:
    """The best image of each text; the first of equals.

    Args:
        model: compares the images.
        words: the texts.
        pictures: of each text the candidates, PIL images.

    Raises:
        NonFiniteError: a score is not finite.
    """
    caption_documents = [
        model.encode_document(Document.of([picture, CAPTION_PROMPT]))
        for candidates in pictures
        for picture in candidates
    ]
    repeated_documents = [text for text, candidates in zip(words, pictures, strict=True) for _ in candidates]
    return _argmax_per_group(
        pictures, mutual_score(model, caption_documents, repeated_documents, IMAGE_WEIGHT), model.dtype
    )


def _argmax_per_group(answers: Sequence[Sequence[AnswerT]], scores: Tensor, dtype: torch.dtype) -> list[AnswerT]:
    """Of each row the answer of the highest score.

    Raises:
        NonFiniteError: a score is not finite; the error names the model's dtype.
    """
    if not bool(scores.isfinite().all()):
        raise NonFiniteError("scores of candidates", dtype)
    parts = scores.split([len(candidates) for candidates in answers])
    return [candidates[int(part.argmax())] for candidates, part in zip(answers, parts, strict=True)]


def _unpacked_log_likelihood(model: UnifiedModel, documents: Sequence[Document], batch: int = 64) -> Tensor:
    """log p (D,) of the assistant's segments in documents with codes as images, one document a row. Documents with
    images of equal shapes run in one batch."""
    tokens = [model.template.encode(document) for document in documents]
    by_shape: dict[tuple[torch.Size, ...], list[int]] = {}
    for number, candidates in enumerate(tokens):
        by_shape.setdefault(tuple(codes.shape for codes in candidates.images), []).append(number)
    parts, order = [], []
    for numbers in by_shape.values():
        for start in range(0, len(numbers), batch):
            rows = [tokens[number] for number in numbers[start : start + batch]]
            packed = pack([[candidates] for candidates in rows], max(map(len, rows)), model.image_tokenizer.image_size)
            parts.append(log_likelihood(model, model.insert_image_ids(packed.to(model.device))))
        order += numbers
    return torch.cat(parts)[torch.tensor(order).argsort().to(model.device)]
