"""Recipe files that are none, and the ways in which a recipe is named and told: one line each, before any work.

Run: pytest tests/training/test_recipe_files.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_trainer import RECIPE
from unigen.commands.main import main
from unigen.utils.files import load_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"def config(:", "is not valid Python"),
        (b"x = 1\n\0", "is not valid Python"),
        (b"x = 'caf\xe9'", "is not valid Python"),
        (b"", "has no function config()"),
        (RECIPE.replace("def build", "def make").encode(), "has no function build()"),
        (RECIPE.replace("return Config(", "Config(").encode(), "config() of the recipe"),
        (RECIPE.replace("return Config(", "return dict(").encode(), "must return a RunConfig, not a dict"),
        (RECIPE.replace("return TrainSpec(", "TrainSpec(").encode(), "must return a TrainSpec, not a NoneType"),
        (RECIPE.replace("None, objective", "save=None").encode(), "gives TrainSpec save=, which is save_model= now"),
        (RECIPE.replace("num_workers=", "workers=").encode(), "gives Config workers=, which is num_workers= now"),
    ],
)
def test_files_that_are_no_recipes(
    text: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_bytes(text)
    assert main(["train", str(tmp_path / "mine.py"), f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert message in said and "mine.py" in said and said.strip().count("\n") == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["none.py", "folder", "tinny", "", "a\0b", "a" * 300])
def test_names_of_no_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["train", name]) == 2
    said = capsys.readouterr().err
    assert "no recipe" in said and said.count("\n") == 1 and len(said) < 500
    assert name != "tinny" or "did you mean 'tiny'?" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("adapter", "the recipe adapter is called connector now"),
        ("recipes/adapter.py", "the recipe adapter is called connector now"),
        ("tiny writers.flow=1", "unknown key 'writers.flow'; it is called generators.flow now"),
        ("tiny image_tokenizer=none preferences.judged=a", "it is called preferences.answers now"),
        ("tiny_vq pictures=digits", "unknown key 'pictures'; it is called image_source now"),
    ],
)
def test_names_of_version_0_1_say_the_new_ones(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *command.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_is_run_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my recipes (new)"
    folder.mkdir()
    (folder / "a recipe.py").write_text(RECIPE)
    (tmp_path / "link.py").symlink_to(folder / "a recipe.py")
    for cwd, name in ((tmp_path, "my recipes (new)/a recipe.py"), (folder, "../link.py"), (folder, "a recipe.py")):
        monkeypatch.chdir(cwd)
        assert main(["train", name, "run_dir=runs/one", "width=2"]) == 0
        assert load_json(cwd / "runs" / "one" / "config.json")["width"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no_such=1", "unknown key 'no_such'"),
        ("lr=abc", "did you mean optim.lr?"),
        ("optim.lr=abc", "optim.lr expects float, not 'abc'"),
        ("steps=-1", "steps must be 1 or more"),
        ("steps=1e3", "steps expects int"),
        ("width=", "width has no value"),
        ("steps", "not of the form key=value"),
        ("--steps=3", "unrecognized arguments: --steps=3"),
    ],
)
def test_wrong_overrides(given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    assert main(["train", str(tmp_path / "mine.py"), f"run_dir={tmp_path / 'run'}", given]) == 2
    said = capsys.readouterr().err
    assert message in said and said.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()
