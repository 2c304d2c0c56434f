"""Preferences among answers: the pairs of a judged file, DPO's loss by hand, and a recipe that learns them."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unigen.batch import Tokens, pack
from unigen.commands.main import main
from unigen.data.packing import PackCollator
from unigen.document import Document, Segment
from unigen.generators import generator_names, next_scale
from unigen.inference.engine import Engine
from unigen.inference.scoring import log_likelihood
from unigen.models import load
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import sample_shared_rng
from unigen.training.objectives import MultiGeneratorLoss
from unigen.training.preferences import (
    DPOObjective,
    PreferenceBatch,
    PreferenceCollator,
    PreferenceConfig,
    PreferenceDataset,
    PreferencePair,
    read_pairs,
)

PROMPT_GROUPS = (
    ("a dog", [True, False, False, True]),
    ("two red apples", [True, True, True, False]),
    ("a horse", [True, True, True, True]),
)
SHOWN = ("describe this picture", ["a dog", "a fish"], [True, False])
CODES = (((1, 2), (3, 4)), ((5, 6), (7, 8)))


def judged_line(prompt: Any, answers: Any, right: Any = (True, False), role: str = "assistant") -> str:
    """Answers are texts, or codes of pictures."""
    said = [{"role": role} | ({"text": a} if isinstance(a, str) else {"image": {"codes": a}}) for a in answers]
    return json.dumps({"prompt": {"segments": prompt}, "answers": said, "right": right}) + "\n"


def user_prompt(text: str, codes: Any = None) -> list[dict[str, Any]]:
    shown = [] if codes is None else [{"role": "user", "image": {"codes": codes}}]
    return [*shown, {"role": "user", "text": text}]


@pytest.fixture
def judged_file(tmp_path: Path) -> Path:
    """Four pictures of 2x2 codes for each prompt, the first code says which; and a picture with two captions."""
    lines = [
        judged_line(user_prompt(prompt), [[[4 * n + k, 1], [2, 3]] for k in range(4)], right)
        for n, (prompt, right) in enumerate(PROMPT_GROUPS)
    ]
    question, texts, right = SHOWN
    lines.append(judged_line(user_prompt(question, CODES[0]), texts, right))
    (tmp_path / "judged.jsonl").write_text("".join(lines))
    return tmp_path / "judged.jsonl"


def is_right(document: Document) -> bool:
    answer = document.segments[-1]
    if answer.text is not None:
        return SHOWN[2][SHOWN[1].index(answer.text)]
    assert isinstance(answer.image, torch.Tensor)
    group, which = divmod(int(answer.image[0, 0]), 4)
    return PROMPT_GROUPS[group][1][which]


def test_pairs_hold_a_right_and_a_wrong_answer_to_one_prompt(judged_file: Path) -> None:
    pairs = read_pairs([judged_file], 0, (2, 2), 32)
    prompts = [[chat.to_json()["segments"][:-1] for chat in pair[:2]] for pair in pairs]
    assert all(a == b for a, b in prompts)
    texts = sorted(a[-1]["text"] for a, _ in prompts)
    assert texts == ["a dog", "a dog", "describe this picture", "two red apples"]
    assert all(is_right(chosen) and not is_right(rejected) for chosen, rejected, _ in pairs)
    answers = [str(chat.to_json()["segments"][-1]) for pair in pairs for chat in pair[:2]]
    assert len(set(answers)) == len(answers) == 8
    assert len(read_pairs([judged_file, judged_file], 0, (2, 2), 32)) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ('{"prompt": "a dog"}\n', "line 1 of .* does not hold judged answers"),
        ('{"prompt": {"segments": []}}\n', "line 1 of .* does not hold judged answers"),
        ("[]\n", "line 1 of .* does not hold judged answers"),
        ("nothing\n", "line 1 of .* does not hold judged answers"),
        (judged_line(user_prompt("a"), CODES, [True, True]), "no prompt with a right and a wrong"),
        (judged_line(user_prompt("a"), [[[1]], [[2]]]), "not 2 x 2 codes"),
        (judged_line(user_prompt("a", [[1]]), ["b", "c"]), "not 2 x 2 codes"),
        (judged_line(user_prompt("a"), [[[1, 2], [3, 32]], [[1, 2], [3, 4]]]), "beyond the 32 there are"),
        (judged_line(user_prompt("a"), [[[1, 2], [3, -1]], [[1, 2], [3, 4]]]), "beyond the 32 there are"),
        (judged_line(user_prompt("a"), CODES, [0.2, 0.9]), "each answer is right or not"),
        (judged_line(user_prompt("a"), CODES, [True]), "each answer is right or not"),
        (judged_line(user_prompt("a"), CODES, role="user"), "the assistant answers"),
    ],
)
def test_files_that_cannot_be_learnt_from_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "f").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs([tmp_path / "f"], 0, (2, 2), 32)


def preference_batch(engine: Engine, judged: Path) -> PreferenceBatch:
    template = engine.model.template
    replay = [template.encode(Document([Segment(text="a dog"), Segment(text="a horse", role="assistant")]))]
    pairs = read_pairs([judged], 0, (2, 2), 32)
    longest = max(len(template.encode(chat)) for pair in pairs for chat in pair[:2])
    rows = PreferenceDataset([replay] * 9, pairs, template.encode, 2 * longest, rows=1)
    (of_codes,) = rows.pair_rows
    assert len(of_codes) == 2 and sum(map(len, of_codes)) == 4
    laid = [side.ids for row in of_codes for sides in row for side in sides[:2]]
    assert laid == [template.encode(chat).ids for pair in pairs for chat in pair[:2]]
    assert rows[0][1] == rows[2][1] == [of_codes[:1]] and rows[1][1] == [of_codes[1:]]
    with pytest.raises(ValueError, match="exceeds a row of"):
        PreferenceDataset([replay], pairs, template.encode, longest - 1, rows=1)
    return PreferenceCollator(PackCollator(128, 16), 2 * longest, 16)([rows[0], rows[1]])


def likelihoods(
    model: Any, batch: PreferenceBatch, guidance: Guidance | None = None, temperature: float = 0.8, kind: int = 0
) -> torch.Tensor:
    """log p of chosen and rejected answers (P, 2), as Preferences asks for them."""
    pairs, found = batch.pairs_by_kind[kind], []
    for side, uncond in ((pairs.chosen, pairs.uncond_chosen), (pairs.rejected, pairs.uncond_rejected)):
        rng = torch.Generator().manual_seed(1)
        drawn = (
            model.insert_image_ids(side),
            model.insert_image_ids(uncond),
            guidance or Guidance((3.0,)),
            temperature,
            rng,
        )
        found.append(log_likelihood(model, *drawn))
    return torch.stack(found, -1)


@pytest.mark.parametrize(("scale", "temperature"), [(3.0, 0.8), (1.0, 1.0)])
def test_the_likelihood_of_an_answer_is_that_by_which_the_engine_draws_it(
    engine: Engine, judged_file: Path, scale: float, temperature: float
) -> None:
    """A picture's codes one by one from its own prompt and the unconditional one; a text's ids, its end among them."""
    model, batch = engine.model, preference_batch(engine, judged_file)
    template, first = model.template, model.vocabulary.text_size
    together_D = likelihoods(model, batch, Guidance.from_value(scale), temperature).detach().flatten()

    def logits_after(ids: list[int]) -> torch.Tensor:
        alone = pack([[Tokens(ids, [False] * len(ids))]], len(ids), 16)
        return model.logits(model.hidden_states(alone)[0, -1])

    expected = []
    for pair in read_pairs([judged_file], 0, (2, 2), 32):
        for chat in pair[:2]:
            before, answer = Document(chat.segments[:-1]), chat.segments[-1]
            prompt = model.token_ids(template.prompt(before))
            if answer.text is not None:
                said = model.token_ids(template.encode(chat))[len(prompt) :]
                assert said[-1] == template.eos_id
                steps = [logits_after(prompt + said[:k]).log_softmax(-1)[id] for k, id in enumerate(said)]
            else:
                unseen, begin = model.token_ids(template.prompt(before, branch=True)), template.begin_ids["next-token"]
                codes = model.vocabulary.image_ids(answer.image).flatten().tolist()
                steps = [logits_after(prompt).log_softmax(-1)[begin]]
                for k, code in enumerate(codes):
                    c, u = (logits_after([*ids, begin, *codes[:k]])[first:] for ids in (prompt, unseen))
                    steps.append(((u + scale * (c - u)) / temperature).log_softmax(-1)[code - first])
                whole = model.token_ids(template.encode(chat))
                assert whole[-2:] == [template.image_end_id, template.eos_id]  # the end of a picture is no choice
                steps.append(logits_after(whole[:-1]).log_softmax(-1)[template.eos_id])
            expected.append(torch.stack(steps).sum())
    torch.testing.assert_close(together_D, torch.stack(expected), rtol=1e-4, atol=1e-3)


def test_the_loss_is_dpo(engine: Engine, judged_file: Path) -> None:
    """log 2 where nothing has been learnt; else equation 7 in numbers; its step makes the chosen likelier."""
    model, batch = copy.deepcopy(engine.model), preference_batch(engine, judged_file)
    objective = DPOObjective(MultiGeneratorLoss(model.generators), copy.deepcopy(model), PreferenceConfig(beta=0.5))
    losses = objective(model, batch, torch.Generator())
    total, count = losses["preference"]
    assert math.isclose(float(total.detach()) / count, math.log(2), rel_tol=1e-5) and losses["metric/accuracy"][0] == 0
    assert not any(p.requires_grad for p in objective.reference.parameters())
    counts: dict[str, Any] = objective.counts(batch, torch.Generator())
    assert {k: int(n) for k, (_, n) in losses.items()} == {k: int(n) for k, n in counts.items()}

    before_P2 = likelihoods(model, batch).detach()
    torch.testing.assert_close(losses["chosen"][0], -before_P2[:, 0].sum())
    (total / count).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad
    after_P2 = likelihoods(model, batch).detach()
    gain_P = ((after_P2 - before_P2) * torch.tensor([1.0, -1.0])).sum(-1)
    assert gain_P.mean() > 0
    losses = objective(model, batch, torch.Generator())
    expected = [math.log1p(math.exp(-0.5 * float(gain))) for gain in gain_P]
    assert math.isclose(float(losses["preference"][0].detach()), sum(expected), rel_tol=1e-3)
    assert int(losses["metric/accuracy"][0]) == int((gain_P > 0).sum())


@pytest.mark.parametrize("writer", [name for name in generator_names() if name != "next-token"])
def test_pictures_of_any_generator_are_compared(engine: Engine, writer: str) -> None:
    """By its own loss, under one draw of masks, noise and times: log 2 where nothing has been learnt, and a step makes
    the chosen likelier and the rejected less so."""
    model = copy.deepcopy(engine.model)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    right, wrong = (Document([Segment(text="a dog"), Segment(image=p, role="assistant")]) for p in pictures)
    told = [Document([Segment(text="a dog"), Segment(text=t, role="assistant")]) for t in ("a horse", "a story")]
    encode = model.template.encode
    rows = PreferenceDataset(
        [[encode(right)]], [PreferencePair(right, wrong, writer), PreferencePair(told[0], told[1])], encode, 1024, 1
    )
    (texts,), (drawn,) = rows.pair_rows
    assert [side.handlers for sides in (*texts, *drawn) for side in sides[:2]] == [[], [], [writer], [writer]]
    batch = PreferenceCollator(PackCollator(1024, 16), 1024, 16)([rows[0]])
    objective = DPOObjective(MultiGeneratorLoss(model.generators), copy.deepcopy(model), PreferenceConfig())
    total, count = objective(model, batch, torch.Generator().manual_seed(0))["preference"]
    assert count == 2 and math.isclose(float(total.detach()) / 2, math.log(2), rel_tol=1e-5)
    (sides,) = drawn
    ends = (
        pack([[side]], len(side), 16) for side in (sides.chosen, sides.uncond_chosen)
    )  # no positions: it ends a row
    guided = (*map(model.insert_image_ids, ends), Guidance((3.0,)), 0.8)
    found = log_likelihood(model, *guided, rng=torch.Generator().manual_seed(1)).detach()

    def pictures() -> torch.Tensor:
        return likelihoods(model, batch, kind=1)[0]

    torch.testing.assert_close(pictures().detach()[:1], found, rtol=1e-4, atol=1e-3)
    for _ in range(3):
        with torch.no_grad():
            before_2 = pictures()
        (gap := pictures()).backward(torch.tensor([1.0, -1.0]))
        torch.testing.assert_close(gap.detach(), before_2)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p += 1e-3 * p.grad / (1e-8 + p.grad.norm())
                    p.grad = None
    first, last = before_2, pictures().detach()
    assert last[0] - first[0] > last[1] - first[1]
    objective_after = objective(model, batch, torch.Generator().manual_seed(1))
    assert float(objective_after["preference"][0].detach()) < 2 * math.log(2)


@pytest.mark.parametrize("writer", [name for name in generator_names() if name != "next-token"])
def test_both_answers_of_a_pair_are_asked_the_same(engine: Engine, writer: str) -> None:
    """One and the same picture, right and wrong, has one likelihood: masks, noise and times are the pair's."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    chat = Document([Segment(text="a dog"), Segment(image=picture, role="assistant")])
    rows = PreferenceDataset([[]], [PreferencePair(chat, chat, writer)] * 3, engine.model.template.encode, 1024, 1)
    batch = PreferenceCollator(lambda _: pack([[]], 1024, 16), 1024, 16)([rows[0]])
    found_P2 = likelihoods(engine.model, batch).detach()
    torch.testing.assert_close(found_P2[:, 0], found_P2[:, 1])
    if engine.model.generators[writer].name in ("masked", "flow"):
        assert len(set(found_P2[:, 0].tolist())) > 1  # while pairs have their own
    objective = DPOObjective(
        MultiGeneratorLoss(engine.model.generators), copy.deepcopy(engine.model), PreferenceConfig()
    )
    other = copy.deepcopy(engine.model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    _, margin_P = objective._likelihoods(other, batch.pairs_by_kind[0], torch.Generator().manual_seed(0))
    torch.testing.assert_close(margin_P.detach(), torch.zeros(3))
    ids = objective._counts(batch)["chosen"]
    assert int(ids) >= 3 * 4  # of 2x2 codes, whatever the picture's positions are


def test_next_scale_is_as_likely_as_its_codes(engine: Engine) -> None:
    """- log p is the sum over all scales' codes; what stands beside the picture in the row does not matter."""
    model, encode = engine.model, engine.model.template.encode
    pictures = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    chats = [Document([Segment(text="a dog"), Segment(image=p, role="assistant")]) for p in pictures]
    together = pack([[encode(chat, generator="next-scale") for chat in chats]], 64, 16)
    found_2 = log_likelihood(model, together, rng=torch.Generator())
    head: Any = model.heads["next-scale"]
    for chat, found in zip(chats, found_2, strict=True):
        alone = pack([[encode(chat, generator="next-scale")]], 32, 16)
        spans, targets = head.prepare(model, alone, torch.Generator())
        states_LD = model.hidden_states(alone, spans)[0]
        begin = int(alone.spans_N3[0, 1]) - 1
        scores = head.head(states_LD[begin : begin + 5]).log_softmax(-1)
        opened = model.logits(states_LD[begin - 1]).log_softmax(-1)[alone.ids_BL[0, begin]]
        expected = opened + scores.gather(-1, targets[2][0][:, None]).sum()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("scale", "temperature"), [(3.0, 0.8), (1.0, 0.5)])
