"""The processes of one run: where one of them ends, the others end too, with the reason.

A collective fails when its peer is gone, but a step may take minutes until the next one. So each process looks after
those of its machine. Does not depend on what is trained.

    with watch_peers(lambda: "the same command goes on from step-00000020.pt"):
        ...
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

GRACE_SECONDS = 2.0
"""Seconds in which a collective may say it first."""


@contextmanager
def watch_peers(advice: Callable[[], str]) -> Iterator[None]:
    """Inside, the end of another process of the run on this machine ends this one within seconds, with exit code 1.

    Args:
        advice: gives what the user is to do, at the end of the line that says so."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    hosts_and_pids: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(hosts_and_pids, (socket.gethostname(), os.getpid()))
    local_pids = [
        pid for host, pid in hosts_and_pids if host == socket.gethostname() and pid != os.getpid() and is_alive(pid)
    ]

    def end(pid: int) -> None:
        rank = [pid for _, pid in hosts_and_pids].index(pid)
        os.write(2, f"unigen: error: process {rank} of the run ended: {advice()}\n".encode())
        os._exit(1)

    with watch_pids(local_pids, end):
        yield


@contextmanager
def watch_pids(
    pids: Sequence[int], on_exit: Callable[[int], None], interval: float = 0.5, grace: float = GRACE_SECONDS
) -> Iterator[None]:
    """Inside, a thread watches processes, and calls back with the first that is gone.

    Args:
        pids: of the processes.
        on_exit: is called once, in the thread, with the process id.
        interval: seconds between two looks.
        grace: seconds for which it has to be gone.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            for pid in pids:
                if not is_alive(pid) and not done.wait(grace):
                    return on_exit(pid)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def is_alive(pid: int) -> bool:
    """Whether a process is there and has not ended (one that nobody has waited for yet has)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def main_process_first() -> Iterator[None]:
    """Inside, the main process of a run goes first and the others wait for it: for a file that all of them read and one
    of them makes.

    Raises:
        ValueError: in the others, where the main process failed inside, with what it said, or has ended; in one line.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    main = PartialState(cpu=not torch.cuda.is_available()).is_main_process
    error_message: list[str | None] = [None]
    if main:
        try:
            yield
        except Exception as error:
            error_message = [" ".join(f"{error}".split()) or type(error).__name__]
            with suppress(RuntimeError):  # a process that has ended need not be told
                broadcast_object_list(error_message)
            raise
    try:
        broadcast_object_list(error_message)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise ValueError(
            "another process of the run ended while this one waited for it: what it said last says why"
        ) from error
    if error_message[0] is not None:
        raise ValueError(f"the main process of the run failed, on which this one waited: {error_message[0]}")
    if not main:
        yield


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed since another process is gone, as gloo and NCCL tell it."""
    signs = "connection closed by peer", "connection reset", "broken pipe", "remote process"
    return any(sign in str(error).lower() for sign in signs)
