"""Disks that are full or may not be written: errors in one line, before any work where that can be.

Nothing heavy is imported here: the command line reads it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unigen.utils.text import shorten

DISK_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENAMETOOLONG"),
        *("EEXIST", "ENOTDIR", "EISDIR", "ELOOP", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
)
"""Errors of the system that are no fault of ours: a disk that is full or may not be written, a name that it refuses."""


class DiskError(ValueError):
    """A file that cannot be written, in one line."""


@contextmanager
def disk_errors(target: str, advice: str) -> Iterator[None]:
    """Inside, a disk that is full or may not be written is a DiskError; every other exception passes unchanged.

    Args:
        target: what is written, in words.
        advice: how to mend it.

    Raises:
        DiskError: in the place of the system's error, and of those that torch, tokenizers and safetensors raise.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        chain: BaseException | None = error
        while chain is not None:  # torch, tokenizers and safetensors raise their own kinds about a failed write
            match = re.search(r"\(os error (\d+)\)", str(chain))
            number = chain.errno if isinstance(chain, OSError) else int(match[1]) if match else None
            if number is not None and number in DISK_ERRNOS:
                raise DiskError(f"cannot write {target}: {os.strerror(number)}; {advice}") from error
            chain = chain.__cause__ or chain.__context__
        raise


def check_input(path: str | Path, command: str = "", name: str = "") -> Path:
    """Check a file or folder that is read, before any work.

    Args:
        path: of the file or folder.
        command: makes it.
        name: of the option that names it, as "--text" or "image_tokenizer=".

    Returns:
        The path.

    Raises:
        ValueError: it is not there, or may not be read; in one line.
    """
    display_path = f"{name} {path}".strip() if name.startswith("-") else f"{name}{path}"
    display_path = display_path if len(display_path) <= 200 else f"{display_path[:197]}..."
    if not str(path) or not os.path.exists(path):
        hint = f"make it by `{command}`, or name another" if command else "name one that is"
        raise ValueError(f"{display_path} is not there: {hint}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{display_path} may not be read: change its permissions, or name another")
    return Path(path)


def check_folder(folder: str | Path, *, replace: bool = True) -> Path:
    """Check a folder that is to be written, before any work.

    Args:
        folder: need not exist.
        replace: whether a new folder takes its place, which needs the right to write beside it.

    Returns:
        Its absolute path.

    Raises:
        ValueError: it cannot be written: a name that is too long, a file of that name, no right to; in one line.
    """
    if "\0" in str(folder):
        raise ValueError("the name of the folder holds a zero byte: choose another name")
    folder = Path(folder).absolute()
    display_path = shorten(str(folder), 120)
    try:
        for path in (folder, *folder.parents):
            try:
                path.lstat()
            except FileNotFoundError:
                continue
            if not path.is_dir():
                raise ValueError(f"{display_path} cannot be a folder: {shorten(str(path), 120)} is a file")
            parent = Path(os.path.realpath(path)).parent  # of a symbolic link: beside what it names
            for directory in (path, parent) if path == folder and replace else (path,):
                if not os.access(directory, os.W_OK | os.X_OK):
                    display_place = shorten(str(directory), 120)
                    raise ValueError(
                        f"cannot write the folder {display_path}: {display_place} may not be written; choose "
                        f"another one"
                    )
            break
    except NotADirectoryError as error:
        raise ValueError(f"{display_path} cannot be a folder: a part of its path is a file") from error
    except OSError as error:
        raise ValueError(f"cannot write the folder {display_path}: {error.strerror}; choose another name") from error
    return folder
