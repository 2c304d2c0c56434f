"""Liquid's folder as a user meets it: loading, commands, conversion, and what is wrong with a damaged one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unigen
from tests.parity import liquid as case
from unigen import cli, hub
from unigen.models import convert, liquid
from unigen.sequence import Document, Segment


@pytest.fixture(scope="session")
def liquid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("liquid")
    case.checkpoint(folder)
    return folder


def test_the_commands(liquid_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--model", str(liquid_folder), "--device", "cpu"]
    picture = tmp_path / "out.png"
    assert cli.main(["generate", "a red apple", "-o", str(picture), *where]) == 0
    assert Image.open(picture).size == (case.SIDE, case.SIDE)
    assert cli.main(["describe", str(picture), "-q", "What is in the picture", *where]) == 0
    assert cli.main(["info", *where]) == 0
    printed = capsys.readouterr().out
    assert "liquid" in printed and "next-token" in printed and "image, text" in printed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["edit", "{picture}", "make it blue", "-o", "{out}"], "draws from words alone"),
        (["story", "a witch", "-o", "{folder}"], "cannot answer with interleaved"),
        (["generate", "--class", "7", "-o", "{out}"], "draws words, not classes"),
        (["generate", "a dog", "--generator", "masked", "-o", "{out}"], "no generator 'masked'"),
    ],
)
def test_what_it_cannot_do_is_said(
    arguments: list[str], reason: str, liquid_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "in.png")
    places = {"picture": tmp_path / "in.png", "out": tmp_path / "out.png", "folder": tmp_path / "story.md"}
    filled = [argument.format(**places) for argument in arguments]
    assert cli.main([*filled, "--model", str(liquid_folder), "--device", "cpu"]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_conversion_there_and_back_changes_nothing(liquid_folder: Path, tmp_path: Path) -> None:
    convert(liquid_folder, tmp_path / "ours")
    assert (tmp_path / "ours" / hub.MANIFEST).is_file()
    convert(tmp_path / "ours", tmp_path / "public", "public")
    first, second, third = (
        unigen.load(str(folder), "cpu") for folder in (liquid_folder, tmp_path / "ours", tmp_path / "public")
    )
    for other in (second, third):
        mine, theirs = first.model.state_dict(), other.model.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert list(other.generate("a red apple").getdata()) == list(first.generate("a red apple").getdata())
        assert other.info()["sampling"] == first.info()["sampling"]


def test_a_folder_that_is_no_model_is_not_replaced(liquid_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no model"):
        convert(liquid_folder, tmp_path)
    assert (tmp_path / "notes.txt").is_file()


def test_names_of_special_tokens_are_text_to_a_user(liquid_folder: Path) -> None:
    template = unigen.load(str(liquid_folder), "cpu").model.template
    for output in ("image", "text"):
        ids = template.prompt(Document.of("a red <boi> apple"), output=output).ids  # type: ignore[arg-type]
        assert template.begins["next-token"] not in ids


def test_what_is_learnt(liquid_folder: Path) -> None:
    model = unigen.load(str(liquid_folder), "cpu").model
    picture = Segment(image=Image.new("RGB", (32, 32)), role="assistant")
    drawn = model.template.encode(Document([Segment(text="a red apple"), picture]))
    names = model.text_tokenizer.convert_ids_to_tokens
    assert sum(drawn.loss) == 64 + 2 and names(drawn.ids[-2:]) == [liquid.EOI, "<eos>"]
    said = model.template.encode(Document([Segment(text="What is it"), Segment(text="a red apple", role="assistant")]))
    learnt = [name for name, loss in zip(names(said.ids), said.loss, strict=True) if loss]
    assert "".join(learnt[:-1]).replace("▁", " ") == "a red apple" and learnt[-1] == "<end_of_turn>"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget(path: Path) -> None:
    state = hub.read_tensors(path)
    name = sorted(state)[3]
    del state[name]
    hub.write_tensors(path, state) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        ("model.safetensors", cut, "cannot be loaded"),
        ("model.safetensors", forget, "1 missing"),
        ("config.json", cut, "cannot be read"),
        ("config.json", Path.unlink, "holds neither"),
        ("tokenizer/vqgan.ckpt", cut, "cannot be read"),
        ("tokenizer/vqgan.ckpt", forget, "missing"),
        ("tokenizer/vqgan.ckpt", Path.unlink, "has no vqgan.ckpt"),
        ("tokenizer/vqgan.ckpt", lambda path: torch.save({"state_dict": Evil()}, path), "might run code"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    file: str,
    harm: Callable[[Path], None],
    reason: str,
    liquid_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(liquid_folder, folder)
    harm(folder / file)
    assert cli.main(["info", "--model", str(folder), "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert reason in told.err and len(told.err.strip().splitlines()) == 1 and "must not run" not in told.out


def test_names_on_the_hub(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/something", "someone/something@v1.0"):
        assert cli.main(["info", "--model", name, "--device", "cpu"]) == 2
        told = capsys.readouterr().err
        assert name in told and "not in the hub's cache" in told and len(told.strip().splitlines()) == 1
