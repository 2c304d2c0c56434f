"""The command line and the world around it: names, encodings, full disks, closed pipes. One line, the right exit code.

Run: pytest tests/test_cli_files.py
"""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from tests.test_cli import FakeEngine, engine, files, picture, raise_invalid  # noqa: F401
from unigen.commands.main import main
from unigen.document import Document
from unigen.hub.folders import replacing_folder
from unigen.media import output
from unigen.media.output import markdown_code, write_story
from unigen.model import saving
from unigen.utils.disk import check_folder, disk_errors

LONGEST = 255
"""Bytes of a name on the file systems of Linux."""


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "雪" * 83 + ".webp"])
def test_the_longest_names_are_written(engine: FakeEngine, tmp_path: Path, name: str) -> None:  # noqa: F811
    assert len(name.encode()) in (LONGEST, LONGEST - 1)
    assert main(["generate", "x", "-o", name]) == 0
    assert files(tmp_path) == {name}


@pytest.mark.parametrize(
    "line",
    [
        ["generate", "x", "-o", "a" * 252 + ".png"],
        ["generate", "x", "-n", "2", "-o", "a" * 250 + ".png"],
        ["story", "x", "-o", "a" * 300 + ".html"],
        ["story", "x", "-o", "a" * 250 + ".md"],
        ["edit", "PICTURE", "x", "-o", "a/" * 3000 + "a.png"],
        ["info", "--json", "a" * 300 + ".json"],
    ],
)
def test_names_that_are_too_long_are_refused_before_the_work(
    engine: FakeEngine,  # noqa: F811
    picture: str,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
    line: list[str],
) -> None:
    before = files(tmp_path)
    said = raise_invalid(capsys, *[picture if word == "PICTURE" else word for word in line])
    assert "File name too long" in said and len(said) < 300
    assert not engine.asked and files(tmp_path) == before


def test_files_are_no_folders(engine: FakeEngine, picture: str, capsys: Any) -> None:  # noqa: F811
    assert "is a file and no folder" in raise_invalid(capsys, "generate", "x", "-o", f"{picture}/a.png")
    assert "is a file and no folder" in raise_invalid(capsys, "story", "x", "-o", f"{picture}/a.md")


@pytest.mark.parametrize("name", ["story.md", "my story.md", "s#1.md", "a(b.md", "100%25.md", "雪.md", "[x](y).md"])
def test_links_to_pictures_survive_their_names(tmp_path: Path, name: str) -> None:
    written = write_story(tmp_path / name, "t", ["one", Image.new("RGB", (4, 4))], "unigen story `x` -o 'y z'")
    text = (tmp_path / name).read_text()
    (link,) = re.findall(r"!\[\]\((\S+)\)\n", text)
    assert re.fullmatch(r"[\w.%~-]+", link, re.ASCII), "nothing that Markdown or URLs give a meaning to"
    assert tmp_path / unquote(link) == written[1] and written[1].is_file()
    assert "Made by `` unigen story `x` -o 'y z' ``" in text


def test_code_is_fenced_by_more_backticks_than_it_has() -> None:
    assert markdown_code("a") == "`a`" and markdown_code("a `b`` c") == "``` a `b`` c ```"


@pytest.mark.parametrize("line", [["generate"], ["story"], ["edit", "PICTURE"], ["describe", "PICTURE", "-q"]])
def test_words_of_another_encoding_are_refused(
    engine: FakeEngine,  # noqa: F811
    picture: str,  # noqa: F811
    capsys: Any,
    line: list[str],
) -> None:
    words = os.fsdecode(b"a caf\xe9")  # as Python has the bytes of a terminal in latin-1
    assert "not in UTF-8" in raise_invalid(capsys, *[picture if word == "PICTURE" else word for word in line], words)
    assert not engine.asked


def test_a_narrow_stdout_loses_nothing(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["generate", "x", "-o", "雪.png"]) == 0
    assert narrow.buffer.getvalue() == b"\\u96ea.png\n"  # type: ignore[attr-defined]
    assert Path("雪.png").is_file()


