"""Prepared requests, and best-of-n: several candidates for one answer, of which the best is kept.

Captions of one image are compared by the likelihood of the image given each caption, images of one text by the
likelihood of the text given each image (`unigen.inference.scoring`). Does not depend on: how answers are generated.
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
    """Return an image unchanged.

    Args:
        image: any.
    """
    return image


@dataclass(frozen=True)
class PreparedRequest:
    """A validated request: the sequences to run, and how their answers become one."""

    requests: list[Request]
    """One request for each candidate."""
    document: Document
    """The prompt; its images are encoded where there are several candidates."""
    settings: dict[str, object]
    """Settings of the generation, by the options' names."""
    composite: Callable[[Image], Image] = identity
    """Puts a generated image into the image that is inpainted; else the identity."""


def can_rerank(model: UnifiedModel) -> bool:
    """Whether a model can score how well an image and a text match, to choose the best of several candidates.

    Args:
        model: generates the candidates.
    """
    return (
        model.vision_encoder is None
        and not model.template.classes
        and {model.template.context_generator, "text"} <= set(model.generators)
    )


def expand_candidates(
    model: UnifiedModel, document: Document, count: int, build: Callable[[Document, dict[str, float], int], Request]
) -> PreparedRequest:
    """Prepare the requests of several candidates.

    Args:
        model: generates the candidates and compares them.
        document: the prompt: an image and its question, or a text.
        count: number of candidates, in 1 to 64.
        build: builds the request of a document, changed options, and a candidate's index.

    Returns:
        The request that would run alone, and the others; captions after the first are sampled at temperature 1.

    Raises:
        ValueError: the model cannot compare such answers.
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
    """Choose the best answer of each request.

    Args:
        model: compares the answers.
        prepared: requests of `expand_candidates`, all of one output.
        answers: of each request the answers of its candidates.

    Returns:
        Of each request the index of its best answer; the first of equals.
    """
    documents = [request.document for request in prepared]
    if prepared[0].requests[0].output == "image":
        best = rerank_images(model, [str(document.segments[0].text) for document in documents], answers)  # type: ignore[arg-type]
        return [[image is chosen for image in row].index(True) for row, chosen in zip(answers, best, strict=True)]
    captions = [[str(text) for text in dict.fromkeys(row)] for row in answers]  # type: ignore[arg-type]
    return [
        list(row).index(text) for row, text in zip(answers, rerank_captions(model, documents, captions), strict=True)
    ]
