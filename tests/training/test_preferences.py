"""Preferences among pictures: the pairs of a judged file, DPO's loss by hand, and a recipe that learns them."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unigen.cli import main
from unigen.data.packing import Collate
from unigen.engine import Engine
from unigen.models import load
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


def line(prompt: Any, codes: Any = (((1, 2), (3, 4)), ((5, 6), (7, 8))), right: Any = (True, False)) -> str:
    return json.dumps({"prompt": prompt, "codes": codes, "right": right}) + "\n"


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """Four pictures of 2x2 codes for each prompt; the first code says which."""
    lines = [
        line(prompt, [[[4 * n + k, 1], [2, 3]] for k in range(4)], right) for n, (prompt, right) in enumerate(GROUPS)
    ]
    (tmp_path / "judged.jsonl").write_text("".join(lines))
    return tmp_path / "judged.jsonl"


def test_pairs_hold_a_right_and_a_wrong_picture_of_one_prompt(judged: Path) -> None:
    pairs = read_pairs(judged, 0, (2, 2), 32)
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
        (line("a", right=[True, True]), "no prompt with a right and a wrong"),
        (line("a", codes=[[[1]], [[2]]]), r"of \(1, 1\) codes, not \(2, 2\)"),
        (line("a", codes=[[[1, 2], [3, 32]], [[1, 2], [3, 4]]]), "beyond the 32 there are"),
        (line("a", codes=[[[1, 2], [3, -1]], [[1, 2], [3, 4]]]), "beyond the 32 there are"),
        (line("a", codes=[[[0.5, 2], [3, 1]], [[1, 2], [3, 4]]]), "of other numbers"),
        (line("a", right=[0.2, 0.9]), "each picture right or not"),
        (line("a", right=[True]), "does not hold judged pictures"),
        (line(7), "a prompt is text"),
    ],
)
def test_files_that_cannot_be_learnt_from_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "f").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "f", 0, (2, 2), 32)


def compared(engine: Engine, judged: Path) -> Compared:
    template = engine.model.template
    replay = [template.encode(Document([Segment(text="a dog"), Segment(text="a horse", role="assistant")]))]
    rows = ComparedRows([replay] * 9, read_pairs(judged, 0, (2, 2), 32), template.encode, 128, rows=2)
    assert [len(row) for row in rows[0][1]] == [2 * rows.fit] * 2
    for row in rows[0][1]:
        for k, tokens in enumerate(row):  # chosen, rejected, chosen, ..
            group, which = divmod(int(tokens.images[0][0, 0]), 4)
            assert GROUPS[group][1][which] == (k % 2 == 0)
    assert [t.ids for t in rows[0][1][0]] != [t.ids for t in rows[0][1][1]]
    return CollateCompared(Collate(128, 16), 128, 16)([rows[0], rows[1]])


def test_the_likelihood_of_a_picture_is_that_of_its_document_alone(engine: Engine, judged: Path) -> None:
    model, batch = engine.model, compared(engine, judged)
    together_P2 = log_likelihood(model, model.fill(batch.pairs))
    rows = ComparedRows([[]] * 9, read_pairs(judged, 0, (2, 2), 32), model.template.encode, 128, rows=2)
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
    assert math.isclose(float(total.detach()) / count, math.log(2), rel_tol=1e-5) and losses["metric/accuracy"][0] == 0
    assert not any(p.requires_grad for p in objective.reference.parameters())
    counts: dict[str, Any] = objective.counts(batch, torch.Generator())
    assert {k: int(n) for k, (_, n) in losses.items()} == {k: int(n) for k, n in counts.items()}

    before_P2 = log_likelihood(model, model.fill(batch.pairs)).detach()
    torch.testing.assert_close(losses["chosen"][0].detach(), -before_P2[:, 0].sum())
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
    assert int(losses["metric/accuracy"][0]) == int((gain_P > 0).sum())


def test_a_model_draws_is_judged_and_learns(
    tiny_folder: Path, judged: Path, emoji_font: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from data_tools import judge_pictures
    from unigen.evaluation.detector import ASSET
    from unigen.evaluation.tasks.scenes import ScenesTask

    def by_brightness(self: ScenesTask, items: Any, pictures: Any) -> list[dict[str, float]]:
        return [{"strict": float(np.asarray(picture).mean() > level)} for picture in pictures]

    model = load(tiny_folder)
    level = np.mean([np.asarray(picture).mean() for picture in model.pictures(torch.arange(32).reshape(8, 2, 2))])
    monkeypatch.setattr(ScenesTask, "score_batch", by_brightness)
    drawn = judged.with_name("drawn.jsonl")
    command = ["judge_pictures", str(tiny_folder), str(drawn), "--detector", str(ASSET), "--prompts", "10"]
    monkeypatch.setattr(sys, "argv", [*command, "--images", "2", "--batch", "4", "--dtype", "float32"])
    assert judge_pictures.main() == 0
    groups = [json.loads(text) for text in drawn.read_text().splitlines()]
    assert 8 <= len(groups) <= 12 and any(any(g["right"]) for g in groups) and not all(all(g["right"]) for g in groups)
    for group in groups:
        bright = [np.asarray(picture).mean() > level for picture in model.pictures(torch.tensor(group["codes"]))]
        assert group["right"] == bright and len(bright) == 2
    monkeypatch.setattr(sys, "argv", [*command, "--images", "1"])
    assert judge_pictures.main() == 2

    shared = ["train", "recipes/tiny.py", "batch_size=1", "length=512", "workers=0", "precision=fp32", "steps=2"]
    shared += ["time_limit=none", "sample_every=0", "log_every=1", f"run_dir={judged.parent / 'run'}"]
    shared += [f"preferences.judged={judged}"]
    assert main([*shared, f"init_from={tiny_folder}"]) == 0
    printed = capsys.readouterr().out
    assert "3 pairs of pictures" in printed and "preference 0." in printed and "accuracy" in printed
    assert main([*shared, "init_from=none"]) == 2
    assert "say whose by init_from" in capsys.readouterr().err
