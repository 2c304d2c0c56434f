"""The command line on the real engine with a tiny random model: what the fake engine of test_cli.py cannot show.

Run: pytest tests/test_cli_engine.py
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

import unigen
from unigen.commands.main import main


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def same(a: str | Path, b: str | Path) -> bool:
    return ImageChops.difference(Image.open(a), Image.open(b)).getbbox() is None


def test_generate_is_seeded(tiny_folder: Path) -> None:
    line = ["generate", "two apples", "--model", str(tiny_folder), "-o"]
    assert main([*line, "a.png", "-n", "3", "--seed", "4", "--guidance", "2"]) == 0
    assert main([*line, "b.png", "--seed", "6", "--guidance", "2"]) == 0
    assert Image.open("a-0.png").size == (16, 16)
    assert same("a-2.png", "b.png"), "picture i of n is the picture of seed + i"
    assert not (same("a-0.png", "a-1.png") and same("a-1.png", "a-2.png"))


def test_command_and_python_agree(tiny_folder: Path) -> None:
    assert main(["generate", "a dog", "--model", str(tiny_folder), "-o", "a.png", "--seed", "3"]) == 0
    unigen.load(str(tiny_folder)).generate("a dog", seed=3).save("b.png")
    assert same("a.png", "b.png")


def test_describe_edit_story(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(tiny_folder)]
    Image.new("RGB", (40, 30), "teal").save("in.png")
    assert main(["describe", "in.png", "-q", "how many?", *model]) == 0
    assert main(["edit", "in.png", "replace it", "-o", "out.png", *model]) == 0
    assert Image.open("out.png").size == (16, 16)
    assert main(["story", "a witch", "--reference", "in.png", "-o", "s.html", *model, "--seed", "1"]) == 0
    assert "<h1>a witch</h1>" in Path("s.html").read_text()


@pytest.mark.parametrize(
    "where", [["--box", "0,0,20,30"], ["--around", "0,0,20,30"], ["--vary", "1"], ["--mask", "m.png"]]
)
def test_inpaint(tiny_folder: Path, where: list[str]) -> None:
    Image.new("RGB", (40, 40), "teal").save("in.png")
    Image.new("L", (40, 40), 255).save("m.png")
    line = ["inpaint", "in.png", "a red dog", "-o", "out.png", "--model", str(tiny_folder), "--steps", "2"]
    assert main([*line, *where]) == 0
    assert Image.open("out.png").size == ((16, 16) if "--vary" in where else (40, 40))


def test_marks_that_are_not_painted_are_noted(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (60, 40), "teal").save("in.png")
    line = ["inpaint", "in.png", "a red dog", "-o", "out.png", "--model", str(tiny_folder), "--steps", "2"]
    assert main([*line, "--box", "30,0,60,9"]) == 0
    assert "note:" not in capsys.readouterr().err
    assert main([*line, "--box", "0,0,60,9"]) == 0
    assert "painted in a square of 40x40 pixels at 10,0 of your picture" in capsys.readouterr().err
    assert (
        np.asarray(Image.open("out.png"))[:, [*range(10), *range(50, 60)]].reshape(-1, 3).tolist()
        == [[0, 128, 128]] * 800
    )


def test_inpaint_says_what_is_wrong(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 40), "teal").save("in.png")
    line = ["inpaint", "in.png", "a red dog", "--model", str(tiny_folder)]
    for where, said in (
        ([], "--mask"),
        (["--box", "5,5,2,9"], "not a box"),
        (["--mask", "none.png"], "does not exist"),
    ):
        assert main([*line, *where]) == 2
        assert said in capsys.readouterr().err
    assert main([*line, "--box", "0,0,9,9", "--generator", "flow"]) == 2
    assert "flow cannot keep" in capsys.readouterr().err


@pytest.mark.parametrize("generator", ["masked", "next-scale", "flow"])
def test_generate_in_other_ways(tiny_folder: Path, generator: str) -> None:
    line = ["generate", "a dog", "--model", str(tiny_folder), "--generator", generator]
    assert main([*line, "-o", "a.png", "--seed", "3"]) == main([*line, "-o", "b.png", "--seed", "3"]) == 0
    assert same("a.png", "b.png")


def test_chat_with_piped_input(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a blue horse\nanother\n/save talk.json\n/quit\n"))
    assert main(["chat", "--model", str(tiny_folder)]) == 0
    assert (tmp_path / "talk.json").is_file()


def test_info(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(tiny_folder)]) == 0
    assert "next-token" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "unigen.json", "image_tokenizer/model.safetensors"]
)
def test_damaged_checkpoints(file: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_folder, tmp_path / "broken")
    path = tmp_path / "broken" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["generate", "x", "--model", "broken"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("unigen: error: ") and shown.count("\n") == 1 and "broken" in shown
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--generator", "nonesuch"], "next-token"),
        (["--device", "abacus"], "abacus"),
        (["--model", "nonesuch"], "unknown model"),
    ],
)
def test_bad_options(options: list[str], said: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--model", str(tiny_folder), *options]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_too_long_a_prompt(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "horse " * 300, "--model", str(tiny_folder)]) == 2
    assert "shorten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--engine", "vllm"], "vLLM is not installed here: run scripts/install_serve.sh"),
        (["--engine", "other"], "invalid choice: 'other'"),
        (["--engine", "vllm", "--quantization", "4bit"], "leave lmm, image_model, connector and quantization out"),
        (["--engine", "vllm", "--lmm", "a"], "leave lmm, image_model, connector and quantization out"),
        (["--vllm", "max_model_len=512"], "are for engine vllm"),
        (["--engine", "vllm", "--vllm", "fast"], "'fast' is not a setting like max_model_len=4096"),
    ],
)
def test_engines_that_cannot_be(
    given: list[str], line: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    monkeypatch.setattr("unigen.nn.quantized.check_quantization", lambda *_: None)
    assert main(["generate", "a dog", "--model", str(tiny_folder), *given]) == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1 and not list(Path().iterdir())
