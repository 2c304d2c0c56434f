"""The processes of one run: where one of them ends, the others end too, with the reason.

A collective fails when its peer is gone, but a step may take minutes until the next one. So each process looks after
those of its machine. The file knows nothing of what is trained.

    with watch_peers(lambda: "the same command goes on from step-00000020.pt"):
        ...
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    pids: Sequence[int], end: Callable[[int], None], every: float = 0.5, grace: float = GRACE_SECONDS
) -> Iterator[None]:
    """Inside, `end` is called in a thread with the first of the processes that is gone for `grace` seconds."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every):
            for pid in pids:
                if not is_alive(pid) and not done.wait(grace):
                    return end(pid)

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
