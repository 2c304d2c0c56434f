"""A conversation that is saved, loaded, interrupted and mistyped.

Run: pytest tests/test_conversation.py
"""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import FakeEngine, talk
from unigen.commands.chat_session import COMMANDS, Chat


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    monkeypatch.chdir(tmp_path)
    return FakeEngine()


def test_load_is_the_inverse_of_save(engine: FakeEngine) -> None:
    talk(engine, "/seed 5\nhello\nand again\n/save talk.json\na third time\n")
    prompt, options = engine.asked[-1]
    shown = talk(engine, "/load talk.json\na third time\n")
    assert "loaded talk.json: 2 turns" in shown
    again, same = engine.asked[-1]
    assert same == options and same["seed"] == 7, "it goes on as it would have then"
    assert again.to_json() == prompt.to_json(), "text, roles and pixels are the same"


def test_a_document_of_ones_own_is_loaded(engine: FakeEngine) -> None:
    segments = [{"text": "hi"}, {"text": "hello", "role": "assistant"}, {"text": "a"}, {"text": "b"}]
    Path("own.json").write_text(json.dumps({"segments": segments}))
    assert "loaded own.json: 2 turns" in talk(engine, "/load own.json\nhello\n", seed=10)
    assert engine.asked[-1][1]["seed"] == 12 and len(engine.asked[-1][0].segments) == 5


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"segments": 3}',
        '{"segments": [{"role": "user"}]}',
        '{"segments": [{"image": {"png": "x"}}]}',
        '{"segments": [{"text": "a"}], "turn": "x"}',
        None,
    ],
)
def test_what_is_no_conversation_changes_nothing(engine: FakeEngine, text: str | None) -> None:
    if text is not None:
        Path("bad.json").write_text(text)
    shown = talk(engine, "hello\n/load bad.json\nagain\n")
    assert shown.count("unigen: ") == 1 and "bad.json" in shown
    assert engine.asked[-1][1]["seed"] == 1 and len(engine.asked[-1][0].segments) > 3, "the conversation is kept"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_at_the_prompt_keeps_the_conversation(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = ["hello", KeyboardInterrupt, "again", EOFError]

    def ask(prompt: str) -> str:
        line = said.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", ask)
    out = Terminal()
    Chat("pictures").run(engine, Terminal(), out)
    assert "/quit ends the conversation" in out.getvalue() and said == []
    assert engine.asked[-1][1]["seed"] == 1 and len(engine.asked[-1][0].segments) > 3


def test_unknown_commands_are_called_so(engine: FakeEngine, tmp_path: Path) -> None:
    shown = talk(engine, "/imgae x.png\n/xyzzy\n/save\n/load\n/help\n")
    first, second, third, fourth, last = shown.splitlines()
    assert "unknown command /imgae; did you mean '/image'?" in first
    assert "unknown command /xyzzy (commands: " in second
    assert third == "unigen: say /save FILE.json" and fourth == "unigen: say /load FILE.json"
    assert all(name in last for name in COMMANDS) and engine.asked == []
    assert "unknown command /aaa" in talk(engine, "/" + "a" * 5000 + "\n")  # longer than a file's name may be
    assert "unknown command /imagine; did you mean '/image'?" in talk(engine, "/imagine " + "a red hat " * 100 + "\n")
    path = tmp_path / "a picture.png"
    path.touch()
    assert f"to attach a picture: /image {path}" in talk(engine, f"{path}\n")
