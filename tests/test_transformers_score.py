"""Log-likelihoods of documents by a language model of transformers, against the loss of transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unigen.backends.transformers_engine import TransformersEngine, load_transformers
from unigen.document import Document, Segment


@pytest.fixture
def engine(causal_lm_folder: Path) -> TransformersEngine:
    """A model whose template ends turns by an id, as models that were tuned to chat have it."""
    engine: Any = load_transformers(causal_lm_folder)
    engine.processor.chat_template = engine.processor.chat_template.replace(
        "m['content'] }}", "m['content'] }}{% if m['role'] == 'assistant' %}<|endoftext|>{{ ',' }}{% endif %}"
    )
    engine.model.generation_config.eos_token_id = engine.processor.convert_tokens_to_ids("<|endoftext|>")
    for p in engine.model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    return engine


def conversation(*texts: str) -> Document:
    roles = ("user", "assistant", "user", "assistant")
    return Document([Segment(text=text, role=role) for text, role in zip(texts, roles, strict=False)])  # type: ignore[arg-type]


def expected_logprob(engine: Any, prompt: str, answer: str) -> float:
    """By transformers' own loss, whose labels are the answer's ids alone."""
    prompt_ids, answer_ids = (engine.processor(text, add_special_tokens=False).input_ids for text in (prompt, answer))
    ids = torch.tensor([prompt_ids + answer_ids])
    labels = torch.tensor([[-100] * len(prompt_ids) + answer_ids])
    with torch.no_grad():
        return -float(engine.model(input_ids=ids, labels=labels).loss) * len(answer_ids)


def test_a_score_is_the_loss_of_the_answer(engine: Any) -> None:
    (score,) = engine.score([conversation("a red dog", " on a blue hill")], per_token=True)
    expected = expected_logprob(engine, "usera red dogassistant", " on a blue hill<|endoftext|>")
    assert score.total == pytest.approx(expected, abs=1e-3)
    assert engine.processor.decode(score.token_ids) == " on a blue hill<|endoftext|>"
    assert len(score.logprobs) == len(score.token_ids) and float(score.logprobs.sum()) == pytest.approx(score.total)
    # the negative control: with the prompt among the targets it is another figure
    assert abs(expected_logprob(engine, "user", "a red dogassistant on a blue hill<|endoftext|>") - expected) > 1


def test_all_turns_of_the_assistant_count(engine: Any) -> None:
    first, second = conversation("a red dog", " a hill"), conversation("a red dog", " a hill", "user", " a dog")
    scores = engine.score([first, second])
    rest = expected_logprob(
        engine, "usera red dogassistant a hill<|endoftext|>,useruserassistant", " a dog<|endoftext|>"
    )
    assert scores[1].total == pytest.approx(scores[0].total + rest, abs=1e-3) and scores[0].logprobs is None
    assert scores[1].token_ids[: len(scores[0].token_ids)] == scores[0].token_ids


def test_greedy_answers_are_likelier_than_others(engine: Any) -> None:
    answer = engine.generate("a red dog", "text", max_tokens=1)
    documents = [conversation("a red dog", words) for words in (answer, "q")]
    likely, other = (score.logprobs[0] for score in engine.score(documents, per_token=True))
    assert likely > other


def test_what_cannot_be_scored(engine: Any) -> None:
    picture = Document([Segment(text="a"), Segment(image=Image.new("RGB", (4, 4)), role="assistant")])
    answer = Document([Segment(text="a dog", role="assistant")])
    for document, reason in (
        (conversation("a red dog"), "nothing to score"),
        (picture, "scores text alone"),
        (answer, "begin with the user"),
    ):
        with pytest.raises(ValueError, match=reason):
            engine.score([document])
    engine.processor.chat_template = "{{ messages | length }}" + engine.processor.chat_template
    with pytest.raises(ValueError, match="does not continue its prompt with the answer"):
        engine.score([conversation("a red dog", " a hill")])
