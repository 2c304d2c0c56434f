"""A folder that is replaced is always whole, and killed processes leave nothing for good."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unigen.hub import folders


def write(folder: Path, text: str) -> None:
    with folders.replacing_folder(folder) as scratch:
        (scratch / "weights").write_text(text)


def killed(act: Callable[[Callable[[], None]], None]) -> None:
    """Run `act` in a process that is killed where `act` calls what it is given."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:

        def here() -> None:
            os.write(tell, b"x")
            time.sleep(600)

        try:
            act(here)
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_leaves_a_whole_folder(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    write(folder, "old")
    assert not beside(folder)
    if not exchange:  # as on systems that cannot
        monkeypatch.setattr(folders, "_swap_paths", lambda *_: False)
    elif not folders._swap_paths(*map(tmp_path.joinpath, "model model".split())):
        pytest.skip("this file system cannot exchange folders")

    def before(here: Callable[[], None]) -> None:
        with folders.replacing_folder(folder) as scratch:
            (scratch / "weights").write_text("new")
            here()

    def after(here: Callable[[], None]) -> None:
        """Killed as soon as the folder has another name, or is another one."""
        real = os.replace
        if exchange:
            monkeypatch.setattr(folders.shutil, "rmtree", lambda *_, **__: here())
        else:
            monkeypatch.setattr(os, "replace", lambda a, b: (real(a, b), here()))
        write(folder, "new")

    killed(before)
    assert (folder / "weights").read_text() == "old" and len(beside(folder)) == 1
    write(folder, "old")
    assert not beside(folder)
    killed(after)
    assert folder.exists() is exchange
    with folders.replacing_folder(folder):
        assert (folder / "weights").read_text() == ("new" if exchange else "old"), "it has come back"
    assert not beside(folder) and not list(folder.iterdir())


def test_what_others_still_write_stays(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    strangers = ".model.previous", ".model.ab12cd_9.txt", ".model2.ab12cd_9.scratch"
    for name in strangers:
        (tmp_path / name).mkdir()
    with folders.replacing_folder(folder) as one:
        (one / "weights").write_text("one")
        write(folder, "two")
        assert (one / "weights").exists()
    assert (folder / "weights").read_text() == "one" and beside(folder) == sorted(strangers)


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    link, real = tmp_path / "here" / "model", tmp_path / "there" / "v1"
    link.symlink_to(real)
    for text in ("old", "new"):  # at first the link names nothing
        write(link, text)
        assert link.is_symlink() and (real / "weights").read_text() == text
        assert not beside(link) and not beside(real)
    left = real.parent / ".v1.ab12cd_9.scratch"
    left.mkdir()
    folders.clear_scratch(link)
    assert not left.exists()


def test_a_lock_ends_with_its_process_and_not_with_its_children(tmp_path: Path) -> None:
    def parent(here: Callable[[], None]) -> None:
        assert folders.lock(tmp_path)
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        with pytest.raises(BlockingIOError):
            folders.lock(tmp_path)
        here()

    killed(parent)
    handle = folders.lock(tmp_path)
    assert handle is not None
    folders.unlock(handle)
    folders.unlock(folders.lock(tmp_path))