def test_paths_of_another_encoding_are_written(engine: FakeEngine, tmp_path: Path) -> None:  # noqa: F811
    name = os.fsdecode(b"caf\xe9.html")
    assert main(["story", "x", "-o", name]) == 0
    assert os.listdir(os.fsencode(tmp_path)) == [b"caf\xe9.html"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
@pytest.mark.parametrize(
    "line", [["info"], ["--help"], ["generate", "--help"], ["serve", "--help"], ["describe", "PICTURE"]]
)
def test_a_full_stdout_is_one_line(
    engine: FakeEngine,  # noqa: F811
    picture: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    line: list[str],
) -> None:
    full = open("/dev/full", "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", full)
    assert main([picture if word == "PICTURE" else word for word in line]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "No space left on device" in shown
    full.close()  # nothing is left to be written


def test_a_closed_pipe_ends_quietly(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # noqa: F811
    read, write = os.pipe()
    os.close(read)
    pipe = open(write, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert main(["info"]) == 0
    assert capsys.readouterr().err == ""
    pipe.close()


WRITES = [
    ["generate", "x", "-o", "out.png"],
    ["generate", "x", "-n", "2", "-o", "out.jpg"],
    ["generate", "x", "-n", "2", "--grid", "-o", "out.webp"],
    ["edit", "PICTURE", "x", "-o", "out.png"],
    ["story", "x", "-o", "out.html"],
    ["story", "x", "-o", "out.md"],
    ["info", "--json", "out.json"],
]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("line", WRITES)
def test_a_disk_that_refuses_leaves_nothing_behind(
    engine: FakeEngine,  # noqa: F811
    picture: str,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    line: list[str],
    number: int,
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("unigen.media.output.os.chmod", fail)  # what comes after all bytes, and before the final name
    before = files(tmp_path)
    assert main([picture if word == "PICTURE" else word for word in line]) == 2
    shown = capsys.readouterr().err
    assert shown.count("unigen: error: ") == 1 and "Traceback" not in shown and "cannot write" in shown
    assert files(tmp_path) == before


def test_a_link_stays_one(engine: FakeEngine, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    """What it points to is written; a link into a folder that is not there is refused before the work."""
    Path("elsewhere").mkdir()
    for name in ("new", "old"):
        Path(f"{name}.png").symlink_to(f"elsewhere/{name}.png")
    Path("elsewhere/old.png").write_bytes(b"old")
    for name in ("new", "old"):
        assert main(["generate", "x", "-o", f"{name}.png"]) == 0
        assert Path(f"{name}.png").is_symlink() and Image.open(f"elsewhere/{name}.png").size == (16, 16)
    assert files(tmp_path / "elsewhere") == {"new.png", "old.png"}
    Path("lost.png").symlink_to("nowhere/lost.png")
    asked = len(engine.asked)
    capsys.readouterr()
    assert (
        "cannot write 'lost.png'" in raise_invalid(capsys, "generate", "x", "-o", "lost.png")
        and len(engine.asked) == asked
    )


def test_an_error_of_the_system_elsewhere_is_one_line(
    engine: FakeEngine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere/file")

    monkeypatch.setattr(engine, "info", fail)
    assert "cannot read or write somewhere/file: No space left on device" in raise_invalid(capsys, "info")

    def fault(*_: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "of ours", "file")

    monkeypatch.setattr(engine, "info", fault)
    with pytest.raises(FileNotFoundError):
        main(["info"])


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a" * 300, "File name too long"),
        ("there.txt", "is a file"),
        ("there.txt/model", "is a file"),
        ("a\0b", "zero byte"),
    ],
)
def test_folders_that_cannot_be_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, said: str
) -> None:
    from unigen import models

    monkeypatch.chdir(tmp_path)
    Path("there.txt").write_text("")
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    assert said in raise_invalid(capsys, "convert", "unigen-tiny", "-o", name)
    assert files(tmp_path) == {"there.txt"}
    assert check_folder("new/model") == tmp_path / "new" / "model"


@pytest.mark.parametrize("closed", ["there/model", "there", None])
def test_folders_that_may_not_be_written_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, closed: str | None
) -> None:
    """One that is there, or the one that it lies in, where that which takes its place is made."""
    from unigen import models

    monkeypatch.chdir(tmp_path)
    Path("there/model").mkdir(parents=True)
    access = os.access
    shut = tmp_path / (closed or "nowhere")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shut and access(path, mode))
    if closed is None:
        assert check_folder("there/model") == tmp_path / "there/model"
        return
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    assert f"{str(shut)!r} may not be written" in raise_invalid(capsys, "convert", "unigen-tiny", "-o", "there/model")
    if closed == "there":
        Path("elsewhere").mkdir()
        Path("elsewhere/link").symlink_to(shut / "model")
        assert f"{str(shut)!r} may not be written" in raise_invalid(
            capsys, "convert", "unigen-tiny", "-o", "elsewhere/link"
        )
        assert check_folder("there/model", replace=False) == tmp_path / "there/model"


@pytest.mark.parametrize("name", ["a" * 255, "雪" * 85, "model"])
def test_folders_of_the_longest_names_are_replaced(tmp_path: Path, name: str) -> None:
    for text in ("old", "new"):
        with replacing_folder(tmp_path / name) as scratch:
            (scratch / "file").write_text(text)
    assert (tmp_path / name / "file").read_text() == "new" and files(tmp_path) == {name}


def test_the_rights_of_new_files_are_read_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would read the value that the first one sets for a moment, and leave it for good."""
    value, inside = 0o027, threading.Event()
    seen: list[int] = []

    def umask(new: int) -> int:
        nonlocal value
        old, value = value, new
        if not inside.is_set():
            inside.set()
            second.join(0.2)  # it waits, or has been here before this one is out
        return old

    def read() -> None:
        inside.wait()
        seen.append(output._umask())

    monkeypatch.setattr("unigen.media.output.os.umask", umask)
    second = threading.Thread(target=read)
    second.start()
    seen.append(output._umask())
    second.join()
    assert seen == [0o027, 0o027] and value == 0o027


def raised(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", ["system", "safetensors", "tokenizers", "ours"])
def test_a_full_disk_while_a_model_is_converted(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: str
) -> None:
    from safetensors import SafetensorError

    full = "No space left on device (os error 28)"
    kinds = {
        "system": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "safetensors": SafetensorError(f"Error while serializing: I/O error: {full}"),
        "tokenizers": Exception(full),
        "ours": RuntimeError("a bug"),
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saving, "write_tensors", raised(kinds[error]))
    if error == "ours":
        with pytest.raises(RuntimeError, match="a bug"):
            main(["convert", str(tiny_folder), "-o", "new"])
    else:
        said = raise_invalid(capsys, "convert", str(tiny_folder), "-o", "new")
        assert re.search("cannot write the folder .*new: No space left on device; free some space", said)
    assert files(tmp_path) == set()
    with pytest.raises(KeyError), disk_errors("x", "y"):
        raise KeyError("another fault")


def test_half_a_character_in_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        Document.from_json({"segments": [{"text": "a \ud83d"}]})


@pytest.mark.parametrize(
    "line",
    [
        ["generate", "x", "-o", "out.png"],
        ["story", "x", "-o", "out.html"],
        ["edit", "PICTURE", "x", "-o", "out.png"],
        ["info", "--json", "out.json"],
    ],
)
def test_what_a_killed_command_left_is_removed_by_the_next(
    engine: FakeEngine,  # noqa: F811
    picture: str,  # noqa: F811
    tmp_path: Path,
    line: list[str],
) -> None:
    left, young, mine = ".unigen-ab12_xyz.tmp", ".unigen-zz12_xyz.tmp", ".unigen-settings"
    for name, age in ((left, 4000), (young, 5), (mine, 4000)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    assert main([picture if word == "PICTURE" else word for word in line]) == 0
    assert {young, mine} < files(tmp_path) and left not in files(tmp_path)


@pytest.mark.parametrize(("body", "code", "said"), [("return 3", 3, ""), ("raise KeyError('a fault')", 1, "a fault")])
def test_a_command_ends_at_once(body: str, code: int, said: str, root: Path) -> None:
    """What is registered for the end is done; the interpreter is not torn down, which takes seconds with torch."""
    program = f"""if True:
        import atexit
        from unigen.commands import main as cli
        class Late:
            def __del__(self): print("torn down")
        late = Late()
        atexit.register(print, "at the end")
        def main(): {body}
        cli.main = main
        cli.run()"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == code and done.stdout == "at the end\n" and said in done.stderr
    assert ("Traceback" in done.stderr) is (code == 1)
