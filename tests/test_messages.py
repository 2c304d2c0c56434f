"""What a newcomer is told: help, suggestions for misspelt names, and what to do about what cannot be read.

Run: pytest tests/test_messages.py
"""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

import unigen.evaluation.tasks
from unigen.commands.main import COMMANDS, main
from unigen.hub import resolve
from unigen.training.recipe_files import find_recipe
from unigen.utils.text import did_you_mean


def error(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """The one line that a bad command line gets."""
    assert main(list(line)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("unigen: error: ") and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        (["genrate", "x"], "'generate'"),
        (["help", "describ"], "'describe'"),
        (["generate", "x", "--guidence", "3"], "'--guidance'"),
        (["generate", "x", "--sede=3"], "'--seed'"),
        (["eval", "scene"], "'scenes'"),
        (["eval", "scenes", "--gudance", "2"], "'--guidance'"),
    ],
)
def test_misspelt_names_are_suggested(capsys: pytest.CaptureFixture[str], line: list[str], meant: str) -> None:
    assert f"did you mean {meant}?" in error(capsys, *line)


def test_names_like_no_other_are_not_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert did_you_mean("xyzzy", COMMANDS) == ""
    assert "did you mean" not in error(capsys, "xyzzy") and "did you mean" not in error(capsys, "generate", "x", "--xy")


def test_an_unquoted_sentence_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "put a sentence in quotes" in error(capsys, "generate", "two", "apples")


@pytest.mark.parametrize("line", [["edit", "a.png", "x", "--output=--"], ["story", "x", "--reference=--"]])
def test_two_dashes_are_no_value(capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    assert "--" in error(capsys, *line)


@pytest.mark.parametrize(
    "line",
    [
        ["joint", "x", "-o", ""],
        ["joint", "--image", ""],
        ["inpaint", "a.png", "x", "--mask", ""],
        ["info", "--json", ""],
        ["chat", "--folder", " "],
        ["generate", "x", "--generator", ""],
        ["serve", "--host", ""],
        ["serve", "--images-folder", ""],
        ["eval", "scenes", "--json", ""],
        ["eval", "scenes", "--out", ""],
        ["eval", "scenes", "--model", ""],
    ],
)
def test_an_empty_name_is_not_the_default(capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    assert "it is empty; give a name, or leave it out" in error(capsys, *line)


def test_words_and_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert "both words and --class" in error(capsys, "generate", "x", "--class", "3")
    assert "say what to draw" in error(capsys, "generate")


@pytest.mark.parametrize("name", ["generate", "train", "serve"])
def test_help_of_a_command_both_ways(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for line in (["help", name], [name, "--help"]):
        with pytest.raises(SystemExit):
            main(line)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and f"unigen {name}" in said[0]


def test_help_alone_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_help_of_eval_says_what_each_task_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.startswith("  ") and line[2] != " "
    }
    tasks = {name for _, name, _ in pkgutil.iter_modules(unigen.evaluation.tasks.__path__)}
    assert {"scenes", "digits"} < tasks == set(rows)
    assert all(len(words) > 5 for words in rows.values())


@pytest.mark.parametrize(
    ("command", "default"),
    [("generate", "next-token"), ("inpaint", "masked"), ("joint", "joint"), ("edit", "next-token")],
)
def test_help_names_the_default_generator(command: str, default: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"(default: {default}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("https://huggingface.co/deepseek-ai/Janus-Pro-1B", "give deepseek-ai/Janus-Pro-1B"),
        ("https://huggingface.co/deepseek-ai/Janus-Pro-1B/tree/main", "give deepseek-ai/Janus-Pro-1B"),
        ("huggingface.co/deepseek-ai/Janus-Pro-1B", "give deepseek-ai/Janus-Pro-1B"),
        ("https://example.org/model.zip", "models are not read from URLs"),
        ("./nofolder", "no folder ./nofolder is here"),
        ("../nofolder", "no folder ../nofolder is here"),
        ("/no/such/folder", "no folder /no/such/folder is here"),
        ("runs/tiny/model", "no folder runs/tiny/model is here"),
        ("weights.safetensors", "is a file: give the folder"),
        ("unigen-tinny", "did you mean 'unigen-tiny'?"),
        ("é" * 200, "neither a folder"),
        ("./" + "é" * 200, "so there is no model in it"),
    ],
)
def test_models_that_are_not_there(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.safetensors").touch()
    with pytest.raises(ValueError) as raised:
        resolve.resolve(name)
    said = str(raised.value)
    assert told in said and ("hub" not in said or "owner/name" in said)


def test_a_recipe_of_a_very_long_name() -> None:
    with pytest.raises(ValueError, match="no recipe é"):
        find_recipe("é" * 200)


def test_a_path_is_never_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repo: str, revision: str | None = None, *_: object) -> Path:
        asked.append((repo, revision))
        return Path(".")

    monkeypatch.setattr(resolve, "fetch_snapshot", snapshot)
    for name in ("./nofolder", "../nofolder", "~/nofolder"):
        with pytest.raises(ValueError):
            resolve.resolve(name)
    assert asked == []
    resolve.resolve("owner/name@refs/pr/1")
    assert asked == [("owner/name", "refs/pr/1")]
