"""A text and a picture at once: each to the other, both from nothing, by one sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unigen.batch import pack
from unigen.commands.main import main
from unigen.document import Document, Segment
from unigen.generators.joint import FULL_MASK_PROB, Joint
from unigen.generators.masked import MaskedState
from unigen.inference.engine import Engine
from unigen.media.pixels import to_pixels
from unigen.models import load
from unigen.training.objectives import MultiGeneratorLoss

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 2, 2, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
TEXTS = ("a red dog", "two apples on a blue background")
SHORT = ("red", "two")
"""Of few pieces, so that they are learnt in seconds."""
STEPS = 250


@pytest.fixture(scope="module")
def trained_toy(tiny_folder: Path) -> Engine:
    """A model that has seen two texts of six positions and their pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Joint, "text_length", 6)
        model, rng = load(tiny_folder).train(), torch.Generator().manual_seed(0)
    model.generators["joint"].text_length = 6  # type: ignore[attr-defined]
    learns = [p for p in model.parameters() if p.requires_grad]
    for p in learns:
        if p.ndim > 1:
            p.data.normal_(0, 0.2, generator=rng)
    chats = [
        Document([Segment(text=t), Segment(image=p, role="assistant")]) for t, p in zip(SHORT, PICTURES, strict=True)
    ]
    seen = [model.template.encode(chat, generator="joint") for chat in chats]
    batch = pack([[*seen, model.template.encode(chat, generator="joint", uncond=True)] for chat in chats], 64, 16)
    optimizer = torch.optim.AdamW(learns, lr=5e-3, betas=(0.9, 0.95))
    objective = MultiGeneratorLoss(model.generators, {"joint": 1.0})
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (STEPS - step) / STEPS)
        total, count = objective(model, batch, rng)["joint"]
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return Engine(model.eval())


def codes(engine: Engine, picture: Any) -> list[list[int]]:
    found: list[list[int]] = engine.model.encode_images(to_pixels([np.asarray(picture)], 16))[0].tolist()
    return found


def generate_pair(engine: Engine, **given: Any) -> tuple[str, list[list[int]]]:
    """The text of a pair and the codes of its picture."""
    kept: list[Any] = []
    generator = engine.model.generators["joint"]
    pictures = generator.decode
    generator.decode = lambda model, states: kept.append(pictures(model, states)) or kept[-1]  # type: ignore[method-assign]
    try:
        said, _ = engine.generate_joint(**given)
    finally:
        del generator.decode  # type: ignore[attr-defined]
    return said, kept[-1][0].tolist()


def test_each_is_written_to_the_other_and_both_from_nothing(trained_toy: Engine) -> None:
    """What training guarantees on any processor: what is likeliest is right, and most of what is drawn."""
    wanted = [(text, codes(trained_toy, picture)) for text, picture in zip(SHORT, PICTURES, strict=True)]
    for pair, text, picture in zip(wanted, SHORT, PICTURES, strict=True):
        assert generate_pair(trained_toy, text=text, guidance=1.0, temperature=0.0) == pair
        assert generate_pair(trained_toy, image=picture, guidance=1.0, steps=10) == pair
        request = trained_toy.build_request(text, "image", generator="joint", guidance=2.0, temperature=0.0)
        list(trained_toy.run_requests([request]))
        assert request.document.segments[-1].image.tolist() == pair[1]  # type: ignore[union-attr]
    drawn = [generate_pair(trained_toy, seed=seed, guidance=1.0, steps=10) for seed in range(12)]
    crossed = [(wanted[0][0], wanted[1][1]), (wanted[1][0], wanted[0][1])]
    assert sum(pair in wanted for pair in drawn) >= 5
    assert sum(pair in crossed for pair in drawn) <= 2