def test_next_scale_is_as_likely_as_it_is_drawn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, scale: float, temperature: float
) -> None:
    """By the codes that it wrote, not those that its tokenizer has for the picture: under guidance that grows."""
    model, template, drawn = engine.model, engine.model.template, []

    def draw(logits_NV: torch.Tensor, sampling: Any, rng: torch.Generator) -> torch.Tensor:
        codes_N = sample_shared_rng(logits_NV, sampling, rng)
        drawn.append((logits_NV / temperature).log_softmax(-1).gather(-1, codes_N[:, None]).sum())
        return codes_N

    monkeypatch.setattr(next_scale, "sample_shared_rng", draw)
    options = {"guidance": scale, "temperature": temperature, "top_k": 0, "top_p": 1.0, "generator": "next-scale"}
    requests = [engine.build_request("a dog", "image", seed=seed, **options) for seed in range(2)]
    for request in requests:
        list(engine.run_requests([request]))
    chats = [Document.of(["a dog", Segment(image=r.native_codes[0], role="assistant")]) for r in requests]
    sides = [
        pack([[template.encode(chat, uncond=uncond, generator="next-scale") for chat in chats]], 64, 16)
        for uncond in (False, True)
    ]
    rng, scales = torch.Generator(), len(model.heads["next-scale"].lengths)
    found_2 = log_likelihood(model, *sides, Guidance.from_value(scale), temperature, rng)
    expected_2 = torch.stack(drawn).view(2, scales).sum(1)
    asked = pack([[template.prompt(Document.of("a dog"))]], 32, 16)
    states_LD = model.hidden_states(asked)[0]
    opened = model.logits(states_LD[int(asked.segments_BL.sum()) - 1]).log_softmax(-1)[template.begin_ids["next-scale"]]
    torch.testing.assert_close(found_2, opened + expected_2, rtol=1e-4, atol=1e-3)
    otherwise_2 = log_likelihood(model, *sides, Guidance.from_value(1.5), temperature, rng)
    assert (otherwise_2 - found_2).abs().min() > 0.1


