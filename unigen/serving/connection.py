"""uvicorn's connection with limits of time that uvicorn has none for: for the head of a request, and for an answer that
its client does not read. Knows no request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""From the first byte (of a new connection: from its begin) to the end of a request's head."""
READ_SECONDS = 30.0
"""In which a client must read `LEAST_READ` bytes of what waits for it."""
LEAST_READ = 32 << 10


class TimedConnection(H11Protocol):
    """Aborts where the client takes too long. Between requests uvicorn's own `timeout_keep_alive` holds."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head: asyncio.TimerHandle | None = None
        self._read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_head", "_read")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.get_write_buffer_size():
            self._stop("_read")
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        else:
            self._stop("_head")

    def on_response_complete(self) -> None:
        self._expect_reading()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_read")

    def _expect_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _expect_reading(self) -> None:
        if self._read is None and (waits := self.transport.get_write_buffer_size()):
            self._read = self.loop.call_later(READ_SECONDS, self._check_reading, waits)

    def _check_reading(self, before: int) -> None:
        """What waits is less by `LEAST_READ`, or the client is given up."""
        self._read = None
        if self.transport.get_write_buffer_size() > max(0, before - LEAST_READ):
            self.transport.abort()
        else:
            self._expect_reading()

    def _stop(self, *names: str) -> None:
        for name in names:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)
