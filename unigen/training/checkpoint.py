"""The files of a run: checkpoints, the averaged weights (EMA), the folder of the finished model.

Every file appears under a temporary name and is renamed when complete, so that a full disk or a kill leaves the last
good one. Does not depend on: what is trained.

    save_checkpoint(run_dir, state, keep_checkpoints=2);  state = load_checkpoint(run_dir)   # None: a fresh run
"""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from unigen.hub.folders import clear_scratch, lock, replacing_folder, unlock
from unigen.training.peers import is_alive
from unigen.utils.disk import disk_errors
from unigen.utils.files import load_json, save_json


class EMA:
    """Exponential moving average of the trained weights, in fp32.

        w <- d w + (1 - d) p,    d = min(decay, (1 + n) / (10 + n))

    n counts the updates, so that a short run is not an average with its random start (as in TensorFlow's
    ExponentialMovingAverage with num_updates). Frozen weights and buffers are not averaged.

    Args:
        model: whose weights are averaged.
        decay: the largest d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._shadow = {name: p.detach().float().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the average, after a step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = [p.detach().float() for p in self._weights.values()]
        torch._foreach_lerp_(list(self._shadow.values()), current, 1 - decay)

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Give the model the averaged weights inside the context; afterwards it has its own again, bit for bit."""
        original = {name: p.detach().clone() for name, p in self._weights.items()}
        with torch.no_grad():
            for name, p in self._weights.items():
                p.copy_(self._shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._weights.items():
                    p.copy_(original[name])

    def state_dict(self) -> dict[str, object]:
        """Return the number of updates and the averaged weights by name."""
        return {"updates": self.num_updates, "average": dict(self._shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_updates = state["updates"]
        for name, average in self._shadow.items():
            average.copy_(state["average"][name])


# ---------------------------------------------------------------- checkpoints


_CHECKPOINT_PATTERN = re.compile(r"step-\d{8,}\.pt")


def _checkpoint_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. Files with other names, such as copies, are ignored."""
    paths = {path: _CHECKPOINT_PATTERN.fullmatch(path.name) for path in _checkpoint_folder(run_dir).glob("step-*.pt")}
    return sorted((path for path, match in paths.items() if match), key=lambda path: int(path.stem.rpartition("-")[2]))


def save_checkpoint(run_dir: Path, state: Mapping[str, object], keep: int) -> Path:
    """Write a checkpoint, and remove old ones.

    Args:
        run_dir: folder of the run.
        state: nested dicts of tensors and plain values, with "step".
        keep: how many of the newest checkpoints stay, at least 1.

    Returns:
        The file.

    Raises:
        ValueError: the disk is full or cannot be written; the checkpoints already there are untouched then.
    """
    path = _checkpoint_folder(run_dir) / f"step-{state['step']:08d}.pt"
    temporary = path.with_suffix(".tmp")
    good = list_checkpoints(run_dir)
    last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was saved before"
    with disk_errors(f"the checkpoint {path}", f"{last}; free some space and run the same command again"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                hashing = _HashingWriter(file)
                torch.save(state, cast(IO[bytes], hashing))  # torch only writes and flushes
                file.write(hashing.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    for old in list_checkpoints(run_dir)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint of a run.

    Args:
        run_dir: folder of the run.

    Returns:
        The state that was saved, on the CPU; None where the run has no checkpoint.

    Raises:
        ValueError: the checkpoint is damaged; in one line.
    """
    paths = list_checkpoints(run_dir)
    if not paths:
        return None
    path = paths[-1]
    try:
        _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        hint = f"the run goes on from {paths[-2].name}" if len(paths) > 1 else "the run starts afresh"
        raise ValueError(f"the checkpoint {path} is damaged or unreadable; delete it and {hint}") from error


class _HashingWriter:
    """A write-only file that hashes what is written. torch does not verify the checksums of the zip when it reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.blake2b(digest_size=32)

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


def _verify(path: Path) -> None:
    """Compare a file with the 32-byte BLAKE2b digest at its end. ValueError where they differ."""
    size, digest = path.stat().st_size - 32, hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
        if size != 0 or file.read() != digest.digest():
            raise ValueError("the checksum does not match")


# ---------------------------------------------------------------- the finished model


def save_model(run_dir: Path, step: int, write: Callable[[Path], None]) -> None:
    """Write the model of a run to run_dir/model, which is replaced whole, and record its step.

    Args:
        run_dir: folder of the run.
        step: of the model.
        write: writes the model to a folder.

    Raises:
        ValueError: the disk is full; the model that was there is untouched then.
    """
    folder = run_dir / "model"
    with disk_errors(str(folder), "what was saved before is untouched; free some space and run the same command again"):
        with replacing_folder(folder) as scratch:
            write(scratch)
            files = sorted(str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file())
        save_json(_model_record_path(run_dir), {"step": step, "files": files})


def has_model_of_step(run_dir: Path, step: int) -> bool:
    """Check whether run_dir/model was written at a step and has all its files.

    A run may have been killed between its checkpoint and its model, and a part of the model deleted.

    Args:
        run_dir: folder of the run.
        step: of the checkpoint.
    """
    folder = run_dir / "model"
    try:
        record = load_json(_model_record_path(run_dir))
        files = record.get("files", [])  # earlier versions recorded the step alone
        return folder.is_dir() and record["step"] == step and all((folder / name).is_file() for name in files)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _model_record_path(run_dir: Path) -> Path:
    return _checkpoint_folder(run_dir) / "model.json"


def record_samples(run_dir: Path, step: int) -> None:
    """Record that the samples of a step are complete."""
    save_json(_checkpoint_folder(run_dir) / "samples.json", {"step": step})


def has_samples_of_step(run_dir: Path, step: int) -> bool:
    """Check whether the samples of a step are complete, and none are newer."""
    try:
        return load_json(_checkpoint_folder(run_dir) / "samples.json") == {"step": step}
    except ValueError:
        return False


# ---------------------------------------------------------------- one process a folder

LOCK_NOTE = ".running"
"""File of a run folder that says which process trains there."""
TEMP_PREFIX = ".unigen-"
"""Prefix of the names of unfinished samples, and of other unfinished files of the package."""
_locked_folders: set[Path] = set()
"""Run folders that this process has locked, with links followed."""


@contextmanager
def lock_run(run_dir: str | Path, main: bool = True) -> Iterator[None]:
    """Lock a run folder, so that no other run trains in it, and remove what a killed run left unfinished there.

    Args:
        run_dir: the folder; it is made where it is missing. Several paths to one folder are the same folder.
        main: whether this is the main process of the run; the others take no lock.

    Raises:
        ValueError: another run trains there, or the folder cannot be used; in one line.
    """
    folder = _resolve(run_dir)
    if folder in _locked_folders or not main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_run_paths(folder)
        handle = _acquire_lock(folder)
    except OSError as error:
        raise ValueError(f"cannot use the run folder {run_dir}: {error.strerror}; choose another run_dir") from error
    _locked_folders.add(folder)
    try:
        _remove_temporary_files(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK_NOTE).unlink(missing_ok=True)
        _locked_folders.discard(folder)
        unlock(handle)


def _resolve(run_dir: str | Path) -> Path:
    """Return the folder with links followed."""
    try:
        return Path(run_dir).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a zero byte
        raise ValueError(f"cannot use the run folder {str(run_dir)!r}: {error}; choose another run_dir") from error


def _acquire_lock(run_dir: Path) -> int | None:
    """Return the handle that `unlock` takes. ValueError where another process has the folder."""
    note, host, me = run_dir / LOCK_NOTE, socket.gethostname(), os.getpid()
    owner = note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else ""
    advice = "wait until it ends, or choose another run_dir"
    try:
        handle = lock(run_dir)
    except BlockingIOError as error:
        raise ValueError(f"{run_dir} is in use by {owner or 'another process'}: {advice}") from error
    if handle is None and (match := re.fullmatch(r"process (\d+) on (\S+)", owner)):  # a file system without locks
        if match[2] != host:
            print(f"{run_dir} was last used by {owner}: make sure that it has ended", flush=True)
        elif int(match[1]) != me and is_alive(int(match[1])):
            raise ValueError(f"{run_dir} is in use by {owner}: {advice}")
    with suppress(OSError):  # a full disk is reported where the run has to write
        note.write_text(f"process {me} on {host}", encoding="utf-8")
    return handle


def _check_run_paths(run_dir: Path) -> None:
    """ValueError where a file stands in the place of a folder of the run, or a folder in the place of a file."""
    advice = "move it, or choose another run_dir"
    for path in (run_dir / name for name in ("checkpoints", "samples", "tensorboard", "model")):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, where a run has a folder: {advice}")
    for path in (run_dir / name for name in ("config.json", "metrics.jsonl", LOCK_NOTE)):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, where a run has a file: {advice}")


def _remove_temporary_files(run_dir: Path) -> None:
    """Remove what killed processes of this run left unfinished.

    What cannot be removed stays, since it does not disturb a run. Files and folders with other names stay, too.
    """
    with suppress(OSError):
        clear_scratch(run_dir / "model")
    with suppress(OSError):
        if (run_dir / "model.old").is_dir() and not (run_dir / "model").exists():  # as earlier versions named it
            os.replace(run_dir / "model.old", run_dir / "model")
    letters = "[a-z0-9_]" * 8  # as tempfile draws them
    folders = "model.tmp", "model.old", f".model.{letters}.scratch", f".model.{letters}.old", f"samples/{TEMP_PREFIX}*"
    for stale_path in (stale_path for pattern in folders for stale_path in list(run_dir.glob(pattern))):
        if stale_path.is_dir() and not stale_path.is_symlink():
            shutil.rmtree(stale_path, ignore_errors=True)
    files = "metrics.tmp", ".config.json.*.tmp", ".unigen-*.tmp", "checkpoints/step-*.tmp", "checkpoints/.unigen-*.tmp"
    for stale_path in (stale_path for pattern in files for stale_path in list(run_dir.glob(pattern))):
        with suppress(OSError):  # a folder, or a file that may not be removed
            stale_path.unlink()


def tree_to_cpu(tree: object) -> Any:
    """Move tensors to the CPU, so that a checkpoint opens on any machine.

    Args:
        tree: nested dicts, lists and tuples of tensors and plain values.

    Returns:
        The same with every tensor on the CPU, and lists in the place of tuples.
    """
    if isinstance(tree, Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: tree_to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [tree_to_cpu(value) for value in tree]
    return tree
