"""What a run leaves on disk: checkpoints, the averaged weights (EMA), the folder of the finished model.

It refuses to know what is trained. Every file appears under a temporary name and is renamed when complete, so that a
full disk or a kill leaves the last good one.

    save_checkpoint(run_dir, state, keep=2);  state = load_checkpoint(run_dir)   # None: a fresh run
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of the trained weights, in fp32: w <- d w + (1 - d) p, d = min(decay, (1 + n) / (10 +
    n)).

    n counts the updates, so that a short run is not an average with its random start (as in TensorFlow's
    ExponentialMovingAverage with num_updates). Frozen weights and buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().float().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = [p.detach().float() for p in self._weights.values()]
        torch._foreach_lerp_(list(self._average.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights; afterwards its own again, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._weights.items()}
        with torch.no_grad():
            for name, p in self._weights.items():
                p.copy_(self._average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._weights.items():
                    p.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in self._average.items():
            average.copy_(state["average"][name])


# ---------------------------------------------------------------- checkpoints


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(_folder(run_dir).glob("step-*.pt"))


def save_checkpoint(run_dir: Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state` (nested dicts of tensors and plain values, with "step") and drop all but the newest `keep`.

    ValueError where the disk is full or cannot be written; the checkpoints already there are then untouched.
    """
    path = _folder(run_dir) / f"step-{state['step']:08d}.pt"
    temporary = path.with_suffix(".tmp")
    good = checkpoints(run_dir)
    last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was saved before"
    with disk_errors(f"the checkpoint {path}", f"{last}; free some space and run the same command again"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                hashing = _HashingWriter(file)
                torch.save(state, hashing)
                file.write(hashing.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except Exception:
            temporary.unlink(missing_ok=True)
            raise
    for old in checkpoints(run_dir)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """The newest checkpoint on the CPU, or None where the run has none. ValueError with one line where it is
    damaged."""
    found = checkpoints(run_dir)
    if not found:
        return None
    path = found[-1]
    try:
        _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        rest = f"the run goes on from {found[-2].name}" if len(found) > 1 else "the run starts afresh"
        raise ValueError(f"the checkpoint {path} is damaged or unreadable; delete it and {rest}") from error


class _HashingWriter:
    """A write-only file that hashes what passes through: a zip's own checksums are not verified when torch reads it."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash = file, hashlib.blake2b(digest_size=32)

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


def _verify(path: Path) -> None:
    """Compare the file with the 32-byte BLAKE2b digest at its end."""
    size, digest = path.stat().st_size - 32, hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
        if size != 0 or file.read() != digest.digest():
            raise ValueError("the checksum does not match")


# ---------------------------------------------------------------- the finished model


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a new folder beside `folder`, which then takes its place. ValueError where the disk is full."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (temporary, old) if folder.exists() else (temporary,):
        shutil.rmtree(leftover, ignore_errors=True)
    with disk_errors(str(folder), "what was saved before is untouched; free some space and run the same command again"):
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def disk_errors(what: str, advice: str) -> Iterator[None]:
    """A disk that is full or may not be written becomes one ValueError; every other exception passes unchanged."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        chain: BaseException | None = error
        while chain is not None:  # torch and safetensors raise their own kinds about a failed write
            if isinstance(chain, OSError) and chain.errno in _DISK:
                raise ValueError(f"cannot write {what}: {chain.strerror}; {advice}") from error
            if "(os error 28)" in str(chain):
                raise ValueError(f"cannot write {what}: {os.strerror(errno.ENOSPC)}; {advice}") from error
            chain = chain.__cause__ or chain.__context__
        raise


def cpu_tree(tree: Any) -> Any:
    """Nested dicts and lists with every tensor on the CPU, so that a checkpoint opens on any machine."""
    if isinstance(tree, Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: cpu_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [cpu_tree(value) for value in tree]
    return tree
