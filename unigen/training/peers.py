"""The processes of one run: when one of them ends, the others end too, with the reason.

A collective fails when its peer is gone, but the next one may be minutes away. So each process watches those on its
machine. Does not depend on: what is trained.

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
"""Seconds in which a failing collective may report first that a process is gone."""


@contextmanager
def watch_peers(advice: Callable[[], str]) -> Iterator[None]:
    """Inside the context, the end of another process of the run on this machine ends this one, with exit code 1.

    Args:
        advice: returns what the user can do, the end of the line on stderr.
    """
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
    """Watch processes inside the context, in a thread, and report the first that is gone.

    Args:
        pids: ids of the processes.
        on_exit: is called once, in the thread, with the id of the process that is gone.
        interval: seconds between two checks.
        grace: seconds between the end of a process and the call.
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
    """Check whether a process exists and has not ended. A zombie has ended."""
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
    """Let the main process of a run go first inside the context, while the others wait for it.

    It is for a file that the main process makes and all of them read.

    Raises:
        ValueError: in the others: the main process has failed inside, with its message, or has ended; in one line.
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
            with suppress(RuntimeError):  # another process has ended: nobody waits there
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
    """Check whether a collective failed because another process is gone, by the messages of gloo and NCCL."""
    signs = "connection closed by peer", "connection reset", "broken pipe", "remote process"
    return any(sign in str(error).lower() for sign in signs)
