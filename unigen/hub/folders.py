"""Folders that are replaced whole, and locks of files and folders, which end with the process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held_locks: set[int] = set()
"""Descriptors of the locks that this process holds."""


def lock(path: str | Path) -> int | None:
    """Take the lock of a file or folder, without waiting.

    It ends with this process, however that ends; processes that are forked do not have it.

    Args:
        path: must exist.

    Returns:
        What `unlock` takes; None where the file system has no locks.

    Raises:
        BlockingIOError: another process has it.
        OSError: there is no such file.
    """
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    _held_locks.add(handle)
    return handle


def unlock(handle: int | None) -> None:
    """Give a lock back; None is no lock."""
    if handle is not None:
        _held_locks.discard(handle)
        os.close(handle)


def _close_locks() -> None:
    for handle in _held_locks:
        os.close(handle)
    _held_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)  # a child that outlives a killed process would keep its locks


def clear_scratch(folder: Path) -> None:
    """Remove the scratch folders that killed processes left beside `folder`, links followed. Where one was killed while
    `folder` had no name, its old contents come back."""
    folder = Path(os.path.realpath(folder))
    scratch_pattern = re.compile(rf"\.{re.escape(_scratch_name(folder))}\.(\w{{8}}\.scratch|\w{{8}}\.old|old\d+)")
    for scratch_folder in sorted(folder.parent.iterdir()):
        if not scratch_pattern.fullmatch(scratch_folder.name) or not scratch_folder.is_dir():
            continue
        try:
            handle = lock(scratch_folder)
        except OSError:
            continue
        if handle is None:  # nobody can say whether it is still written
            continue
        if not scratch_folder.name.endswith(".scratch") and not folder.exists():
            os.replace(scratch_folder, folder)
        else:
            shutil.rmtree(scratch_folder, ignore_errors=True)
        unlock(handle)


def _scratch_name(folder: Path) -> str:
    """With what the names of a folder's scratch folders begin: its own name, or a digest of a long one, since theirs
    are longer and names have at most 255 bytes."""
    name = os.fsencode(folder.name)
    return folder.name if len(name) <= 200 else hashlib.blake2b(name, digest_size=16).hexdigest()


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well; else nothing is changed.

    A process that is killed leaves a whole `folder`, the old or the new one, and beside it a scratch folder that the
    next call removes.

    Args:
        folder: need not exist. Where it is a symbolic link, what it names is replaced and the link stays.

    Yields:
        The temporary folder, beside `folder`.

    Raises:
        ValueError: the folder cannot be written; in one line.
    """
    folder = Path(os.path.realpath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_scratch(folder)
        scratch = Path(tempfile.mkdtemp(prefix=f".{_scratch_name(folder)}.", suffix=".scratch", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"cannot write the folder {folder}: {error.strerror}") from error
    handle = lock(scratch)
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists() and not _swap_paths(scratch, folder):
            old = scratch.with_suffix(".old")
            os.replace(folder, old)
            os.replace(scratch, folder)
            shutil.rmtree(old, ignore_errors=True)
        elif not folder.exists():
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        unlock(handle)


def _swap_paths(first: Path, second: Path) -> bool:
    """Let two paths swap what they name, in one step. False where the system cannot; Linux can."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    at_fdcwd, rename_exchange = -100, 2
    return swap is not None and swap(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0
