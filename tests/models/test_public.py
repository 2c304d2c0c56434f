"""Every public family's folder as a user meets it: the commands, conversion, and what is wrong with a damaged one."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unigen
from scripts.parity import families
from unigen import cli, hub
from unigen.models import convert
from unigen.sequence import Document

FOLDERS: dict[str, Path] = {}


@pytest.fixture(params=families())
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(family: str) -> Any:
    return importlib.import_module(f"tests.parity.{family}")


@pytest.fixture
def public(family: str, case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the family's public layout."""
    if family not in FOLDERS:
        FOLDERS[family] = tmp_path_factory.mktemp(family)
        case.checkpoint(FOLDERS[family])
    return FOLDERS[family]


def test_the_commands(family: str, case: Any, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--model", str(public), "--device", "cpu"]
    width, height = case.SIZE
    picture = tmp_path / "out.png"
    assert cli.main(["info", *where]) == 0
    printed = capsys.readouterr().out
    assert family in printed
    assert cli.main(["generate", *case.ASKED, "-o", str(picture), "--size", f"{width}x{height}", *where]) == 0
    assert Image.open(picture).size == (width, height)
    engine = unigen.load(str(public), "cpu")
    described = cli.main(["describe", str(picture), "-q", "What is it", *where])
    assert described == (0 if "text" in engine.outputs else 2)
    told = cli.main(["story", "a witch", "-o", str(tmp_path / "story.md"), *where])
    assert told == (0 if "interleaved" in engine.outputs else 2)
    assert (tmp_path / "story.md").exists() == (told == 0)
    assert "Traceback" not in capsys.readouterr().err


def test_conversion_there_and_back_changes_nothing(case: Any, public: Path, tmp_path: Path) -> None:
    convert(public, tmp_path / "ours")
    assert (tmp_path / "ours" / hub.MANIFEST).is_file()
    convert(tmp_path / "ours", tmp_path / "public", "public")
    first, *others = (unigen.load(str(folder), "cpu") for folder in (public, tmp_path / "ours", tmp_path / "public"))
    picture = first.generate(case.PROMPT, size=case.SIZE)
    for other in others:
        mine, theirs = first.model.state_dict(), other.model.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert other.generate(case.PROMPT, size=case.SIZE).tobytes() == picture.tobytes()
        assert other.info() == first.info()


def test_a_folder_that_is_no_model_is_not_replaced(public: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no model"):
        convert(public, tmp_path)
    assert (tmp_path / "notes.txt").is_file()


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


def poison(path: Path) -> None:
    torch.save({"state_dict": Evil()}, path)


@pytest.mark.parametrize(
    ("harm", "safe", "pickled"),
    [
        (cut, "cannot be loaded|cannot be read", "cannot be read|damaged"),
        (forget, "missing", "missing"),
        (poison, "", "might run code"),
        (Path.unlink, "cannot be|holds neither|missing|has no weights", "has no|missing|holds neither"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    harm: Callable[[Path], None],
    safe: str,
    pickled: str,
    public: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [path.relative_to(public) for path in public.rglob("*") if path.suffix in (".safetensors", ".ckpt", ".pt")]
    for file in [*files, *([Path("config.json")] if (public / "config.json").is_file() else [])]:
        reason = pickled if file.suffix in (".ckpt", ".pt") else safe
        if not reason or (file.suffix == ".json" and harm is forget):
            continue
        folder = tmp_path / file.name
        shutil.copytree(public, folder)
        harm(folder / file)
        assert cli.main(["info", "--model", str(folder), "--device", "cpu"]) == 2, file
        told = capsys.readouterr()
        assert any(words in told.err for words in reason.split("|")), (file, told.err)
        assert len(told.err.strip().splitlines()) == 1 and "must not run" not in told.out


def test_names_on_the_hub(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("someone/something", "someone/something@v1.0"):
        assert cli.main(["info", "--model", name, "--device", "cpu"]) == 2
        told = capsys.readouterr().err
        assert name in told and "not in the hub's cache" in told and len(told.strip().splitlines()) == 1


def test_a_folder_of_no_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert cli.main(["info", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "'bert', which is of no family known here" in capsys.readouterr().err


def test_the_table_in_the_docs(family: str, public: Path, root: Path) -> None:
    """What docs/models.md says that a family can do is what it can do."""
    lines = (root / "docs" / "models.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    titles, said = rows[0], [row for row in rows if row[0] == family]
    assert len(said) == 1, f"give {family} one row in docs/models.md"
    told = dict(zip(titles, said[0], strict=True))
    engine = unigen.load(str(public), "cpu")
    picture = Image.new("RGB", (32, 32))
    able = {
        "draws": "image" in engine.outputs,
        "answers": "text" in engine.outputs,
        "interleaves": "interleaved" in engine.outputs,
        "edits": True,
    }
    try:
        engine.model.template.prompt(engine.model.read(Document.of([picture, "make it red"])), output="image")
    except ValueError:
        able["edits"] = False
    assert {name: told[name] for name in able} == {name: "yes" if can else "no" for name, can in able.items()}
    assert told["sizes"] == ("any" if engine.model.template.free_size else "one")
    assert re.search(r"`[\w.-]+/[\w.:-]+`", told["first command's `--model`"])
