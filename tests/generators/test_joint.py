"""A text and a picture at once: each to the other, both from nothing, by one sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unigen.cli import main
from unigen.engine import Engine
from unigen.generators.joint import WHOLE, Joint
from unigen.generators.masked import MaskedState
from unigen.models import load
from unigen.sequence import Document, Segment, pack, to_pixels
from unigen.training.objectives import Mixture

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 2, 2, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
TEXTS = ("a red dog", "two apples on a blue background")


@pytest.fixture(scope="module")
def learnt(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen two texts and their pictures."""
    model = load(tiny_folder).train()
    chats = [
        Document([Segment(text=t), Segment(image=p, role="assistant")]) for t, p in zip(TEXTS, PICTURES, strict=True)
    ]
    blind = [model.template.encode(chat, writer="joint", blind=True) for chat in chats]
    seen = [model.template.encode(chat, writer="joint") for chat in chats]
    batch = pack([seen + blind * 2, blind * 3], 320, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    objective, rng = Mixture(model.generators, {"joint": 1.0}), torch.Generator().manual_seed(0)
    for step in range(700):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (700 - step) / 400)
        total, count = objective(model, batch, rng)["joint"]
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("joint") / "model"
    model.eval().save(folder)
    return folder


def codes(engine: Engine, picture: Any) -> list[list[int]]:
    found: list[list[int]] = engine.model.codes(to_pixels([np.asarray(picture)], 16))[0].tolist()
    return found


def written(engine: Engine, **given: Any) -> tuple[str, list[list[int]]]:
    """The text of a pair and the codes of its picture."""
    kept: list[Any] = []
    generator = engine.model.generators["joint"]
    pictures = generator.pictures
    generator.pictures = lambda model, states: kept.append(pictures(model, states)) or kept[-1]  # type: ignore[method-assign]
    try:
        said, _ = engine.pair(**given)
    finally:
        del generator.pictures  # type: ignore[attr-defined]
    return said, kept[-1][0].tolist()


def test_each_is_written_to_the_other_and_both_from_nothing(learnt: Path) -> None:
    engine = Engine(load(learnt))
    wanted = [(text, codes(engine, picture)) for text, picture in zip(TEXTS, PICTURES, strict=True)]
    for pair, text, picture in zip(wanted, TEXTS, PICTURES, strict=True):
        assert written(engine, text=text, guidance=1.0) == pair
        assert written(engine, image=picture, guidance=1.0, steps=32) == pair
        request = engine.request(text, "image", generator="joint", guidance=2.0)
        list(engine.run([request]))
        assert request.document.segments[-1].image.tolist() == pair[1]  # type: ignore[union-attr]
    drawn = [written(engine, seed=seed, guidance=1.0, steps=32) for seed in range(12)]
    assert all(pair in drawn for pair in wanted)  # both are drawn, and mostly whole
    assert sum(pair in wanted for pair in drawn) >= 6


def test_what_is_given_stays_whatever_the_model_says(engine: Engine) -> None:
    said, found = written(engine, text=TEXTS[0], temperature=1.5)
    assert said == TEXTS[0] and len(found) == 2
    said, found = written(engine, image=PICTURES[0])
    assert found == codes(engine, PICTURES[0])
    long = "a red dog and two apples on a blue background " * 3  # cut to the positions there are
    words = engine.model.template.text_ids(long)[:32]  # type: ignore[attr-defined]
    assert written(engine, text=long)[0] == engine.model.template.decode(words) and len(words) == 32
    said = [written(engine, temperature=1.5, seed=seed)[0] for seed in range(3)]
    assert all(said)
    generator: Any = engine.model.generators["joint"]
    request = engine.request(Document([Segment(text="")]), "pair", generator="joint", temperature=1.5)
    kept: list[Any] = []
    generator.pictures = lambda model, states: kept.extend(states) or type(generator).pictures(generator, model, states)
    try:
        list(engine.run([request]))
    finally:
        del generator.pictures
    assert len(kept[0].text) == 32 and not set(kept[0].text) & set(generator.specials)
    pairs = engine.pair(TEXTS[1], n=3)
    assert [type(part) for part in pairs[2]] == [str, Image.Image] and pairs[0][0] == TEXTS[1] and len(pairs) == 3
    with pytest.raises(ValueError, match="the text is empty"):
        engine.pair(" ")


def test_the_blind_branch_reads_no_words(engine: Engine) -> None:
    model = engine.model
    generator = model.generators["joint"]
    assert engine.outputs[-1] == "pair" and generator.specials  # type: ignore[attr-defined]
    request = engine.request(TEXTS[0], "image", generator="joint")
    row = engine.running().row(request)
    assert row.state is not None and isinstance(row.state, MaskedState)
    read = generator.ask(row.state)
    words = generator.text_length  # type: ignore[attr-defined]
    assert read.blind is not None and len(read.blind) == len(read.ids) == 1 + words + 4
    assert read.ids[1 : 1 + words] == model.template.opening_text(request.document, "joint")
    assert set(read.blind[1 : 1 + words]) == {generator.mask}  # type: ignore[attr-defined]
    pictures = [engine.generate(text, generator="joint", guidance=0.0, seed=5, temperature=1.5) for text in TEXTS]
    assert np.array_equal(*map(np.asarray, pictures))


def test_parts_are_masked_by_shares_of_their_own() -> None:
    ratios = Joint((2, 2), 0).ratios(4000, torch.Generator().manual_seed(0))
    assert ratios.shape == (4000, 2) and bool((ratios.amax(1) > 0).all())
    for column in ratios.T:
        assert abs(float((column == 1).float().mean()) - WHOLE) < 0.03
    assert abs(float((ratios[:, 0] == 0).float().mean()) - WHOLE) < 0.03
    inner = ratios[((ratios > 0) & (ratios < 1)).all(1)]
    assert abs(float(torch.corrcoef(inner.T)[0, 1])) < 0.1


def test_on_the_command_line(learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "given.png"
    Image.fromarray(PICTURES[0]).save(picture)
    model = ["--model", str(learnt), "--guidance", "1", "--steps", "32"]
    assert main(["pair", "--image", str(picture), *model]) == 0
    assert capsys.readouterr().out == TEXTS[0] + "\n"
    out = tmp_path / "pair.png"
    assert main(["pair", "-o", str(out), "--temperature", "0.3", *model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] in TEXTS and lines[1] == str(out) and out.exists()
    assert main(["pair", "a dog", "--image", str(picture), *model]) == 2
    assert "the picture is there" in capsys.readouterr().err
    assert main(["pair", "a dog", "--generator", "masked", *model]) == 2
    assert "need a generator that writes both (joint)" in capsys.readouterr().err
