"""The command line on an engine that draws flat colours: arguments, files, messages, exit codes.

Run: pytest tests/test_cli.py
"""

from __future__ import annotations

import importlib.abc
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unigen.commands.chat_session import Chat, inline, inline_protocol
from unigen.commands.main import main
from unigen.document import Document
from unigen.inference.base import BaseEngine
from unigen.media.output import image_grid


class FakeEngine(BaseEngine):
    """Remembers what it was asked; a picture's red is its seed."""

    outputs = ("image", "text", "interleaved")
    batched = True

    def __init__(self) -> None:
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    @staticmethod
    def draw(seed: int) -> Image.Image:
        return Image.new("RGB", (16, 16), (seed % 256, 120, 40))

    def generate_results(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def check(self, *_: Any, **__: Any) -> None:
        pass

    def generate(self, prompt: Any, output: str = "image", n: int = 1, seed: int = 0, **options: Any) -> Any:
        self.asked.append((prompt, {"output": output, "n": n, "seed": seed, **options}))
        if output == "interleaved":
            return ["Once <upon> a time.", self.draw(seed), "The end.", self.draw(seed + 1)]
        images = [self.draw(seed + i) for i in range(n)]
        return images if n > 1 else images[0]

    def describe(self, image: Image.Image, question: str | None = None, **options: Any) -> str:
        return " ".join(map(str, [image.size, question, *options.items()]))

    def edit(self, image: Image.Image, instruction: str, seed: int = 0, **options: Any) -> Image.Image:
        self.asked.append((instruction, options))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def stream(self, prompt: Document, output: str, seed: int = 0, **options: Any) -> Iterator[str | Image.Image]:
        self.asked.append((prompt, {"output": output, "seed": seed, **options}))
        said = prompt.segments[-1].text or ""
        if "long" in said:
            raise ValueError("the conversation is too long")
        yield "Here "
        yield "you are: "
        yield self.draw(seed)
        yield f"turn {sum(s.role == 'user' and s.text is not None for s in prompt.segments)}"

    def info(self) -> dict[str, Any]:
        return {"name": "fake", "parameters": 12}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    fake = FakeEngine()

    def load(
        name: str, device: str | None = None, dtype: str | None = None, quantization: str | None = None
    ) -> FakeEngine:
        if name != "unigen-tiny":
            raise ValueError(f"unknown model {name!r}:\n  neither a folder nor a name")
        return fake

    monkeypatch.setattr("unigen.loading.load", load)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "in.png"
    image = Image.new("RGB", (8, 6), "white")
    image.putpixel((0, 0), (255, 0, 0))
    image.save(path)
    return str(path)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- commands -------------------------------------------------------------------------------------------------------


def test_generate_one(engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "two apples", "-o", "a.png", "--seed", "7", "--guidance", "3", "--top-k", "5"]) == 0
    assert engine.asked == [("two apples", {"output": "image", "n": 1, "seed": 7, "guidance": 3.0, "top_k": 5})]
    assert Image.open("a.png").getpixel((0, 0)) == (7, 120, 40)
    assert capsys.readouterr().out == "a.png\n"
    assert files(tmp_path) == {"a.png"}


def test_generate_many_and_grid(engine: FakeEngine, tmp_path: Path) -> None:
    assert main(["generate", "x", "-n", "3", "-o", "a.png"]) == 0
    assert files(tmp_path) == {"a-0.png", "a-1.png", "a-2.png"}
    assert main(["generate", "x", "-n", "3", "--grid", "-o", "g.jpg"]) == 0
    assert Image.open("g.jpg").size == (34, 34)
    assert files(tmp_path) == {"a-0.png", "a-1.png", "a-2.png", "g.jpg"}