def test_codes_of_next_scale_are_checked_and_compared(engine: Engine, tmp_path: Path) -> None:
    head: Any = engine.model.heads["next-scale"]
    length, size = head.code_shape
    own = {"next-scale": (length, size)}
    for codes, message in (
        ([0] * (length - 1), f"not {length} codes"),
        ([0] * (length - 1) + [size], "beyond the"),
        ([[0, 1], [1, 0]], "several kinds"),
    ):
        text = judged_line(user_prompt("a"), [codes, [1] * length]).replace("{", '{"writer": "next-scale", ', 1)
        (tmp_path / "f").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pairs([tmp_path / "f"], 0, (2, 2), 32, own)
    texts = [
        judged_line(user_prompt("a"), [[0] * length, [1] * length]).replace("{", '{"writer": "next-scale", ', 1),
        judged_line(user_prompt("a"), CODES),
    ]
    (tmp_path / "f").write_text("".join(texts))
    with pytest.raises(ValueError, match="codes of next-scale's own are for comparisons"):
        read_pairs([tmp_path / "f"], 0, (2, 2), 32)
    (tmp_path / "g").write_text(judged_line(user_prompt("a"), CODES).replace("{", '{"writer": "next-scale", ', 1))
    with pytest.raises(ValueError, match="compared by its own codes, or as pixels"):
        read_pairs([tmp_path / "g"], 0, (2, 2), 32, own)
    pairs = read_pairs([tmp_path / "f"], 0, (2, 2), 32, own)
    rows = PreferenceDataset([[]], pairs, engine.model.template.encode, 128, 1)
    assert [sides.chosen.handlers for kind in rows.pair_rows for row in kind for sides in row] == [
        ["next-token"],
        ["next-scale"],
    ]


