"""Long work shows how far it is, what is finished is saved, and stdout can be the output.

Run: pytest tests/test_progress.py
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import unigen
from tests.test_cli import FakeEngine
from unigen.commands.main import main
from unigen.utils import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr("unigen.loading.load", lambda *_, **__: engine)
    monkeypatch.setattr("unigen.commands.generate.BATCH_SIZE", 2)
    monkeypatch.chdir(tmp_path)
    return engine


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stderr becomes a terminal on which bars appear at once."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return shown


# --- bars -----------------------------------------------------------------------------------------------------------


def test_a_terminal_sees_a_bar_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with progress.bar(3, "image") as bar:
        bar.update(1)
    assert "0/3" in terminal.getvalue() and terminal.getvalue().endswith("\r"), "it leaves nothing behind"
    monkeypatch.setenv("TQDM_DISABLE", "1")
    size = len(terminal.getvalue())
    with progress.bar(3, "image"), progress.status("loading x"):
        pass
    assert len(terminal.getvalue()) == size
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar(3, "image"), progress.status("loading x"):
        pass
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_loading_is_shown_and_wiped(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    assert main(["info", "--model", "some-model"]) == 0
    assert terminal.getvalue() == "loading some-model ...\r\033[K"


def test_a_notebook_has_bars_without_warnings(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    assert progress.in_notebook() and progress.visible()
    shell.config = {}
    assert not progress.in_notebook() and not recwarn.list


def test_every_generator_says_how_far_it_is(engine: Any) -> None:
    for name in engine.info()["generators"]:
        seen: list[float] = []
        requests = [engine.build_request("a dog", "image", generator=name, seed=seed) for seed in (0, 1)]
        assert len(list(engine.run_requests(requests, seen.append))) == 2
        assert seen == sorted(seen) and seen[-1] == 2.0, name
        assert any(0 < done < 2 for done in seen[:-1]) and max(seen[:-1]) < 2, name


class Recorder(contextlib.nullcontext[Any]):
    """A bar that remembers what it was told."""

    def __init__(self, total: int | None, unit: str, **_: Any) -> None:
        self.total, self.unit, self.steps = total, unit, [0.0]

    def __enter__(self) -> Any:
        return self

    @property
    def n(self) -> float:
        return sum(self.steps)

    def update(self, by: float) -> None:
        self.steps.append(by)


def test_generating_moves_the_bar(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Recorder] = []
    monkeypatch.setattr(progress, "bar", lambda *args, **options: bars.append(Recorder(*args, **options)) or bars[-1])
    engine.generate("a dog", n=2)
    engine.generate("a story about a witch", output="interleaved", max_images=1, max_tokens=4)
    assert [(bar.total, bar.unit) for bar in bars] == [(2, "image"), (None, "image")]
    assert bars[0].n == pytest.approx(2) and any(0 < step < 1 for step in bars[0].steps), "a bar for parts of pictures"
    assert bars[1].n <= 1 and set(bars[1].steps) <= {0, 1}


# --- saved as it is finished ----------------------------------------------------------------------------------------


def test_pictures_are_saved_batch_by_batch(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there: list[list[str]] = []
    draw = fake.generate

    def generate(*args: Any, **options: Any) -> Any:
        there.append(sorted(path.name for path in Path().glob("*.png")))
        if options["seed"] == 4:
            raise KeyboardInterrupt
        return draw(*args, **options)

    monkeypatch.setattr(fake, "generate", generate)
    assert main(["generate", "x", "-n", "6", "-o", "a.png"]) == 130
    assert there == [[], ["a-0.png", "a-1.png"], ["a-0.png", "a-1.png", "a-2.png", "a-3.png"]]
    shown = capsys.readouterr()
    assert shown.out.split() == there[-1] and "stopped: 4 of 6 files were written" in shown.err
    assert [Image.open(f"a-{i}.png").getpixel((0, 0))[0] for i in range(4)] == [0, 1, 2, 3]  # type: ignore[index]


def test_engines_that_draw_one_by_one_save_one_by_one(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "batched", False)
    assert main(["generate", "x", "-n", "3", "-o", "a.png"]) == 0
    assert [options["n"] for _, options in fake.asked] == [1, 1, 1]
    from unigen.backends.composed import ComposedEngine
    from unigen.backends.diffusers_engine import DiffusersEngine

    assert unigen.Engine.batched and not ComposedEngine.batched and not DiffusersEngine.batched


# --- stdout as the output -------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (8, 6), "teal").save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


@pytest.mark.parametrize("line", [["generate", "x", "-n", "3", "--grid"], ["generate", "x"], ["edit", "in.png", "x"]])
def test_a_picture_on_stdout(
    fake: FakeEngine, picture: str, capfdbinary: pytest.CaptureFixture[bytes], line: list[str]
) -> None:
    assert main([*line, "-o", "-"]) == 0
    shown = capfdbinary.readouterr()
    image = Image.open(io.BytesIO(shown.out))
    image.load()
    assert image.format == "PNG" and shown.out.endswith(b"IEND\xaeB`\x82"), "the picture and nothing else"
    assert shown.err.strip().endswith(b"s") and b"/" not in shown.err, "no path of a temporary file"
    assert sorted(path.name for path in Path().iterdir()) == ["in.png"]


def test_a_page_and_json_on_stdout(fake: FakeEngine, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["story", "a witch", "-o", "-"]) == 0
    page = capfdbinary.readouterr().out
    assert page.startswith(b"<!doctype html>") and page.endswith(b"</html>\n")
    assert main(["info", "--json", "-"]) == 0
    shown = capfdbinary.readouterr()
    assert json.loads(shown.out) == {"name": "fake", "parameters": 12} and b"parameters" in shown.err


def test_what_cannot_go_to_stdout(
    fake: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", "x", "-n", "2", "-o", "-"]) == 2
    shown = capsys.readouterr()
    assert "--grid" in shown.err and shown.out == ""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["generate", "x", "-o", "-"]) == 2
    assert "stdout is a terminal" in capsys.readouterr().err and screen.getvalue() == "" and fake.asked == []


def test_figures_on_stdout(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from unigen.evaluation import runner
    from unigen.evaluation.report import Report

    class TableTask(runner.EvaluationTask):
        description = ""

        @classmethod
        def create(cls, run: runner.EvaluationRun) -> TableTask:
            return cls()

        def run(self, run: runner.EvaluationRun) -> Report:
            print("a table")
            return Report(0.5, {}, [])

    monkeypatch.setattr(runner, "find_task", lambda name: TableTask)
    assert main(["eval", "digits", "--json", "-"]) == 0
    shown = capfd.readouterr()
    found = json.loads(shown.out)
    assert found["overall"] == 0.5 and found["command"] == "unigen eval digits --json -"
    assert shown.err == "a table\n"
    assert main(["eval", "digits"]) == 0
    assert capfd.readouterr().out == "a table\n"
