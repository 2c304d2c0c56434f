"""uvicorn's connection with limits that uvicorn lacks.

The limits are: time for the head of a request, and for a client to read its answer; connections per client; small
chunks of a body. Does not depend on: requests and their contents.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT = 10.0
"""Seconds from the first byte of a request (on a new connection: from its start) to the end of its head."""
CHECKS_PER_TIMEOUT = 5
CLIENT_READ_TIMEOUT = 30.0
"""Seconds within which a client must read `MIN_CLIENT_READ_BYTES` bytes of its waiting answer."""
MIN_CLIENT_READ_BYTES = 32 << 10
MAX_CONNECTIONS_PER_CLIENT = 256
"""At a time per address (IPv6: per network of 64 bits), unless the address is a trusted proxy's."""
MAX_SMALL_CHUNKS = 1000
"""Chunks of one body that may be of any size. Each further chunk must bring `MIN_CHUNK_BYTES` bytes on average, since a
chunk costs time whatever its size."""
MIN_CHUNK_BYTES = 64


def _too_many_requests_response(message: str) -> bytes:
    error = {"message": message, "type": "rate_limit_error", "param": None, "code": "too_many_connections"}
    body = json.dumps({"error": error}).encode()
    head = "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def client_id(host: str) -> str:
    """Return the id of the client at an address.

    It is the address of IPv4 and the network of 64 bits of IPv6, since a client has all addresses of such a network.
    """
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
    """Aborts where the client takes too long. Between requests uvicorn's own `timeout_keep_alive` applies."""

    open_connections: Counter[str] = Counter()
    """Number of connections by client."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._client_id: str | None = None
        self._num_chunks, self._num_bytes = 0, 0  # of the present body
        self._h11_next_event, self.conn.next_event = self.conn.next_event, self._next_checked_event  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection for its client, and wait for the first headers."""
        super().connection_made(transport)
        self._start_header_timer()
        host = self.client[0] if self.client else ""
        if not self._is_trusted_proxy(host):
            self._client_id = client_id(host)
            self.open_connections[self._client_id] += 1
            if self.open_connections[self._client_id] > MAX_CONNECTIONS_PER_CLIENT:
                transport.write(_TOO_MANY_CONNECTIONS_RESPONSE)
                transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and give the connection back."""
        self._stop_header_timer()
        self._stop_read_timer()
        if self._client_id is not None:
            self.open_connections[self._client_id] -= 1
            if not self.open_connections[self._client_id]:
                del self.open_connections[self._client_id]
            self._client_id = None
        self.conn.__dict__.pop("next_event", None)  # a bound method of this object: a reference cycle
        super().connection_lost(exc)

    def _is_trusted_proxy(self, host: str) -> bool:
        """Is it the address of a trusted proxy, behind which there are many clients?"""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        allowed_proxies = self.config.forwarded_allow_ips
        proxies = allowed_proxies if isinstance(allowed_proxies, list) else ()
        return any(address in ipaddress.ip_network(proxy, strict=False) for proxy in proxies)

    def _next_checked_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Stands in the place of h11's `next_event`: aborts on a body of many small chunks."""
        event = self._h11_next_event()
        if isinstance(event, h11.Request):
            self._num_chunks, self._num_bytes = 0, 0
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            self._num_bytes += len(event.data)
            if self._num_bytes < MIN_CHUNK_BYTES * (self._num_chunks - MAX_SMALL_CHUNKS):
                self.transport.abort()
                return h11.NEED_DATA
        return event

    def data_received(self, data: bytes) -> None:
        """Read bytes of a request, and restart the timer of its headers."""
        if self.transport.is_closing():
            return
        if not self.transport.get_write_buffer_size():
            self._stop_read_timer()
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._start_header_timer()
        else:
            self._stop_header_timer()

    def on_response_complete(self) -> None:
        """Wait for the client to read what is still buffered."""
        self._start_read_timer()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the timer of a client that does not read."""
        super().pause_writing()
        self._start_read_timer()

    def resume_writing(self) -> None:
        """Stop the timer of a client that does not read."""
        super().resume_writing()
        self._stop_read_timer()

    def _start_header_timer(self, remaining_checks: int = CHECKS_PER_TIMEOUT) -> None:
        """Abort after the timeout, which is counted in ticks of the server: the server may itself have been stopped."""
        if not remaining_checks:
            self.transport.abort()
        elif self._header_timer is None:
            delay = HEADER_TIMEOUT / CHECKS_PER_TIMEOUT
            self._header_timer = self.loop.call_later(delay, self._on_header_timer, remaining_checks - 1)

    def _on_header_timer(self, remaining_checks: int) -> None:
        self._header_timer = None
        self._start_header_timer(remaining_checks)

    def _start_read_timer(self) -> None:
        if self._read_timer is None and (num_bytes := self.transport.get_write_buffer_size()):
            self._read_timer = self.loop.call_later(CLIENT_READ_TIMEOUT, self._check_client_reads, num_bytes)

    def _check_client_reads(self, previous_bytes: int) -> None:
        """Abort unless the client has read `MIN_CLIENT_READ_BYTES` bytes of what waited for it."""
        self._read_timer = None
        if self.transport.get_write_buffer_size() > max(0, previous_bytes - MIN_CLIENT_READ_BYTES):
            self.transport.abort()
        else:
            self._start_read_timer()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