def test_a_model_draws_is_judged_and_learns(
    tiny_folder: Path, judged_file: Path, emoji_font: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from data_tools import judge_answers
    from unigen.evaluation.detector import DEFAULT_FOLDER
    from unigen.evaluation.tasks.scenes import ScenesTask

    def by_brightness(self: ScenesTask, items: Any, pictures: Any) -> list[dict[str, float]]:
        return [{"strict": float(np.asarray(picture).mean() > level)} for picture in pictures]

    model = load(tiny_folder)
    level = np.mean([np.asarray(picture).mean() for picture in model.decode_images(torch.arange(32).reshape(8, 2, 2))])
    monkeypatch.setattr(ScenesTask, "score_batch", by_brightness)
    drawn = judged_file.with_name("drawn.jsonl")
    command = [
        "judge_answers",
        "pictures",
        str(tiny_folder),
        str(drawn),
        "--detector",
        str(DEFAULT_FOLDER),
        "--prompts",
        "10",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--answers", "2", "--batch", "4", "--dtype", "float32"])
    assert judge_answers.main() == 0
    groups = [json.loads(text) for text in drawn.read_text().splitlines()]
    assert (
        8 <= len(groups) <= 12 and any(any(g["correct"]) for g in groups) and not all(all(g["correct"]) for g in groups)
    )
    for group in groups:
        codes = torch.tensor([answer["image"]["codes"] for answer in group["answers"]])
        bright = [np.asarray(picture).mean() > level for picture in model.decode_images(codes)]
        assert group["correct"] == bright and len(bright) == 2
    monkeypatch.setattr(sys, "argv", [*command, "--answers", "1"])
    assert judge_answers.main() == 2

    said = judged_file.with_name("said.jsonl")
    command = ["judge_answers", "captions", str(tiny_folder), str(said), "--prompts", "3", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--answers", "2", "--dtype", "float32"])
    assert judge_answers.main() == 0
    groups = [json.loads(text) for text in said.read_text().splitlines()]
    assert [group["correct"] for group in groups] == [[True, False, False]] * 3  # the model has learnt no words
    assert len({group["answers"][0]["text"] for group in groups}) == 3
    for refused in (["--seed", "0"], ["--detector", str(DEFAULT_FOLDER)]):
        monkeypatch.setattr(sys, "argv", [*command, *refused])
        assert judge_answers.main() == 2

    shared = ["train", "recipes/tiny.py", "batch_size=1", "seq_len=512", "num_workers=0", "precision=fp32", "steps=2"]
    shared += ["time_limit=none", "sample_every=0", "log_every=1", f"run_dir={judged_file.parent / 'run'}"]
    shared += [f"preferences.answers={judged_file},{said}"]
    assert main([*shared, f"init_from={tiny_folder}"]) == 0
    printed = capsys.readouterr().out
    assert "7 pairs of answers" in printed and "preference 0." in printed and "accuracy" in printed
    assert main([*shared, "init_from=none"]) == 2
    assert "say whose by init_from" in capsys.readouterr().err

    kept = ["train", "recipes/tiny.py", "batch_size=2", "seq_len=512", "num_workers=0", "precision=fp32", "steps=2"]
    kept += [
        "time_limit=none",
        "sample_every=0",
        "log_every=1",
        f"init_from={tiny_folder}",
        f"lwf_teacher={tiny_folder}",
    ]
    kept += [
        "generators.masked=3",
        "mixture.draw=9",
        f"self_distill_files={drawn}",
        f"run_dir={judged_file.parent / 'kept'}",
    ]
    assert main([*kept, "self_distill_share=1"]) == 0
    printed = capsys.readouterr().out
    assert "masked 3." in printed  # nats of one of 32 codes
    assert all(float(nats) < 0.1 for nats in re.findall(r"(?:text|next-token) (\S+)", printed))  # nothing has moved

    def by_lot(self: ScenesTask, items: Any, pictures: Any) -> list[dict[str, float]]:
        return [{"strict": float(k % 2)} for k in range(len(pictures))]

    monkeypatch.setattr(ScenesTask, "score_batch", by_lot)
    looked = judged_file.with_name("looked.jsonl")
    command = [
        "judge_answers",
        "pictures",
        str(tiny_folder),
        str(looked),
        "--detector",
        str(DEFAULT_FOLDER),
        "--prompts",
        "10",
    ]
    command += ["--answers", "4", "--batch", "8", "--dtype", "float32", "--generator"]
    monkeypatch.setattr(sys, "argv", [*command, "flow"])
    assert judge_answers.main() == 0
    assert {"png"} == {k for text in looked.open() for answer in json.loads(text)["answers"] for k in answer["image"]}
    seen = [part for part in shared if not part.startswith(("preferences", "run_dir"))]
    seen += [f"init_from={tiny_folder}", f"run_dir={judged_file.parent / 'seen'}", f"preferences.answers={looked}"]
    assert {json.loads(text)["generator"] for text in looked.open()} == {"flow"}
    assert main([*seen, f"preferences.answers={looked},{said}"]) == 0
    assert "preference 0." in capsys.readouterr().out
    for wrong, message in (
        ("text", "does not draw by text"),
        ("flow --temperature 1", "flow does not take temperature"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *wrong.split()])
        assert judge_answers.main() == 2 and message in capsys.readouterr().err
    other = looked.with_name("other.jsonl")
    other.write_text(looked.read_text().replace('"generator": "flow"', '"generator": "text"'))
    assert main([*seen, f"preferences.answers={other}"]) == 2
    assert "unknown generator 'text'" in capsys.readouterr().err
    for wrong, message in (
        (f"self_distill_files={said}", "self_distill_files hold no right picture"),
        ("self_distill_share=2", "shares from 0 to 1"),
        ("token_corruption=2", "shares from 0 to 1"),
        ("token_corruption=0.2", "token_corruption is for next-scale to correct"),
        (f"preferences.answers={judged_file} token_corruption=0.2", "answers are compared as they were drawn"),
        ("self_distill_share=0", "above 0"),
        ("mixture.draw=-1", "a mixture shares out"),
    ):
        assert main([*kept, *wrong.split(), f"run_dir={judged_file.parent / 'no'}"]) == 2
        assert message in capsys.readouterr().err
