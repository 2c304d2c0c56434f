"""Documents of every kind, rows that any worker makes the same, and a recipe that trains on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unigen.batch import Tokens
from unigen.data.packing import PackCollator, PackedDataset
from unigen.document import Document
from unigen.models import load
from unigen.toyworld.chats import DEFAULT_KIND_WEIGHTS, ChatSampler
from unigen.toyworld.world import SceneRenderer


@pytest.fixture(scope="module")
def world(emoji_font: Path) -> SceneRenderer:
    return SceneRenderer(64)


@pytest.mark.parametrize("kind", DEFAULT_KIND_WEIGHTS)
def test_each_kind_asks_before_it_answers(world: SceneRenderer, kind: str) -> None:
    chats = ChatSampler(world, {kind: 1.0})
    for seed in range(20):
        document, name = chats(np.random.default_rng(seed))
        roles = [s.role for s in document.segments]
        assert name == kind and roles[0] == "user" and roles[-1] == "assistant"
        assert all(s.text is None or s.text.strip() for s in document.segments)
        drawn = [s for s in document.segments if s.role == "assistant" and s.image is not None]
        assert bool(drawn) == (kind in ("draw", "edit", "story", "chat"))


def test_a_document_is_a_function_of_its_seed(world: SceneRenderer) -> None:
    a, b = (ChatSampler(world)(np.random.default_rng(5))[0] for _ in range(2))
    assert a.to_json() == b.to_json()
    assert a.to_json() != ChatSampler(world)(np.random.default_rng(6))[0].to_json()


def test_relations_are_asked_about_in_many_chats(world: SceneRenderer) -> None:
    asked = {"ask": 0, "judge": 0}
    for kind in asked:
        for seed in range(60):
            document, _ = ChatSampler(world, {kind: 1.0})(np.random.default_rng(seed))
            words = " ".join(s.text or "" for s in document.segments if s.role == "user")
            asked[kind] += "as seen from" in words
    assert asked["ask"] >= 20 > asked["judge"]  # the control: scenes as they come


def test_where_mostly_comes_first(world: SceneRenderer) -> None:
    """Later it is given away by the answers before it."""
    first = other = 0
    for seed in range(120):
        document, _ = ChatSampler(world, {"ask": 1.0})(np.random.default_rng(seed))
        asked = [s.text or "" for s in document.segments if s.role == "user" and s.image is None]
        seen = [at for at, question in enumerate(asked) if question.startswith("where") and "as seen from" in question]
        first, other = first + (seen[:1] == [0]), other + bool(seen and seen[0] > 0)
    assert first > other > 0


def test_a_mixture_of_unknown_kinds_is_refused(world: SceneRenderer) -> None:
    with pytest.raises(ValueError, match="there is no paint"):
        ChatSampler(world, {"paint": 1.0})
    with pytest.raises(ValueError, match="shares out"):
        ChatSampler(world, {"draw": 0.0})


def lengths(rng: np.random.Generator) -> Tokens:
    count = int(rng.integers(3, 40))
    return Tokens(ids=[count] * count, loss=[False] * count)


def test_rows_are_a_function_of_seed_and_index() -> None:
    rows = PackedDataset(lengths, 100, seed=1)
    again = PackedDataset(lengths, 100, seed=1)
    spelt = [[t.ids[0] for t in rows[i]] for i in range(20)]
    assert spelt == [[t.ids[0] for t in again[i]] for i in reversed(range(20))][::-1]
    assert spelt != [[t.ids[0] for t in PackedDataset(lengths, 100, seed=2)[i]] for i in range(20)]
    assert all(sum(row) <= 100 for row in spelt) and np.mean([sum(row) for row in spelt]) > 85
    assert len({tuple(row) for row in spelt}) == 20


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds a row of 8"):
        PackedDataset(lambda rng: Tokens(ids=[1] * 9, loss=[False] * 9), 8, seed=0)[0]


def test_collated_chats_are_what_the_model_reads(world: SceneRenderer, tiny_folder: Path) -> None:
    template = load(tiny_folder).template
    chats = ChatSampler(world, {"draw": 1.0, "ask": 1.0})

    def make(rng: np.random.Generator) -> Tokens:
        document: Document = chats(rng)[0]
        return template.encode(document)

    batch = PackCollator(512, 16)([PackedDataset(make, 512, seed=0)[i] for i in range(2)])
    assert batch.ids_BL.shape == (2, 512) and batch.images is not None
    assert batch.images.shape[1:] == (3, 16, 16) and len(batch.images) == len(batch.spans_N3)
    assert not (batch.loss_BL & (batch.positions_BL == 0)).any()
