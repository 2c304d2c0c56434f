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
from unigen.models import load
from unigen.nn.cpu.linear import PackedLinear, pack_linears
from unigen.training.objectives import MultiGeneratorLoss

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def batch_of(model: Any) -> Batch:
    said = Document([Segment(image=PICTURES[1]), Segment(text="a red dog", role="assistant")])
    drawn = Document([Segment(text="two apples"), Segment(image=PICTURES[0], role="assistant")])
    encode = model.template.encode
    rows = [[encode(said), encode(drawn)], [encode(drawn, generator="masked"), encode(drawn, generator="next-scale")]]
    return pack(rows, 64, 16)


def losses(model: Any, before: Any = None) -> dict[str, torch.Tensor]:
    found = MultiGeneratorLoss(model.generators, teacher=before)(
        model, batch_of(model), torch.Generator().manual_seed(0)
    )
    return {name: total for name, (total, _) in found.items() if not name.startswith("metric")}


def state_of(model: Any) -> tuple[list[type], list[tuple[torch.Tensor, int, int]], dict[str, torch.Tensor]]:
    """What sampling may not change: classes, parameters with their versions and places in memory, and losses."""
    parameters = [(p.detach().clone(), p._version, p.data_ptr()) for p in model.parameters()]
    return [type(module) for module in model.modules()], parameters, losses(model)


def is_unchanged(model: Any, before: tuple[Any, Any, Any]) -> bool:
    classes, parameters, old_losses = before
    now = state_of(model)
    same = [a[1:] == b[1:] and torch.equal(a[0], b[0]) for a, b in zip(parameters, now[1], strict=True)]
    return classes == now[0] and all(same) and all(torch.equal(now[2][name], old_losses[name]) for name in old_losses)


@pytest.mark.parametrize("shared", [True, False], ids=["inference copy", "the model itself"])
def test_sampling_leaves_a_model_in_training_as_it_is(shared: bool, tiny_folder: Path) -> None:
    model = load(tiny_folder)
    before = state_of(model)
    engine = Engine(model.inference_copy() if shared else model)
    packed = [type(module) is PackedLinear for module in engine.model.backbone.modules()]
    assert any(packed) == shared
    picture = engine.generate("a red dog", temperature=0.5)
    assert isinstance(engine.generate([picture, "what is it?"], "text", max_tokens=4), str)
    assert is_unchanged(model, before)
    pack_linears(model.backbone)  # the control
    assert not is_unchanged(model, before)


def test_an_inference_copy_computes_with_what_was_learnt(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    twin = model.inference_copy()
    assert list(twin.state_dict()) == list(model.state_dict()) and twin.heads is model.heads
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    ids_BL = torch.tensor([[1, 5, 9]])
    positions_BL, segments_BL = torch.arange(3)[None], torch.ones_like(ids_BL)
    states = [m.backbone.forward_packed(m.embed(ids_BL), positions_BL, segments_BL) for m in (model, twin)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


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
    found, batch = losses(model, before), model.insert_image_ids(batch_of(model))
    with torch.no_grad():
        p, q = (m.logits(m.hidden_states(batch)).log_softmax(-1) for m in (model, before))
    gaps_BL = (q.exp() * (q - p)).sum(-1)
    for name, inside_BL in (("text", ~batch.image_mask()), ("next-token", batch.image_mask("next-token"))):
        at_BL = (batch.loss_BL & inside_BL)[:, 1:]
        if name == "next-token":  # the packed rows are causal but for masked and next-scale, which end their chats
            assert int(at_BL.sum()) == 4
        torch.testing.assert_close(found[name].detach(), (gaps_BL[:, :-1] * at_BL).sum(), rtol=1e-4, atol=1e-4)
        assert float(found[name].detach()) > 0.01


def test_what_is_kept_has_the_same_vocabulary(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipes/tiny.py", "init_from=unigen-tiny", f"lwf_teacher={tiny_folder}"]) == 2
    assert "has another text or image tokenizer than the model that learns" in capsys.readouterr().err
