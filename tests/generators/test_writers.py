"""Every way of writing a picture: loss and sampler mirror each other, a picture is its own in a batch, training sees
what sampling sees. A new generator joins by its name in `WRITERS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import unigen
from unigen.engine import Engine
from unigen.models import load
from unigen.sequence import Document, Segment, pack
from unigen.training.objectives import Mixture

WRITERS = ("next-token", "masked")
PROMPTS = ["a blue horse", "a", "two apples on a blue background and a red dog", "the dog"]
CODES = torch.tensor([[[1, 2], [3, 4]], [[31, 7], [7, 0]], [[5, 5], [6, 6]]])


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    """Random weights spread so that what is drawn depends on what was read."""
    engine = unigen.load(str(tiny_folder), device="cpu")
    rng = torch.Generator().manual_seed(1)
    for p in engine.model.backbone.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.3, generator=rng)
    return engine


def drawn(engine: Engine, prompts: list[Any], seeds: list[int], **options: Any) -> list[list[list[int]]]:
    """The codes of one picture for each prompt, all in one batch."""
    requests = [engine.request(p, "image", seed=s, **options) for p, s in zip(prompts, seeds, strict=True)]
    list(engine.run(requests))
    return [request.document.segments[-1].image.tolist() for request in requests]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_picture_does_not_depend_on_its_batch(engine: Engine, writer: str, guidance: float) -> None:
    options: dict[str, Any] = {"generator": writer, "guidance": guidance, "temperature": 1.5}
    together = drawn(engine, PROMPTS, [7, 8, 9, 7], **options)
    alone = [drawn(engine, [p], [s], **options)[0] for p, s in zip(PROMPTS, [7, 8, 9, 7], strict=True)]
    assert together == alone
    assert drawn(engine, PROMPTS[:1], [8], **options)[0] != alone[0]


def test_writers_share_a_batch(engine: Engine) -> None:
    requests = [engine.request(PROMPTS[0], "image", seed=3, generator=w, temperature=1.5) for w in WRITERS]
    list(engine.run(requests))
    together = [request.document.segments[-1].image.tolist() for request in requests]
    assert together == [drawn(engine, PROMPTS[:1], [3], generator=w, temperature=1.5)[0] for w in WRITERS]


@pytest.mark.parametrize("writer", WRITERS)
def test_loss_and_sampler_mirror_each_other(tiny_folder: Path, writer: str) -> None:
    """Overfit three chats; sampling gives them back, alone and inside a story."""
    model = load(tiny_folder).train()
    chats = [
        Document([Segment(text="a red dog"), Segment(image=CODES[0], role="assistant")]),
        Document([Segment(image=CODES[1]), Segment(text="two apples"), Segment(image=CODES[2], role="assistant")]),
        Document(
            [
                Segment(text="story"),
                Segment(text="a witch", role="assistant"),
                Segment(image=CODES[2], role="assistant"),
                Segment(text="and raven", role="assistant"),
                Segment(image=CODES[0], role="assistant"),
            ]
        ),
    ]
    first = Document(chats[2].segments[:3])  # what is written is the last picture, so the first is learnt here
    rows = [[model.template.encode(chat, writer=writer) for chat in (*chats, first)]]
    rows.append([model.template.encode(chats[0], writer=writer, blind=True), model.template.encode(chats[2])])
    batch = pack(rows, 112, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    objective, rng = Mixture(model.generators), torch.Generator().manual_seed(0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 if step < 150 else 1e-3
        losses = objective(model, batch, rng)
        loss = sum(losses[k][0] / losses[k][1] for k in objective.weights if losses[k][1] > 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    engine = Engine(model.eval())
    options: dict[str, Any] = {"generator": writer, "temperature": 0.0, "guidance": 1.0}
    assert drawn(engine, [chat.segments[:-1] for chat in chats[:2]], [0, 0], **options) == CODES[[0, 2]].tolist()
    request = engine.request("story", "interleaved", **options)
    list(engine.run([request]))
    said = [s.text or s.image.tolist() for s in request.document.segments[1:]]
    assert said == ["a witch", CODES[2].tolist(), "and raven", CODES[0].tolist()]


@pytest.mark.parametrize("writer", WRITERS)
@torch.inference_mode()
def test_counts_are_known_before_the_pictures(engine: Engine, writer: str) -> None:
    model, rng = engine.model, torch.Generator()
    chat = Document([Segment(text="a dog"), Segment(image=CODES[0], role="assistant")])
    batch = pack([[model.template.encode(chat, writer=writer), model.template.encode(chat)]], 64, 16)
    objective = Mixture(model.generators)
    found = {name: int(count) for name, (_, count) in objective(model, batch, rng).items()}
    assert found == {name: int(count) for name, count in objective.counts(batch, rng).items()}
    assert found[writer] > 0


def test_an_image_is_complete_or_not_there(engine: Engine) -> None:
    for seed in range(6):
        options: dict[str, Any] = {"seed": seed, "temperature": 1.5, "max_tokens": 40, "max_images": 2}
        request = engine.request("a story", "interleaved", generator="masked", **options)
        list(engine.run([request]))
        for segment in request.document.segments[1:]:
            if segment.image is not None:
                assert segment.image.shape == (2, 2) and 0 <= segment.image.min() and segment.image.max() < 32