def test_generate_more_than_a_batch(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unigen.commands.generate.BATCH_SIZE", 2)
    assert main(["generate", "x", "-n", "5", "--seed", "10", "-o", "a.png"]) == 0
    assert [Image.open(f"a-{i}.png").getpixel((0, 0))[0] for i in range(5)] == [10, 11, 12, 13, 14]  # type: ignore[index]
    assert [options["n"] for _, options in engine.asked] == [2, 2, 1]


def test_grid_places_pictures_in_order() -> None:
    sheet = image_grid([FakeEngine.draw(i) for i in (10, 20, 30)], gap=1)
    assert [sheet.getpixel(at)[0] for at in ((0, 0), (17, 0), (0, 17), (17, 17))] == [10, 20, 30, 255]  # type: ignore[index]


def test_describe(engine: FakeEngine, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", picture]) == 0
    assert main(["describe", picture, "-q", "how many?"]) == 0
    assert main(["describe", picture, "--candidates", "3"]) == 0
    assert capsys.readouterr().out == "(8, 6) None\n(8, 6) how many?\n(8, 6) None ('candidates', 3)\n"
    assert "--candidates is for captions" in raise_invalid(
        capsys, "describe", picture, "-q", "how many?", "--candidates", "3"
    )


def test_edit(engine: FakeEngine, picture: str) -> None:
    assert main(["edit", picture, "mirror it", "-o", "b.png"]) == 0
    assert Image.open("b.png").getpixel((7, 0)) == (255, 0, 0)


def test_a_picture_of_another_size_is_noted(
    engine: FakeEngine, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["edit", picture, "make it red", "-o", "red.png"]) == 0
    assert "note:" not in capsys.readouterr().err
    Image.new("RGB", (40, 30)).save("photo.png")
    monkeypatch.setattr(engine, "edit", lambda *asked, **options: engine.draw(1))
    assert main(["edit", "photo.png", "make it red", "-o", "red.png"]) == 0
    said = capsys.readouterr()
    assert "note: your picture of 40x30 pixels comes back as 16x16" in said.err and said.out == "red.png\n"


def test_story_page(engine: FakeEngine, picture: str) -> None:
    assert main(["story", "a witch & her raven", "--reference", picture, "--reference", picture, "--seed", "2"]) == 0
    prompt, options = engine.asked[0]
    assert [isinstance(part, Image.Image) for part in prompt] == [True, True, False]
    assert "a witch & her raven" in prompt[2].text and options["output"] == "interleaved" and options["seed"] == 2
    page = Path("story.html").read_text()
    captions = re.findall(r'src="data:image/png[^"]*" alt="([^"]*)"><figcaption>([^<]*)</figcaption>', page)
    assert captions == [("Once &lt;upon&gt; a time.",) * 2, ("The end.",) * 2], "each picture carries its text"
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page is self-contained"
    assert "--seed 2" in page


def test_story_markdown(engine: FakeEngine, tmp_path: Path) -> None:
    assert main(["story", "a witch", "-o", "tale.md"]) == 0
    assert files(tmp_path) == {"tale.md", "tale-0.png", "tale-1.png"}
    assert "![](tale-1.png)" in Path("tale.md").read_text()


def test_info(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "i.json"]) == 0
    assert "parameters           12" in capsys.readouterr().out
    assert json.loads(Path("i.json").read_text()) == {"name": "fake", "parameters": 12}


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith(("unigen.evaluation", "unigen.training", "unigen.data")):
            raise AssertionError(f"{name} is imported")


def test_making_never_imports_evaluation(engine: FakeEngine, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("unigen.evaluation", "unigen.training", "unigen.data"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    for line in (["generate", "x"], ["describe", picture], ["story", "x"], ["edit", picture, "x"]):
        assert main(line) == 0
    with pytest.raises(AssertionError, match="imported"):
        main(["eval", "scenes"])


# --- bad input ------------------------------------------------------------------------------------------------------


def raise_invalid(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """The one line that a bad command line gets."""
    assert main(list(line)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("unigen: error: ") and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["generate", "  "], "prompt"),
        (["generate", "x", "-n", "0"], "from 1 to 1,000"),
        (["generate", "x", "-n", "many"], "whole number"),
        (["generate", "x", "--guidance", "nan"], "--guidance"),
        (["generate", "x", "--guidance", "inf"], "a number from 0 to 100"),
        (["generate", "x", "--guidance", "-1"], "a number from 0 to 100"),
        (["generate", "x", "--temperature", "-0.1"], "--temperature"),
        (["generate", "x", "--top-p", "0"], "above 0"),
        (["generate", "x", "--top-p", "1.5"], "at most 1"),
        (["generate", "x", "--top-k", "-3"], "--top-k"),
        (["generate", "x", "--seed", "1.5"], "--seed"),
        (["generate", "x", "--model", "nonesuch"], "unknown model"),
        (["generate", "x", "-o", "nowhere/a.png"], "no folder"),
        (["generate", "x", "-o", "a.tiff"], ".png"),
        (["generate", "x", "-o", "folder.png"], "is a folder"),
        (["generate"], "say what to draw: in words, or by --class"),
        (["generate", "x", "--colour"], "unrecognized"),
        (["describe", "nonesuch.png"], "nonesuch.png"),
        (["describe", "text.png"], "text.png"),
        (["describe", "bomb.png"], "large"),
        (["edit", "text.png", "x"], "text.png"),
        (["story", ""], "prompt"),
        (["story", "x", "-o", "story.pdf"], ".html"),
        (["story", "x", "--reference", "nonesuch.png"], "nonesuch.png"),
        (["draw", "x"], "generate"),
    ],
)
def test_bad_input(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str], said: str
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    before = files(tmp_path)
    assert said in raise_invalid(capsys, *line)
    assert engine.asked == [], "nothing is generated"
    assert files(tmp_path) == before


def test_a_failing_disk_leaves_the_old_file(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", "x", "-o", "a.png"]) == 0
    old = (tmp_path / "a.png").read_bytes()
    capsys.readouterr()

    def full(self: Image.Image, file: Any, **options: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left" in raise_invalid(capsys, "generate", "x", "-o", "a.png", "--seed", "1")
    assert (tmp_path / "a.png").read_bytes() == old and files(tmp_path) == {"a.png"}


def test_our_faults_are_not_hidden(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "info", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


def test_a_missing_extra_is_named(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.linear_model")

    monkeypatch.setattr(engine, "info", fail)
    assert "pip install 'unigen[eval]'" in raise_invalid(capsys, "info")


RECIPE = """
from unigen.config import RunConfig

def config():
    return RunConfig(steps=3, batch_size=1, run_dir="run")

def build(cfg):
    raise RuntimeError("built")
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonesuch.py"], "nonesuch.py"),
        (["recipe.py", "stepz=1"], "steps"),
        (["recipe.py", "steps=many"], "steps"),
        (["recipe.py", "optim.lr=fast"], "optim.lr"),
        (["recipe.py", "steps"], "key=value"),
        (["broken.py"], "broken.py"),
        (["empty.py"], "config"),
        ([], "required"),
    ],
)
def test_bad_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.py").write_text(RECIPE)
    Path("broken.py").write_text("def config(:")
    Path("empty.py").write_text("")
    assert said in raise_invalid(capsys, "train", *words)
    assert not Path("run").exists()
    with pytest.raises(RuntimeError, match="built"):
        main(["train", "recipe.py", "steps=4"])


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nonesuch"], "scenes"), (["scenes", "--images", "many"], "--images"), (["scenes", "--oracle"], "font")],
)
def test_bad_evaluations(monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], said: str) -> None:
    monkeypatch.setenv("UNIGEN_EMOJI_FONT", "nonesuch.ttf")
    assert said in raise_invalid(capsys, "eval", *words)


# --- the program ----------------------------------------------------------------------------------------------------


def test_bench_is_a_lazy_table(root: Path) -> None:
    done = subprocess.run([sys.executable, "scripts/bench.py", "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    done = subprocess.run([sys.executable, "scripts/bench.py", "nonesuch"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bench: error: ") and done.stderr.count("\n") == 1


def program(*line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unigen", *line], capture_output=True, text=True, timeout=120, **options
    )


def test_help_is_complete() -> None:
    """That it is quick is in test_imports.py: nothing heavy is imported for it."""
    done = program("--help")
    assert done.returncode == 0
    assert all(
        name in done.stdout for name in ("generate", "describe", "edit", "story", "chat", "train", "eval", "info")
    )


def test_exit_codes_of_the_program(tmp_path: Path) -> None:
    done = program("generate", "")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert program("--version").stdout.startswith("unigen ")


# --- chat -----------------------------------------------------------------------------------------------------------


def talk(engine: FakeEngine, lines: str, **options: Any) -> str:
    out = io.StringIO()
    Chat("pictures", **options).run(engine, io.StringIO(lines), out)
    return out.getvalue()


def test_chat_keeps_the_conversation(engine: FakeEngine, picture: str, tmp_path: Path) -> None:
    shown = talk(
        engine, f"a red dog\n\n/image {picture}\nwhat is this?\n/save talk.json\n/quit\nnever said\n", guidance=2.0
    )
    assert shown.splitlines()[:3] == ["Here you are: ", f"[{Path('pictures/picture-001.png')}]", "turn 1"]
    assert files(tmp_path / "pictures") == {"picture-001.png", "picture-002.png"}
    assert [options["seed"] for _, options in engine.asked] == [0, 1]
    assert engine.asked[0][1]["guidance"] == 2.0
    second = engine.asked[1][0].segments
    assert [s.role for s in second] == ["user", "assistant", "assistant", "assistant", "user", "user"]
    assert second[1].text == "Here you are: " and second[4].image.size == (8, 6)
    kept = Document.from_json(json.loads(Path("talk.json").read_text()))
    assert len(kept.segments) == 9 and kept.segments[-1].text == "turn 2"


def test_chat_survives_bad_input(engine: FakeEngine, tmp_path: Path) -> None:
    shown = talk(engine, "too long\n/image none.png\n/seed x\n/save x.txt\n/what\n/seed 9\nhello")
    assert shown.count("unigen: ") == 5 and "/new begins" not in shown and "unknown command /what" in shown
    assert engine.asked[-1][1]["seed"] == 9
    assert len(engine.asked[-1][0].segments) == 1, "a turn that failed is not kept"
    shown = talk(engine, "hello\ntoo long\n/new\nhello\n")
    assert "too long (/new begins again)" in shown and len(engine.asked[-1][0].segments) == 1


def test_chat_by_the_command(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a dog\n"))
    assert main(["chat", "--seed", "3", "--folder", "here/there"]) == 0
    assert Image.open("here/there/picture-001.png").getpixel((0, 0)) == (3, 120, 40)


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/x"}, None),
        ({"TERM": "xterm-256color"}, None),
    ],
)
def test_inline_protocol(environment: dict[str, str], protocol: str | None) -> None:
    assert inline_protocol(environment) == protocol


def test_inline_pictures_survive_the_way() -> None:
    """What the terminal puts together again is the picture; noise, so that several chunks are needed."""
    import base64

    noise = Image.frombytes("RGB", (32, 32), os.urandom(32 * 32 * 3))
    kitty = inline(noise, "kitty")
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty)
    assert len(chunks) > 1 and all(len(data) <= 4096 for _, data in chunks)
    assert [c.endswith("m=1") for c, _ in chunks] == [True] * (len(chunks) - 1) + [False]
    iterm = re.fullmatch(r"\x1b\]1337;File=inline=1;width=256px:([^\a]*)\a\n", inline(noise, "iterm2"))
    assert iterm is not None
    for data in ("".join(data for _, data in chunks), iterm[1]):
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 256)
