"""uvicorn's connection with limits that uvicorn has none for: of time, for the head of a request and for an answer that
its client does not read; of connections of one client; of the pieces in which a body comes. Knows no request."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT = 10.0
"""From the first byte (of a new connection: from its begin) to the end of a request's head."""
CHECKS_PER_TIMEOUT = 5
CLIENT_READ_TIMEOUT = 30.0
"""In which a client must read `MIN_CLIENT_READ_BYTES` bytes of what waits for it."""
MIN_CLIENT_READ_BYTES = 32 << 10
MAX_CONNECTIONS_PER_CLIENT = 256
"""At a time of one address, unless it is a proxy's that is trusted; of IPv6 of one network of 64 bits."""
MAX_SMALL_CHUNKS = 1000
"""Chunks of one body that may hold as little as they like; each of the others must be made up for by `MIN_CHUNK_BYTES`
bytes of the body, since it costs time whatever it holds."""
MIN_CHUNK_BYTES = 64


def _too_many_requests_response(message: str) -> bytes:
    error = {"message": message, "type": "rate_limit_error", "param": None, "code": "too_many_connections"}
    body = json.dumps({"error": error}).encode()
    head = "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def client_id(host: str) -> str:
    """Who asks from this address: of IPv6 the network, since a client has all of its addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address.packed, 64), strict=False))


_TOO_MANY_CONNECTIONS_RESPONSE = _too_many_requests_response("too many connections of one address: close some")


class TimedConnection(H11Protocol):
    """Aborts where the client takes too long. Between requests uvicorn's own `timeout_keep_alive` holds."""

    open: Counter[str] = Counter()
    """Connections of each client."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head: asyncio.TimerHandle | None = None
        self._read: asyncio.TimerHandle | None = None
        self._client_id: str | None = None
        self._num_chunks, self._pending_bytes = 0, 0  # of the present body
        self._h11_next_event, self.conn.next_event = self.conn.next_event, self._next_checked_event  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()
        host = self.client[0] if self.client else ""
        if not self._is_trusted_proxy(host):
            self._client_id = client_id(host)
            self.open[self._client_id] += 1
            if self.open[self._client_id] > MAX_CONNECTIONS_PER_CLIENT:
                transport.write(_TOO_MANY_CONNECTIONS_RESPONSE)
                transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_head", "_read")
        if self._client_id is not None:
            self.open[self._client_id] -= 1
            if not self.open[self._client_id]:
                del self.open[self._client_id]
            self._client_id = None
        self.conn.__dict__.pop("next_event", None)  # of this object: it would keep itself
        super().connection_lost(exc)

    def _is_trusted_proxy(self, host: str) -> bool:
        """Is this a proxy, through which many clients ask?"""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        allowed_proxies = self.config.forwarded_allow_ips
        proxies = allowed_proxies if isinstance(allowed_proxies, list) else ()
        return any(address in ipaddress.ip_network(proxy, strict=False) for proxy in proxies)

    def _next_checked_event(self) -> Any:
        event = self._h11_next_event()
        if isinstance(event, h11.Request):
            self._num_chunks, self._pending_bytes = 0, 0
        elif isinstance(event, h11.Data):
            self._num_chunks, self._pending_bytes = (
                self._num_chunks + event.chunk_start,
                self._pending_bytes + len(event.data),
            )
            if self._pending_bytes < MIN_CHUNK_BYTES * (self._num_chunks - MAX_SMALL_CHUNKS):
                self.transport.abort()
                return h11.NEED_DATA
        return event

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self.transport.get_write_buffer_size():
            self._stop("_read")
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._start_header_timer()
        else:
            self._stop("_head")

    def on_response_complete(self) -> None:
        self._start_read_timer()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_read_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_read")

    def _start_header_timer(self, left: int = CHECKS_PER_TIMEOUT) -> None:
        """Counted in ticks of the server's own, which may have been stopped itself."""
        if not left:
            self.transport.abort()
        elif self._head is None:
            self._head = self.loop.call_later(HEADER_TIMEOUT / CHECKS_PER_TIMEOUT, self._on_timer, left - 1)

    def _on_timer(self, left: int) -> None:
        self._head = None
        self._start_header_timer(left)

    def _start_read_timer(self) -> None:
        if self._read is None and (waits := self.transport.get_write_buffer_size()):
            self._read = self.loop.call_later(CLIENT_READ_TIMEOUT, self._check_client_reads, waits)

    def _check_client_reads(self, before: int) -> None:
        """What waits is less by `MIN_CLIENT_READ_BYTES`, or the client is given up."""
        self._read = None
        if self.transport.get_write_buffer_size() > max(0, before - MIN_CLIENT_READ_BYTES):
            self.transport.abort()
        else:
            self._start_read_timer()

    def _stop(self, *names: str) -> None:
        for name in names:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)
