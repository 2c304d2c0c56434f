"""What is LlamaGen's own: classes, words, several models in one place. How its folders behave is in test_public."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from tests.parity import common
from tests.parity import llamagen as case
from tests.parity import llamagen_t2i as words_case
from unigen import cli
from unigen.generators import next_token
from unigen.models import llamagen
from unigen.sequence import Document, Segment, pack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llamagen")
    case.checkpoint(made)
    return made


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llamagen_t2i")
    words_case.checkpoint(made)
    return made


@pytest.mark.parametrize("asked", [["a dog"], ["--class", "10"], ["--class", "dog"]])
def test_what_is_no_class(asked: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    assert cli.main(["generate", *asked, "-o", str(out), "--model", str(folder), "--device", "cpu"]) == 2
    assert "from 0 to 9" in capsys.readouterr().err and not out.exists()


def test_one_of_several(folder: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    shutil.copy(both / "c2i_T_32.pt", both / "c2i_U_32.pt")
    with pytest.raises(ValueError, match=r"c2i_T_32, c2i_U_32: name one after a colon"):
        unigen.load(str(both), "cpu")
    assert unigen.load(f"{both}:c2i_U_32", "cpu").info()["family"] == "llamagen"
    with pytest.raises(ValueError, match="holds several models: name one"):
        unigen.load("FoundationVision/LlamaGen", "cpu")


def test_pictures_alone_and_in_a_batch(folder: Path) -> None:
    engine = unigen.load(str(folder), "cpu")
    together = engine.generate_batch([1, 2, 1], [5, 6, 7], temperature=1.0)
    for label, seed, picture in zip([1, 2, 1], [5, 6, 7], together, strict=True):
        alone = np.asarray(engine.generate(label, seed=seed, temperature=1.0), dtype=int)
        assert np.abs(alone - np.asarray(picture)).max() <= 1  # convolutions round otherwise in a batch


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (["generate", "--class", "7"], "draws words, not classes"),
        (["edit", "{picture}", "make it red"], "draws from words alone"),
        (["generate", "a red dog " * 40], "pieces, the model reads 120: shorten it"),
    ],
)
def test_what_are_no_words(
    asked: list[str], reason: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    asked = [part.format(picture=tmp_path / "in.png") for part in asked]
    out = tmp_path / "out.png"
    assert cli.main([*asked, "-o", str(out), "--model", str(words), "--device", "cpu"]) == 2
    assert reason in capsys.readouterr().err and not out.exists()


def test_words_are_made_plain() -> None:
    for said, read in {
        "  A Dog,a cat ": "a dog, a cat",
        "“An owl” – it’s 3.5 m (tall)": '"an owl" - it\'s 3.5 m tall',
        "'a shop with bread & milk'": "a shop with bread milk",
        "a dog,": "a dog",
        "a dog . a cat": "a dog a cat",
        "see www.x.com,a.png is.code": "see www.x.com, a.png is. code",
        "what...a man : a plan": "what a man: a plan",
        "a state-of-the-art well-made boat": "a state of the art well made boat",
    }.items():
        assert llamagen.plain(said) == read


def test_both_kinds_in_one_folder(folder: Path, words: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "both")
    shutil.copytree(words, tmp_path / "both", dirs_exist_ok=True)
    classes, text = (unigen.load(f"{tmp_path / 'both'}:{name}", "cpu") for name in ("c2i_T_32", "t2i_T_stage1_32"))
    assert classes.info()["sampling"]["next-token"]["guidance"] == 4.0 and len(classes.info()["classes"]) == 10
    assert (
        text.info()["sampling"]["next-token"] | {"top_k": 1000, "guidance": 7.5}
        == text.info()["sampling"]["next-token"]
    )


def test_words_need_their_reader(words: Path, tmp_path: Path) -> None:
    shutil.copytree(words, tmp_path / "alone", ignore=shutil.ignore_patterns(llamagen.TEXT_FOLDER))
    with pytest.raises(ValueError, match=r"has no flan-t5-xl/ \(the text encoder\), and google/flan-t5-xl"):
        unigen.load(str(tmp_path / "alone"), "cpu")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "{}", "has no d_model"),
        ("config.json", "{", "cannot be read"),
        ("tokenizer.json", "{}", "damaged"),
        ("tokenizer.json", None, "damaged|tokenizer"),
        ("model.safetensors", None, "has no weights"),
    ],
)
def test_a_damaged_reader_of_words(
    file: str, content: str | None, reason: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(words, tmp_path / "damaged")
    path = tmp_path / "damaged" / llamagen.TEXT_FOLDER / file
    path.unlink() if content is None else path.write_text(content)
    assert cli.main(["info", "--model", str(tmp_path / "damaged"), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert any(words in told for words in reason.split("|")) and len(told.strip().splitlines()) == 1


def test_a_prompt_is_read_alike_step_by_step_and_packed(words: Path) -> None:
    """Codes are counted from the end of their prompt, however long it is and whatever stands beside it."""
    engine = unigen.load(str(words), "cpu")
    model, prompts = engine.model, [Document.of(prompt) for prompt in words_case.PROMPTS]
    with common.seen_logits(next_token) as steps:
        requests = [engine.request(p, "image", temperature=0.0, guidance=1.0) for p in prompts]
        list(engine.run(requests))
    drawn = [request.document.segments[-1].image for request in requests]
    documents = [
        model.template.encode(Document([*prompt.segments, Segment(image=codes, role="assistant")]))
        for prompt, codes in zip(prompts, drawn, strict=True)
    ]
    batch = model.fill(pack([documents], sum(map(len, documents)) + 3, 32))
    with torch.no_grad():
        hidden_BLD = model.hidden(batch)
        rows, at = batch.loss_BL.nonzero(as_tuple=True)
        logits_TV = model.logits(hidden_BLD[rows, at - 1], model.vocabulary.first, model.vocabulary.stop)
    assert torch.allclose(logits_TV.unflatten(0, (3, -1)).transpose(0, 1), torch.stack(steps), atol=1e-3)


def test_words_drawn_several_codes_a_step(words: Path) -> None:
    engine = unigen.load(str(words), "cpu")
    plain = engine.generate("a red apple", seed=3)
    assert engine.generate("a red apple", seed=3, accelerate="jacobi").tobytes() == plain.tobytes()


def test_the_reader_of_words_stays_in_float32_where_float16_is_too_narrow(words: Path) -> None:
    for dtype, kept in (("float16", torch.float32), ("bfloat16", torch.bfloat16)):
        backbone = unigen.load(str(words), "cpu", dtype).model.backbone
        assert isinstance(backbone, llamagen.TextBackbone)
        assert {p.dtype for p in backbone.encoder.parameters()} == {kept}


def test_pairs_half_a_head_apart_and_back() -> None:
    weight = torch.arange(16.0)[:, None]
    apart = llamagen.halves(weight, 8)
    assert apart[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(llamagen.halves(apart, 8, back=True), weight)
