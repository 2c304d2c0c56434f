"""Requests that are ready to run, and several candidates for one answer, of which the best is kept.

Captions of one image are compared by which of them the model would likeliest draw it, images of words by in which of
them it would likeliest read the words (`unigen.inference.scoring`). Does not depend on: how answers are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL.Image import Image

from unigen.document import Document
from unigen.inference.options import CANDIDATES
from unigen.inference.request import Request
from unigen.inference.results import Answer
from unigen.inference.scoring import rerank_captions, rerank_images
from unigen.model.unified import UnifiedModel


def identity(image: Image) -> Image:
    """The image as it is."""
    return image


@dataclass(frozen=True)
class PreparedRequest:
    """A validated request: the sequences to run, and how the answer is made of theirs."""

    requests: list[Request]
    """One a candidate."""
    document: Document
    """The prompt, its images encoded where there are several candidates."""
    settings: dict[str, object]
    """How the answer is made, by the options' names."""
    composite: Callable[[Image], Image] = identity
    """Puts a generated image where it belongs: into the image that is inpainted."""


def can_rerank(model: UnifiedModel) -> bool:
    """Whether the model says how well an image and a text go together, so that one of several candidates is best."""
    return (
        model.vision_encoder is None and not model.template.classes and {"next-token", "text"} <= set(model.generators)
    )


def expand_candidates(
    model: UnifiedModel, document: Document, count: int, build: Callable[[Document, dict[str, float], int], Request]
) -> PreparedRequest:
    """The requests of several candidates.

    Args:
        model: generates them and compares them.
        document: one image and its question, or words.
        count: how many candidates.
        build: makes the request of a document, with options that differ from those given, and of a candidate's index.
    Returns:
        The request that would run alone, and others, captions at temperature 1.
    Raises:
        ValueError: where the model cannot compare what they answer.
    """
    CANDIDATES.check("candidates", count)
    document = model.encode_document(document)
    if not can_rerank(model):
        raise ValueError("candidates are for models that read and draw pictures code by code: leave them out")
    first = build(document, {}, 0)
    num_images = {"text": 1, "image": 0}.get(first.output)
    if len(document.images()) != num_images or (not num_images and len(document.segments) != 1):
        raise ValueError("candidates are captions of one picture, or pictures of words: ask for one of these")
    changes = {"temperature": 1.0} if num_images else {}
    return PreparedRequest([first, *(build(document, changes, index) for index in range(1, count))], document, {})


def select_best(
    model: UnifiedModel, prepared: Sequence[PreparedRequest], answers: Sequence[Sequence[Answer]]
) -> list[int]:
    """Of each request the index of the best of its candidates' answers; the first of equals.

    Args:
        model: compares them.
        prepared: requests of `expand_candidates`, all of one output.
        answers: their candidates' answers.
    """
    documents = [request.document for request in prepared]
    if prepared[0].requests[0].output == "image":
        best = rerank_images(model, [str(document.segments[0].text) for document in documents], answers)
        return [[one is chosen for one in row].index(True) for row, chosen in zip(answers, best, strict=True)]
    captions = [[str(text) for text in dict.fromkeys(row)] for row in answers]  # type: ignore[arg-type]
    return [
        list(row).index(text) for row, text in zip(answers, rerank_captions(model, documents, captions), strict=True)
    ]
