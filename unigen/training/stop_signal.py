"""SIGTERM and SIGINT as a request to stop after the current step."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Records a signal that asks the process to stop.

    The first signal asks for a stop after the current step. Further ones, as launchers send them, change nothing; but
    Ctrl-C pressed again after a second raises KeyboardInterrupt at once.
    """

    received: int | None = None
    """Number of the last signal, None before the first."""

    def __init__(self, announce: bool) -> None:
        """
        Args:
            announce: whether the first signal writes a line to stderr.
        """
        self._announce, self._first_time = announce, math.inf

    @contextmanager
    def handle(self) -> Iterator[None]:
        """Record SIGTERM and SIGINT inside the context. In another thread than the main one it does nothing."""
        previous = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread, which alone handles signals
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT and time.monotonic() > self._first_time + 1:
            raise KeyboardInterrupt
        if self._first_time == math.inf:
            self._first_time = time.monotonic()
            if self._announce:
                os.write(2, b"stopping after this step, with a checkpoint (Ctrl-C again: at once, without)\n")
