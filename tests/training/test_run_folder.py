"""The folder of a run: who may train in it, and what of it may be damaged.

Run: pytest tests/training/test_run_folder.py
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_trainer import losses, one_line, train
from unigen.training import checkpoint
from unigen.training.checkpoint import list_checkpoints, lock_run


def save(model: Any, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text("{}")


def holding(folder: Path) -> int:
    """A process that holds a run folder."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_run(folder):
            os.write(tell, b"locked")
            time.sleep(600)
    os.read(ready, 6)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("locks", [True, False])
def test_a_folder_is_one_folder_by_whatever_path(locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a file system without locks, where the note of the process that trains says so."""
    if not locks:
        monkeypatch.setattr(checkpoint, "lock", lambda path: None)
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    child = holding(folder)
    try:
        for path in ("run", "./run/../run", "link", str(tmp_path / "link")):
            with pytest.raises(ValueError, match=f"is in use by process {child} on ") as error:
                train(Path(path), "steps=1")
            one_line(error)
        assert not list_checkpoints(folder)
    finally:
        end(child)
    with lock_run("link"), lock_run(folder):  # as a recipe and its Trainer do in one process
        assert train(Path("link"), "steps=1")["step"] == 1


def test_a_note_of_another_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "lock", lambda path: None)
    (tmp_path / checkpoint.LOCK_NOTE).write_text("process 1 on elsewhere")
    with lock_run(tmp_path):
        pass
    assert "was last used by process 1 on elsewhere: make sure that it has ended" in capsys.readouterr().out


def test_what_others_left_in_a_run_folder_stays(tmp_path: Path) -> None:
    """Also where it has a name that an unfinished file of ours would have."""
    folders = "checkpoints/step-00000001.tmp", "samples/.ipynb_checkpoints", ".model.previous", "metrics.tmp"
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "checkpoints" / "notes.tmp").write_text("mine")
    (tmp_path / "samples" / ".unigen-ab12cd_9").mkdir()
    with lock_run(tmp_path):
        pass
    assert all((tmp_path / name / "mine").exists() for name in folders)
    assert (tmp_path / "checkpoints" / "notes.tmp").exists()
    assert not (tmp_path / "samples" / ".unigen-ab12cd_9").exists()


def test_what_cannot_be_removed_holds_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "metrics.tmp").write_text("half")
    monkeypatch.setattr(checkpoint, "clear_scratch", forbidden)
    with monkeypatch.context() as within:
        within.setattr(Path, "unlink", forbidden)
        with lock_run(tmp_path):
            assert (tmp_path / "metrics.tmp").exists()


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard", "model"])
def test_a_file_in_the_place_of_a_folder_is_told_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is a file, where a run has a folder: move it") as error:
        train(tmp_path, save_model=save)
    one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", ".running"])
def test_a_folder_in_the_place_of_a_file_is_told_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is a folder, where a run has a file: move it") as error:
        train(tmp_path, save_model=save)
    one_line(error)


def test_run_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("file", "file/run", "circle", "a" * 300, "zero\0byte"):
        with pytest.raises(ValueError, match="cannot use the run folder") as error:
            train(tmp_path / name)
        one_line(error)


def test_a_model_of_which_a_part_is_gone_is_written_again(tmp_path: Path) -> None:
    train(tmp_path, "steps=2", save_model=save)
    weights = torch.load(tmp_path / "model" / "weights.pt")
    for lost in ("config.json", "weights.pt", "."):
        path = tmp_path / "model" / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        train(tmp_path, "steps=2", save_model=save)
        again = torch.load(tmp_path / "model" / "weights.pt")
        assert (tmp_path / "model" / "config.json").exists()
        assert all(torch.equal(again[name], weights[name]) for name in weights)
    (tmp_path / "model" / "README.md").write_text("mine")
    train(tmp_path, "steps=2", save_model=save)
    assert (tmp_path / "model" / "README.md").exists(), "a whole model is left as it is"


def test_other_files_beside_checkpoints_are_left_alone(tmp_path: Path) -> None:
    train(tmp_path, "steps=2", "save_every=1", "keep_checkpoints=1")
    (kept,) = list_checkpoints(tmp_path)
    for name in ("step-best.pt", "step-00000001 (copy).pt", "step-00000009.pt.bak"):
        shutil.copyfile(kept, kept.with_name(name))
    assert list_checkpoints(tmp_path) == [kept]
    train(tmp_path, "steps=4", "keep_checkpoints=1")
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 4
    for step in (99_999_999, 100_000_000):
        shutil.copyfile(list_checkpoints(tmp_path)[0], kept.with_name(f"step-{step}.pt"))
    assert list_checkpoints(tmp_path)[-1].name == "step-100000000.pt", "by number and not by letters"


@pytest.mark.parametrize(("cut", "kept"), [(1, [1, 2, 3, 4]), (30, [1, 2, 3]), (10_000, [])])
def test_a_curve_that_is_cut_goes_on(cut: int, kept: list[int], tmp_path: Path) -> None:
    train(tmp_path, "steps=4")
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    train(tmp_path, "steps=6")
    assert [line[0] for line in losses(tmp_path)] == [*kept, 5, 6]
