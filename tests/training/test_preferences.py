"""Preferences among pictures: the pairs of a judged file, DPO's loss by hand, and a recipe that learns them."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unigen.cli import main
from unigen.data.packing import Collate
from unigen.engine import Engine
from unigen.sequence import Document, Segment, pack
from unigen.training.objectives import Mixture
from unigen.training.preferences import (
    CollateCompared,
    Compared,
    ComparedRows,
    PreferenceConfig,
    Preferences,
    log_likelihood,
    read_pairs,
)

GROUPS = (
    ("a dog", [True, False, False, True]),
    ("two red apples", [True, True, True, False]),
    ("a horse", [True, True, True, True]),
)


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """Four pictures of 2x2 codes for each prompt; the first code says which."""
    lines = [
        json.dumps({"prompt": prompt, "codes": [[[4 * n + k, 1], [2, 3]] for k in range(4)], "right": right})
        for n, (prompt, right) in enumerate(GROUPS)
    ]
    (tmp_path / "judged.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "judged.jsonl"


def test_pairs_hold_a_right_and_a_wrong_picture_of_one_prompt(judged: Path) -> None:
    pairs = read_pairs(judged, 0)
    assert sorted(prompt for prompt, _, _ in pairs) == ["a dog", "a dog", "two red apples"]
    used = [int(codes[0, 0]) for _, *both in pairs for codes in both]
    assert len(set(used)) == len(used) == 6
    for prompt, chosen, rejected in pairs:
        right = dict(GROUPS)[prompt]
        assert right[int(chosen[0, 0]) % 4] and not right[int(rejected[0, 0]) % 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ('{"prompt": "a dog"}\n', "line 1 of .* does not hold judged pictures"),
        ("nothing\n", "line 1 of .* does not hold judged pictures"),
        ('{"prompt": "a", "codes": [[[1]], [[2]]], "right": [true, true]}\n', "no prompt with a right and a wrong"),
    ],
)
def test_files_that_cannot_be_learnt_from_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "f").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "f", 0)


def compared(engine: Engine, judged: Path) -> Compared:
    template = engine.model.template
    replay = [template.encode(Document([Segment(text="a dog"), Segment(text="a horse", role="assistant")]))]
    rows = ComparedRows([replay] * 9, read_pairs(judged, 0), template.encode, 128, rows=2)
    assert [len(row) for row in rows[0][1]] == [2 * rows.fit] * 2
    assert [t.ids for t in rows[0][1][0]] != [t.ids for t in rows[0][1][1]]
    return CollateCompared(Collate(128, 16), 128, 16)([rows[0], rows[1]])


def test_the_likelihood_of_a_picture_is_that_of_its_document_alone(engine: Engine, judged: Path) -> None:
    model, batch = engine.model, compared(engine, judged)
    together_P2 = log_likelihood(model, model.fill(batch.pairs))
    rows = ComparedRows([[]] * 9, read_pairs(judged, 0), model.template.encode, 128, rows=2)
    alone = []
    for tokens in (tokens for i in (0, 1) for row in rows[i][1] for tokens in row):
        batch = model.fill(pack([[tokens]], len(tokens), 16))
        start, stop = tokens.spans[0]
        logits_MV = model.logits(model.hidden(batch)[0, start - 1 : stop - 1], model.vocabulary.text_size)
        codes_M = model.vocabulary.codes(batch.ids_BL[0, start:stop])
        alone.append(logits_MV.log_softmax(-1)[range(4), codes_M].sum())
    torch.testing.assert_close(together_P2.flatten(), torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_the_loss_is_dpo(engine: Engine, judged: Path) -> None:
    """log 2 where nothing has been learnt; else equation 7 in numbers; its step makes the chosen likelier."""
    model, batch = copy.deepcopy(engine.model), compared(engine, judged)
    objective = Preferences(Mixture(model.generators), copy.deepcopy(model), PreferenceConfig(beta=0.5))
    losses = objective(model, batch, torch.Generator())
    total, count = losses["preference"]
    assert math.isclose(float(total.detach()) / count, math.log(2), rel_tol=1e-5) and losses["metric/ranked"][0] == 0
    assert not any(p.requires_grad for p in objective.reference.parameters())
    counts: dict[str, Any] = objective.counts(batch, torch.Generator())
    assert {k: int(n) for k, (_, n) in losses.items()} == {k: int(n) for k, n in counts.items()}

    before_P2 = log_likelihood(model, model.fill(batch.pairs)).detach()
    (total / count).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad
    after_P2 = log_likelihood(model, model.fill(batch.pairs)).detach()
    gain_P = ((after_P2 - before_P2) * torch.tensor([1.0, -1.0])).sum(-1)
    assert gain_P.mean() > 0
    losses = objective(model, batch, torch.Generator())
    expected = [math.log1p(math.exp(-0.5 * float(gain))) for gain in gain_P]
    assert math.isclose(float(losses["preference"][0].detach()), sum(expected), rel_tol=1e-3)
    assert int(losses["metric/ranked"][0]) == int((gain_P > 0).sum())


def test_a_model_draws_is_judged_and_learns(
    tiny_folder: Path, judged: Path, emoji_font: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from data_tools import judge_pictures
    from unigen.evaluation.detector import ASSET

    drawn = judged.with_name("drawn.jsonl")
    line = ["judge_pictures", str(tiny_folder), str(drawn), "--detector", str(ASSET), "--prompts", "10"]
    monkeypatch.setattr(sys, "argv", [*line, "--images", "2", "--batch", "4", "--dtype", "float32"])
    assert judge_pictures.main() == 0
    groups = [json.loads(text) for text in drawn.read_text().splitlines()]
    assert 8 <= len(groups) <= 12 and all(len(g["right"]) == len(g["codes"]) == 2 for g in groups)
    monkeypatch.setattr(sys, "argv", [*line, "--images", "1"])
    assert judge_pictures.main() == 2

    shared = ["train", "recipes/tiny.py", "batch_size=1", "length=512", "workers=0", "precision=fp32", "sample_every=0"]
    shared += ["steps=2", "time_limit=none", f"run_dir={judged.parent / 'run'}", f"preferences.judged={judged}"]
    assert main([*shared, f"init_from={tiny_folder}"]) == 0
    assert "3 pairs of pictures" in capsys.readouterr().out
    assert main([*shared, "init_from=none"]) == 2
    assert "say whose by init_from" in capsys.readouterr().err
