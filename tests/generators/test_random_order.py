"""Random order: every order is learnt, what is given stays and is read first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import unigen
from unigen.batch import pack
from unigen.document import Document, Segment
from unigen.models import load


def chat(codes_hw: torch.Tensor) -> Document:
    return Document([Segment(text="a dog"), Segment(image=codes_hw, role="assistant")])


@torch.inference_mode()
def test_the_loss_is_that_of_its_order(tiny_folder: Path) -> None:
    """Against the sum written out, code by code, for the order that was drawn; other orders give other sums."""
    model = load(tiny_folder)
    head: Any = model.heads["random-order"]
    codes_hw = torch.tensor([[3, 7], [11, 2]])
    tokens = model.template.encode(chat(codes_hw), generator="random-order")
    batch = model.insert_image_ids(pack([[tokens]], len(tokens), 16))
    totals = set()
    for seed in range(4):
        spans, targets = head.prepare(model, batch, torch.Generator().manual_seed(seed))
        nats_T = head.loss(model, batch, model.hidden_states(batch, spans), targets)
        order = torch.rand(1, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)[0].tolist()
        ids = [model.vocabulary.text_size + int(codes_hw.flatten()[place]) for place in order]
        begin = model.embed(batch.ids_BL[0, : tokens.spans[0][0]])
        read, expected = [head.next_position_embedding.weight[order[0]]], 0.0
        for i in range(4):
            whole = torch.cat((begin, torch.stack(read)))[None]
            ones = torch.ones(whole.shape[:2], dtype=torch.int64)
            states = model.backbone.forward_packed(whole, torch.arange(whole.shape[1])[None], ones)
            scores = model.logits(states[0, -1], model.vocabulary.text_size, model.vocabulary.size)
            expected -= float(scores.float().log_softmax(-1)[ids[i] - model.vocabulary.text_size])
            if i < 3:
                known = model.embed(torch.tensor(ids[i])) + head.position_embedding.weight[order[i]]
                read.append(known + head.next_position_embedding.weight[order[i + 1]])
        assert len(nats_T) == 4 and abs(float(nats_T.sum()) - expected) < 1e-3
        totals.add(round(expected, 4))
    assert len(totals) > 1


def test_what_is_given_stays(tiny_folder: Path) -> None:
    engine = unigen.load(str(tiny_folder), device="cpu")
    fixed = torch.tensor([[5, -1], [-1, 9]])
    seen = set()
    for seed in range(6):
        request = engine.build_request(
            "a dog", "image", generator="random-order", fixed_codes=fixed, temperature=2.0, seed=seed
        )
        list(engine.run_requests([request]))
        codes_hw = request.document.segments[-1].image
        assert codes_hw[0, 0] == 5 and codes_hw[1, 1] == 9
        seen.add((int(codes_hw[0, 1]), int(codes_hw[1, 0])))
    assert len(seen) > 1
