"""The dataset as an endless stream of samples, and a loader that starts at any position.

Sample p of the stream is always the same item with the same random seeds, whichever process or worker makes it and
whenever: to resume is to start at p. Does not depend on: what an item is.

    batches = make_loader(dataset, collate, first_sample=0, batch_size=32, rank=0, world_size=1, seed=0, shuffle=True,
                          num_workers=2, pin_memory=False)
    batch = next(batches)
"""

import ctypes
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.data


def hash_seed(*keys: int) -> int:
    """Hash integers to a seed in [0, 2^63): splitmix64's finalizer, folded over the keys."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def feistel_permutation(index: int, length: int, seed: int) -> int:
    """Map an index by a seeded permutation of range(length): six Feistel rounds, repeated until the result is inside.

    Args:
        index: in [0, length).
        length: at least 1.
        seed: of the permutation.

    Returns:
        An index in [0, length). No table is stored.
    """
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_index in range(6):
            left, right = right, left ^ (hash_seed(seed, round_index, right) & mask)
        index = left << half | right
        if index < length:
            return index


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, of every device."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@dataclass
class WorkerError:
    """An exception that is passed from a worker to the Trainer."""

    error: Exception
    """The exception, or one of the same text that can be pickled."""
    source: str
    """Where it was raised, in words."""
    traceback_text: str
    """As Python prints it."""

    def reraise(self) -> None:
        """Raise the exception.

        Raises:
            ValueError: the error is one, which the user can mend; in one line.
            RuntimeError: any other, with its traceback.
        """
        if isinstance(self.error, ValueError):
            raise ValueError(f"{self.error} ({self.source})")
        raise RuntimeError(f"{self.source} failed:\n{self.traceback_text}")


class _SampleStream(torch.utils.data.Dataset[object]):
    """Maps positions of the stream to items, in order, or shuffled again in each epoch."""

    def __init__(self, dataset: Any, seed: int, shuffle: bool) -> None:
        self.dataset, self.seed = dataset, seed
        self.length = len(dataset) if hasattr(dataset, "__len__") else None
        self.shuffle = shuffle and self.length is not None
        if self.length == 0:
            raise ValueError("the dataset is empty")

    def __getitem__(self, position: int) -> object:
        index = position
        if self.length is not None:
            epoch, index = divmod(position, self.length)
            if self.shuffle:
                index = feistel_permutation(index, self.length, hash_seed(self.seed, epoch))
        seed_all(hash_seed(self.seed, position, 1))  # for datasets that draw from the global generators
        try:
            return self.dataset[index]
        except Exception as error:
            return WorkerError(error, f"item {index} of the dataset", traceback.format_exc())


@dataclass
class _Collate:
    """Makes batches; where an item or `collate` has failed, the error takes the place of the batch."""

    collate: Callable[[list[Any]], object]
    """Makes a batch of a list of items."""

    def __call__(self, items: list[Any]) -> object:
        failed = next((item for item in items if isinstance(item, WorkerError)), None)
        if failed is None:
            try:
                return self.collate(items)
            except Exception as error:
                failed = WorkerError(error, "putting a batch together", traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(failed.error))
        except Exception:  # an exception that cannot be pickled would hang the worker: its text is sent
            kind = ValueError if isinstance(failed.error, ValueError) else RuntimeError
            failed = WorkerError(kind(str(failed.error)), failed.source, failed.traceback_text)
        return failed


def _start_worker(_: int) -> None:
    """Set the signals of a worker: it goes on until the Trainer closes it, and ends when the Trainer is killed.

    Ctrl-C and the SIGTERM of many schedulers reach every process of a group, but the Trainer decides when to stop. A
    worker that outlived the Trainer would hold its connections to the other processes of the run, which would wait.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(120))  # ends a stuck worker where prctl is missing
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class BatchIterator:
    """The endless batches of a loader.

    Args:
        loader: torch's loader, whose workers start here.
    """

    def __init__(self, loader: Iterable[object]) -> None:
        before = set(multiprocessing.active_children())
        self._batches = iter(loader)
        self._workers = set(multiprocessing.active_children()) - before

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
                raise
            raise ValueError(
                "a process that loads data was killed, most often since memory was short: give fewer num_workers, or a "
                "smaller batch_size"
            ) from error

    def close(self, grace: float = 1.0) -> None:
        """End the workers. One that waits for work ends at once; one that is busy is killed after `grace` seconds."""
        shut_down = getattr(self._batches, "_shutdown_workers", None)  # without workers there is none
        if shut_down is None:
            return
        kill = threading.Timer(grace, self._kill_workers)
        kill.start()
        try:
            with _ignore_sigchld():
                shut_down()
        finally:
            kill.cancel()

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()


@contextmanager
def _ignore_sigchld() -> Iterator[None]:
    """Keep torch from raising an error for the end of a worker inside the context."""
    try:
        previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:  # not the main thread, in which torch would raise it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)


def make_loader(
    dataset: Any,
    collate: Callable[[list[Any]], object] | None,
    *,
    first_sample: int,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    shuffle: bool,
    num_workers: int,
    pin_memory: bool,
) -> BatchIterator:
    """Make the endless batches of one process, from any sample of the stream on.

    Args:
        dataset: map-style; without `__len__` it is endless and read in order.
        collate: makes a batch of a list of items; None: torch's default.
        first_sample: position in the stream of the run's next sample.
        batch_size: samples of a batch.
        rank: of this process. Its first batch begins at `first_sample + rank * batch_size`, and each next one
            `world_size * batch_size` further.
        world_size: number of processes of the run.
        seed: of the order and of the items' random draws.
        shuffle: whether each epoch has another order.
        num_workers: number of processes that make batches; 0: this one.
        pin_memory: whether batches are put in memory from which a GPU copies.

    Returns:
        Batches as `collate` makes them, or a `WorkerError` in the place of a batch that failed.

    Raises:
        ValueError: the data set is empty.
    """

    def positions() -> Iterator[range]:
        for start in itertools.count(first_sample + rank * batch_size, world_size * batch_size):
            yield range(start, start + batch_size)

    fork = "fork" if num_workers and hasattr(os, "fork") else None  # recipes need not be importable
    loader = torch.utils.data.DataLoader(
        _SampleStream(dataset, seed, shuffle),
        batch_sampler=positions(),  # type: ignore[arg-type]
        collate_fn=_Collate(collate or torch.utils.data.default_collate),
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        multiprocessing_context=fork,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
    return BatchIterator(loader)
