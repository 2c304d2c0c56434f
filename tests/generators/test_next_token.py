"""Text that is learnt under noise: what is read changes, what is to be said does not."""

from __future__ import annotations

import torch

from unigen.engine import Engine
from unigen.generators.next_token import Text
from unigen.sequence import Document, Segment, pack


def test_noise_changes_what_is_read_of_answers_alone(engine: Engine) -> None:
    model = engine.model
    chat = Document([Segment(text="a dog and a horse"), Segment(text="two red apples on blue", role="assistant")])
    batch = pack([[model.template.encode(chat)]], 64, 16)
    text = Text(model.generators["text"].forbidden)  # type: ignore[attr-defined]
    embeds_BLD = model.embed(batch.ids_BL)

    def read(noise: float, seed: int) -> torch.Tensor:
        text.noise = noise
        read_BLD, target_BL = text.prepare(model, batch, embeds_BLD, torch.Generator().manual_seed(seed))
        assert torch.equal(target_BL, batch.loss_BL)
        return (read_BLD != embeds_BLD).any(-1)

    learnt = batch.loss_BL & (batch.ids_BL != model.template.turn_end)
    changed = [read(1.0, seed) for seed in range(20)]
    assert torch.equal(torch.stack(changed).any(0), learnt)
    few = torch.stack([read(0.1, seed) for seed in range(20)])
    assert 0 < few.sum() < torch.stack(changed).sum() / 2
    assert not read(0.0, 0).any()