def test_what_is_given_stays_whatever_the_model_says(engine: Engine) -> None:
    said, found = generate_pair(engine, text=TEXTS[0], temperature=1.5)
    assert said == TEXTS[0] and len(found) == 2
    said, found = generate_pair(engine, image=PICTURES[0])
    assert found == codes(engine, PICTURES[0])
    long = "a red dog and two apples on a blue background " * 3  # cut to the positions there are
    words = engine.model.template.text_ids(long)[:32]  # type: ignore[attr-defined]
    assert generate_pair(engine, text=long)[0] == engine.model.template.decode(words) and len(words) == 32
    said = [generate_pair(engine, temperature=1.5, seed=seed)[0] for seed in range(3)]
    assert all(said)
    generator: Any = engine.model.generators["joint"]
    request = engine.build_request(Document([Segment(text="")]), "joint", generator="joint", temperature=1.5)
    kept: list[Any] = []
    generator.decode = lambda model, states: kept.extend(states) or type(generator).decode(generator, model, states)
    try:
        list(engine.run_requests([request]))
    finally:
        del generator.decode
    assert len(kept[0].text_ids) == 32 and not set(kept[0].text_ids) & set(generator.special_ids)
    pairs = engine.generate_joint(TEXTS[1], n=3)
    assert [type(part) for part in pairs[2]] == [str, Image.Image] and pairs[0][0] == TEXTS[1] and len(pairs) == 3
    with pytest.raises(ValueError, match="the text is empty"):
        engine.generate_joint(" ")
    with pytest.raises(ValueError, match="the output 'pair' is called 'joint' now"):
        engine.generate("a dog", "pair")


def test_the_blind_branch_reads_no_words(engine: Engine) -> None:
    model = engine.model
    generator = model.generators["joint"]
    assert engine.outputs[-1] == "joint" and generator.special_ids  # type: ignore[attr-defined]
    request = engine.build_request(TEXTS[0], "image", generator="joint")
    row = engine.new_scheduler().new_sequence(request)
    assert row.state is not None and isinstance(row.state, MaskedState)
    read = generator.prepare_step(row.state)
    words = generator.text_length  # type: ignore[attr-defined]
    assert read.uncond_ids is not None and len(read.uncond_ids) == len(read.ids) == 1 + words + 4
    assert read.ids[1 : 1 + words] == model.template.prefix_text_ids(request.document, "joint")
    assert set(read.uncond_ids[1 : 1 + words]) == {generator.mask_id}  # type: ignore[attr-defined]
    pictures = [engine.generate(text, generator="joint", guidance=0.0, seed=5, temperature=1.5) for text in TEXTS]
    assert np.array_equal(*map(np.asarray, pictures))


def test_parts_are_masked_by_shares_of_their_own() -> None:
    ratios = Joint((2, 2), 0).mask_ratios(4000, torch.Generator().manual_seed(0))
    assert ratios.shape == (4000, 2) and bool((ratios.amax(1) > 0).all())
    for column in ratios.T:
        assert abs(float((column == 1).float().mean()) - FULL_MASK_PROB) < 0.03
    assert abs(float((ratios[:, 0] == 0).float().mean()) - FULL_MASK_PROB) < 0.03
    inner = ratios[((ratios > 0) & (ratios < 1)).all(1)]
    assert abs(float(torch.corrcoef(inner.T)[0, 1])) < 0.1


def test_on_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "given.png"
    Image.fromarray(PICTURES[0]).save(picture)
    engine, model = Engine(load(tiny_folder)), ["--model", str(tiny_folder)]
    assert main(["joint", "--image", str(picture), *model]) == 0
    assert capsys.readouterr().out == engine.generate_joint(image=PICTURES[0])[0] + "\n"
    out = tmp_path / "pair.png"
    assert main(["joint", "-o", str(out), *model]) == 0
    text, image = engine.generate_joint()
    assert capsys.readouterr().out.splitlines() == [*text.splitlines(), str(out)]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(image))
    assert main(["joint", "a dog", "--image", str(picture), *model]) == 2
    assert "the picture is there" in capsys.readouterr().err
    assert main(["pair", "a dog", *model]) == 2
    assert "the command pair is called joint now" in capsys.readouterr().err
    assert main(["joint", "a dog", "--generator", "masked", *model]) == 2
    assert "need a generator of both (joint)" in capsys.readouterr().err
