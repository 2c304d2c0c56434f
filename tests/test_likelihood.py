"""Captions chosen by the pictures that they would draw, and pictures by how they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from unigen.batch import pack
from unigen.document import Document, Segment
from unigen.inference import scoring
from unigen.inference.engine import Engine
from unigen.inference.scoring import log_likelihood, rerank_captions
from unigen.serving.jobs import Error, Job
from unigen.serving.worker import BatchedWorker
from unigen.utils.numbers import NonFiniteError

CODES = torch.tensor([[1, 2], [3, 4]])
ASKED = Document([Segment(image=CODES), Segment(text="describe this picture")])


def alone(engine: Engine, document: Document) -> float:
    model = engine.model
    tokens = model.template.encode(document)
    return log_likelihood(model, model.insert_image_ids(pack([[tokens]], len(tokens), 16))).item()


def test_the_caption_is_that_of_the_greatest_sum(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, each document alone; with another weight of the channel another caption may win."""
    captions = ["a red dog", "a horse", "two apples on a blue background", "a", "a witch above a star"]
    told = [alone(engine, Document([*ASKED.segments, Segment(text=c, role="assistant")])) for c in captions]
    drawn = [alone(engine, Document([Segment(text=c), Segment(image=CODES, role="assistant")])) for c in captions]
    for weight in (0.0, 0.3, 1000.0):
        monkeypatch.setattr(scoring, "CAPTION_WEIGHT", weight)
        sums = [a + weight * b for a, b in zip(told, drawn, strict=True)]
        best = captions[sums.index(max(sums))]
        assert rerank_captions(engine.model, [ASKED, ASKED], [captions, captions[::-1]]) == [best, best]
    assert max(range(5), key=told.__getitem__) != max(range(5), key=drawn.__getitem__), "the weights would not matter"


def test_describe_chooses_among_what_the_engine_says(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, options = Image.new("RGB", (16, 16), "red"), {"max_tokens": 8}
    seen: list[Any] = []

    def longest(model: Any, asked: Any, captions: Any) -> list[str]:
        seen.extend(captions)
        return [max(texts, key=len) for texts in captions]

    monkeypatch.setattr("unigen.inference.candidates.rerank_captions", longest)
    said = engine.describe(picture, **options)
    assert len(seen) == 1 and 2 <= len(seen[0]) <= 16 and said == max(seen[0], key=len)
    assert seen[0][0] == engine.describe(picture, candidates=1, **options)
    assert engine.describe(picture, seed=0, **options) == said
    prompts = [[picture, "describe this picture"]] * 2
    assert engine.generate_batch(prompts, [5, 0], "text", candidates=16, **options)[1] == said
    before = len(seen)
    engine.describe(picture, "how many?", **options)
    assert len(seen) == before, "an answer to a question is no caption"


@pytest.mark.parametrize("generator", ["next-token", "masked"])
def test_a_picture_is_chosen_among_others(engine: Engine, monkeypatch: pytest.MonkeyPatch, generator: str) -> None:
    """By the same sum; the first is what is drawn without others, and each prompt has its own."""
    words, options = ["a red dog", "two apples"], {"generator": generator, "guidance": 1.0}
    drawn: list[Any] = []
    kept = scoring.mutual_score

    def noted(model: Any, asked: Any, texts: Any, weight: float) -> torch.Tensor:
        drawn.append((asked, texts, kept(model, asked, texts, weight)))
        return drawn[-1][2]

    monkeypatch.setattr(scoring, "mutual_score", noted)
    best = engine.generate_batch(words, [3, 4], candidates=3, **options)
    ((asked, texts, scores),) = drawn
    assert texts == [words[0]] * 3 + [words[1]] * 3
    for k, text in enumerate(words):
        codes = [document.images()[0] for document in asked[3 * k : 3 * k + 3]]
        alone = engine.generate(text, seed=3 + k, **options)
        assert torch.equal(codes[0], engine.model.encode_images(engine.model.preprocess_images([alone]))[0])
        chosen = engine.model.encode_images(engine.model.preprocess_images([best[k]]))[0]
        assert torch.equal(chosen, codes[int(scores[3 * k : 3 * k + 3].argmax())])
    assert engine.generate(words[1], seed=4, candidates=3, **options).tobytes() == best[1].tobytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, p: e.describe(p, candidates=0), "candidates must be a whole number from 1 to 64"),
        (lambda e, p: e.generate("a dog", "interleaved", candidates=2), "candidates are captions"),
        (lambda e, p: e.edit(p, "make it red", candidates=2), "candidates are captions"),
        (lambda e, p: e.generate("a dog", candidates=0), "candidates must be a whole number from 1 to 64"),
        (lambda e, p: e.generate(["a dog"], "text", candidates=2), "candidates are captions"),
        (lambda e, p: e.generate([p, p, "which?"], "text", candidates=2), "candidates are captions"),
    ],
)
def test_candidates_that_make_no_sense_are_refused(engine: Engine, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(engine, Image.new("RGB", (16, 16)))


@pytest.mark.parametrize("output", ["text", "image"])
def test_candidates_whose_scores_are_not_finite(engine: Engine, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """None of them is the best. They are compared by passes of their own, so that each may have been drawn well."""
    prompt = [Image.new("RGB", (16, 16)), "describe this picture"] if output == "text" else "a dog"
    options: dict[str, Any] = {"output": output, "candidates": 2} | ({"max_tokens": 4} if output == "text" else {})
    hidden = engine.model.hidden_states
    monkeypatch.setattr(engine.model, "hidden_states", lambda *inputs: hidden(*inputs) * float("nan"))
    with pytest.raises(NonFiniteError, match="scores of candidates of this model are not finite"):
        engine.generate(prompt, **options)
    worker, events = BatchedWorker(engine, 8), list[Any]()
    rest = {name: value for name, value in options.items() if name == "max_tokens"}
    worker.submit(0, Job(Document.of(prompt), options["output"], rest, num_candidates=2))
    while worker.busy:
        events += [event for _, event in worker.step()]
    assert isinstance(events[-1], Error) and not events[-1].retryable and "candidates" in events[-1].message
