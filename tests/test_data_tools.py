"""Programs in data_tools and recipes: bad numbers, missing inputs and places that cannot be written are one line.

Run: pytest tests/test_data_tools.py
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unigen.evaluation.detector import DEFAULT_FOLDER

DRAW, JUDGE, WORDS, SCENES = (
    f"data_tools.{name}" for name in ("generate_codes", "judge_answers", "train_tokenizer", "make_scenes")
)
VQ, FLOW, DETECTOR = (f"recipes.{name}" for name in ("tiny_vq", "flow_networks", "scene_detector"))
WORK = {JUDGE: ("load_detector",), SCENES: ("make_row",)}
"""What a program calls when it begins to work, besides loading a model."""
DETECT = ["--detector", str(DEFAULT_FOLDER)]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], emoji_font: Path
) -> Callable[..., str]:
    """Run a program, which is to refuse what it is given before it loads or trains anything; gives what it said."""

    def too_late(*_: Any, **__: Any) -> Any:
        raise AssertionError("it began to work")

    monkeypatch.setattr("unigen.loading.load", too_late)
    monkeypatch.chdir(tmp_path)

    def run(module: str, *given: str) -> str:
        program = importlib.import_module(module)
        for name in WORK.get(module, ()):
            monkeypatch.setattr(f"{module}.{name}", too_late)
        monkeypatch.setattr(sys, "argv", [module.rpartition(".")[2], *given])
        assert program.main() == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and ": error: " in said and len(said) < 600
        return said

    return run


@pytest.mark.parametrize(
    ("module", "given", "option"),
    [
        (DRAW, ["m", "out.npz", "--seed", "-1"], "--seed"),
        (DRAW, ["m", "out.npz", "--seed", "0"], "--seed"),
        (DRAW, ["m", "out.npz", "--count", "1_0"], "--count"),
        (DRAW, ["m", "out.npz", "--batch", "0"], "--batch"),
        (DRAW, ["m", "out.npz", "--minutes", "nan"], "--minutes"),
        (DRAW, ["m", "out.npz", "--minutes", "0"], "--minutes"),
        (JUDGE, ["pictures", "m", "out.jsonl", *DETECT, "--prompts", "1e3"], "--prompts"),
        (JUDGE, ["pictures", "m", "out.jsonl", *DETECT, "--answers", "1"], "--answers"),
        (JUDGE, ["pictures", "m", "out.jsonl", *DETECT, "--seed", "0"], "--seed"),
        (JUDGE, ["pictures", "m", "out.jsonl", *DETECT, "--guidance", "inf"], "--guidance"),
        (JUDGE, ["pictures", "m", "out.jsonl", *DETECT, "--temperature", "-1"], "--temperature"),
        (JUDGE, ["pictures", "m", "out.jsonl", *DETECT, "--batch", "3", "--answers", "4"], "--batch 3"),
        (JUDGE, ["captions", "m", "out.jsonl", "--minutes", "١"], "--minutes"),
        (WORDS, ["out", "--vocab-size", "0"], "--vocab-size"),
        (WORDS, ["out", "--sentences", "-5"], "--sentences"),
        (WORDS, ["out", "--seed", "0x1"], "--seed"),
        (SCENES, ["out", "--count", "0"], "--count"),
        (SCENES, ["out", "--seed", "-1"], "--seed"),
        (SCENES, ["out", "--start", "-1"], "--start"),
        (SCENES, ["out", "--size", "8"], "--size"),
        (SCENES, ["out", "--shards", "1_0"], "--shards"),
        (SCENES, ["out", "--sede", "1"], "did you mean '--seed'"),
        (VQ, ["--ablate", "0"], "--ablate"),
        (VQ, ["--evaluate", ".", "--count", "1_0"], "--count"),
        (VQ, [], "--evaluate"),
        (VQ, ["--evaluate", ".", "steps=3"], "steps=3 is of a training"),
        (FLOW, ["--jsn", "x.json"], "did you mean '--json'"),
        (DETECTOR, [], "detector"),
        (DETECTOR, ["a", "b", "c"], "unrecognized"),
    ],
)
def test_bad_numbers_and_options(module: str, given: list[str], option: str, refused: Callable[..., str]) -> None:
    assert option in refused(module, *given)


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        (JUDGE, ["pictures", "m", "out.jsonl", "--detector", "none"], "none is not there: make it by `unigen train"),
        (WORDS, ["out", "--text", "none.txt"], "none.txt"),
        (WORDS, ["out", "--text", "latin.txt"], "latin.txt is not in UTF-8"),
        (VQ, ["--evaluate", "none"], "none is not there: make it by `unigen train recipes/tiny_vq.py run_dir=runs/vq`"),
        (VQ, ["--evaluate", ""], "is not there"),
        (
            VQ,
            ["--ablate", "5", "feature_network=none"],
            "feature_network=none is not there: make it by `unigen train recipes/scene_",
        ),
        (
            FLOW,
            [],
            "kl_tokenizer=runs/kl/model is not there: make it by `unigen train recipes/tiny_vq.py tokenizer_kind=kl",
        ),
        (DETECTOR, ["none", "out"], "none is not there: make it by `unigen train recipes/scene_detector.py"),
    ],
)
def test_missing_inputs_name_the_command_that_makes_them(
    module: str, given: list[str], message: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"a caf\xe9\n")
    assert message in refused(module, *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (DRAW, ["m", "OUT/out.npz"]),
        (DRAW, ["m", "out.txt"]),
        (JUDGE, ["captions", "m", "OUT/out.jsonl"]),
        (WORDS, ["OUT"]),
        (SCENES, ["OUT"]),
        (VQ, ["--evaluate", ".", "--json", "OUT/out.json"]),
        (VQ, ["--evaluate", ".", "--grid", "OUT/out.png"]),
        (VQ, ["--ablate", "5", "--json", "OUT/out.json"]),
        (FLOW, ["--json", "OUT/out.json"]),
        (FLOW, ["--out", "OUT"]),
        (DETECTOR, [".", "OUT"]),
    ],
)
def test_places_that_cannot_be_written(
    module: str, given: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(module, *[word.replace("OUT", "file") for word in given])
    assert "file" in said or "out.txt" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_sentence_ends_with_its_line_alone(tmp_path: Path) -> None:
    """Not at the other marks at which str.splitlines ends one; and the file is read as it is asked for."""
    text = tmp_path / "text.txt"
    good = "\ufeffOne\u2028two\x85three\x0bfour\x0cfive\r\nsix\n\nseven\n" + 99_999 * "eight\n"
    text.write_bytes(good.encode() + b"caf\xe9\n")
    lines = importlib.import_module(WORDS).read_sentences(str(text), 0, 0)
    assert [next(lines) for _ in range(4)] == [" one two three four five", " six", " ", " seven"]
    with pytest.raises(ValueError, match="text.txt is not in UTF-8: convert it"):
        list(lines)


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "holds no tokenizer: choose another folder" in refused(WORDS, "out")
    assert (tmp_path / "out" / "mine").exists()
