"""What a model keeps while it learns: the losses of a mixture beside a model that stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unigen.batch import Batch, pack
from unigen.commands.main import main
from unigen.document import Document, Segment
from unigen.inference.engine import Engine
from unigen.training.objectives import MultiGeneratorLoss

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def batch_of(model: Any) -> Batch:
    said = Document([Segment(image=PICTURES[1]), Segment(text="a red dog", role="assistant")])
    drawn = Document([Segment(text="two apples"), Segment(image=PICTURES[0], role="assistant")])
    encode = model.template.encode
    rows = [[encode(said), encode(drawn)], [encode(drawn, writer="masked"), encode(drawn, writer="next-scale")]]
    return pack(rows, 64, 16)


def losses(model: Any, before: Any = None) -> dict[str, torch.Tensor]:
    found = MultiGeneratorLoss(model.generators, before=before)(
        model, batch_of(model), torch.Generator().manual_seed(0)
    )
    return {name: total for name, (total, _) in found.items() if not name.startswith("metric")}


def test_what_a_model_says_stays_and_what_is_new_is_learnt(engine: Engine) -> None:
    """At the model that is kept, text and next-token have no loss and no gradient, the others that of the data."""
    model = copy.deepcopy(engine.model)
    plain, kept = losses(model), losses(model, copy.deepcopy(model))
    for name in ("text", "next-token"):
        assert float(plain[name].detach()) > 1 and abs(float(kept[name].detach())) < 1e-3
    for name in ("masked", "next-scale"):
        torch.testing.assert_close(kept[name], plain[name])
    (kept["text"] + kept["next-token"]).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-4 for p in model.parameters())


def test_moving_from_it_costs_the_divergence(engine: Engine) -> None:
    model, before = copy.deepcopy(engine.model), copy.deepcopy(engine.model)
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.mul_(1.2)
    found, batch = losses(model, before), model.fill(batch_of(model))
    with torch.no_grad():
        p, q = (m.logits(m.hidden(batch)).log_softmax(-1) for m in (model, before))
    gaps_BL = (q.exp() * (q - p)).sum(-1)
    for name, inside_BL in (("text", ~batch.inside()), ("next-token", batch.inside("next-token"))):
        at_BL = (batch.loss_BL & inside_BL)[:, 1:]
        if name == "next-token":  # the packed rows are causal but for masked and next-scale, which end their chats
            assert int(at_BL.sum()) == 4
        torch.testing.assert_close(found[name].detach(), (gaps_BL[:, :-1] * at_BL).sum(), rtol=1e-4, atol=1e-4)
        assert float(found[name].detach()) > 0.01


def test_what_is_kept_has_the_same_vocabulary(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipes/tiny.py", "init_from=unigen-tiny", f"retain={tiny_folder}"]) == 2
    assert "has another text or image tokenizer than the model that learns" in capsys.readouterr().err
