"""Checks of a request before any route: keys, hosts, sizes, rates and time; and its log line and counters.

A pure ASGI middleware: streams pass unbuffered, and a route sees its client disconnect. Does not depend on: routes, the
model.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unigen.serving.config import RequestLimits
from unigen.serving.connection import client_id
from unigen.serving.errors import ErrorObject, error_body
from unigen.serving.metrics import Metrics

log = logging.getLogger("unigen.serving")

HEALTH_PATHS = ("/health", "/ready")
"""Paths that are answered to everyone, under any host name."""
PUBLIC_PATHS = (*HEALTH_PATHS, "/", "/favicon.ico")
WEB_PREFIX = "/web/"
"""These paths, and the files of the page at /, need no key and have no rate limit."""
MAX_TRACKED_CLIENTS = 10_000
"""Clients whose rates are remembered."""
OLD_NAMES_DEPRECATION = b"@1795996800"
"""The header `Deprecation` (RFC 9745) of responses to requests with old names of options: since 2026-11-30, in Unix
seconds."""


@dataclass(frozen=True)
class ErrorReply:
    """The response to a request that is rejected."""

    status: int
    body: ErrorObject
    headers: Mapping[str, str] = field(default_factory=dict)


class RateLimiter:
    """A token bucket for each client: so many requests a minute, refilled continuously.

    Args:
        requests_per_minute: requests that each client may send in a minute.
    """

    def __init__(self, requests_per_minute: int) -> None:
        self.requests_per_minute = requests_per_minute
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by client: tokens, and when that was

    def retry_after(self, client: str) -> int:
        """Return the seconds until this client may send its next request; 0 is now."""
        tokens = self._refill(client)
        return 0 if tokens >= 1 else math.ceil((1 - tokens) * 60 / self.requests_per_minute)

    def consume(self, client: str) -> None:
        """Count one request of this client."""
        self._tokens[client] = (self._refill(client) - 1, time.monotonic())
        self._tokens.move_to_end(client)
        if len(self._tokens) > MAX_TRACKED_CLIENTS:
            self._tokens.popitem(last=False)

    def _refill(self, client: str) -> float:
        tokens, then = self._tokens.get(client, (float(self.requests_per_minute), 0.0))
        return min(self.requests_per_minute, tokens + (time.monotonic() - then) * self.requests_per_minute / 60)


class GuardMiddleware:
    """Rejects requests beyond the limits, and logs and counts every request.

    Args:
        app: the next ASGI app.
        limits: what a request must satisfy.
        metrics: counters of the server.
    """

    def __init__(self, app: ASGIApp, limits: RequestLimits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self._requests, self._invalid_keys = (
            RateLimiter(limits.requests_per_minute),
            RateLimiter(limits.invalid_keys_per_minute),
        )
        self._pending_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it. The arguments are those of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, request_id, status = time.perf_counter(), uuid.uuid4().hex, 0
        scope = {**scope, "state": {**scope.get("state", {}), "request": request_id}}
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["method"] == "HEAD":  # answered as GET; uvicorn leaves the body out
            scope["method"] = "GET"
        body = _LimitedBody(self, receive)

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if scope["state"].get("old_names"):
                    message["headers"].append((b"deprecation", OLD_NAMES_DEPRECATION))
            await send(message)

        self.metrics.open_requests.inc()
        try:
            rejection = self._check_request(scope, headers)
            if rejection:
                await _send_error(send_and_record, rejection)
            else:
                await self.app(scope, body.receive, send_and_record)
        except Exception:
            log.exception("a fault while a request was answered")
            if not status:
                fault = error_body("a fault of the server", kind="server_error")
                await _send_error(send_and_record, ErrorReply(500, fault))
        finally:
            self._pending_bytes -= body.num_bytes
            self._record(scope, status or 499, time.perf_counter() - start)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request and write its log line."""
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.open_requests.dec()
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        line = {"request": scope["state"]["request"], "method": scope["method"], "route": route, "status": status}
        log.info(json.dumps(line | {"seconds": round(seconds, 4)} | scope["state"].get("log", {})))

    def _check_request(self, scope: Scope, headers: Mapping[str, str]) -> ErrorReply | None:
        """Return the response to a request that is rejected; None for one that may pass."""
        path, limits = scope["path"], self.limits
        if path in HEALTH_PATHS:
            return None
        if not limits.api_keys and limits.allowed_hosts is not None:
            message = self._check_origin(scope["method"], headers)
            if message:
                return ErrorReply(403, error_body(message, code="forbidden"))
        if path in PUBLIC_PATHS or path.startswith(WEB_PREFIX) or scope["method"] == "OPTIONS":
            return None
        if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            return ErrorReply(415, error_body("bodies are read as they are: send it without content-encoding"))
        client = _client_address(scope)
        if limits.api_keys:
            key_or_rejection = self._check_key(client, headers.get("authorization", ""))
            if isinstance(key_or_rejection, ErrorReply):
                return key_or_rejection
            client = key_or_rejection
        scope["state"]["client"] = client
        if limits.requests_per_minute:
            if seconds := self._requests.retry_after(client):
                return _rate_limit_error(seconds, f"too many requests: ask again in {seconds} s")
            self._requests.consume(client)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limits.max_body_bytes:
            body = error_body(self.too_large_message(), code="request_too_large")
            return ErrorReply(413, body, {"connection": "close"})
        return None

    def _check_key(self, address: str, authorization: str) -> ErrorReply | str:
        """Return the API key of the request, or the response to a request without a valid one."""
        if seconds := self._invalid_keys.retry_after(address):
            return _rate_limit_error(seconds, f"too many wrong keys: try again in {seconds} s")
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode()
        matching_keys = [api_key for api_key in self.limits.api_keys if hmac.compare_digest(api_key.encode(), given)]
        if scheme.lower() == "bearer" and matching_keys:
            return matching_keys[0]
        if key:
            self._invalid_keys.consume(address)
        body = error_body("give an API key: Authorization: Bearer ...", code="invalid_api_key")
        return ErrorReply(401, body, {"www-authenticate": "Bearer"})

    def _check_origin(self, method: str, headers: Mapping[str, str]) -> str | None:
        """Return why a request is rejected that a page of another site made a browser send; None where it may pass.

        Without API keys such a page, which could not know a key, could use the server through the browser.
        """
        host, limits = headers.get("host", ""), self.limits
        name = _host_name(host)
        allowed_names = {_host_name(allowed) for allowed in limits.allowed_hosts or ()}
        if host and not _is_local_host(name) and not {name, "*"} & allowed_names:
            return f"this server is not asked as {name!r} without a key: start it with --allow-host {name} or --api-key"
        origin = headers.get("origin")
        if origin is None:
            is_cross_site = method != "GET" and headers.get("sec-fetch-site") == "cross-site"
            return "pages of other sites may not send requests here: see --allow-origin" if is_cross_site else None
        if {origin, "*"} & set(limits.allowed_origins) or (host and origin.partition("://")[2].lower() == host.lower()):
            return None
        return (
            f"pages of {origin[:200]} may not send requests here: start the server with --allow-origin {origin[:200]}"
        )

    def too_large_message(self) -> str:
        """The line of the error for a body that is too long."""
        return f"the request is longer than {self.limits.max_body_bytes} bytes"

    def reserve_bytes(self, num_bytes: int) -> None:
        """Count bytes of bodies that are held in memory.

        Raises:
            HTTPException: they are too many (status 429).
        """
        self._pending_bytes += num_bytes
        if self._pending_bytes > max(self.limits.max_pending_body_bytes, 2 * self.limits.max_body_bytes):
            raise HTTPException(429, "the server reads too many requests at a time: ask again", {"retry-after": "2"})


class _LimitedBody:
    """The body of a request: at most as many bytes as are allowed, whatever its header says, and in time."""

    def __init__(self, guard: GuardMiddleware, receive: Receive) -> None:
        self.guard, self._receive = guard, receive
        self.num_bytes, self.is_complete, self.start = 0, False, time.monotonic()

    async def receive(self) -> Message:
        """Receive the next ASGI message.

        Raises:
            HTTPException: the body is too slow (status 408) or too large (413, 429).
        """
        if self.is_complete:  # the next message is the disconnect
            return await self._receive()
        limits = self.guard.limits
        end = self.start + limits.body_timeout + self.num_bytes / limits.min_body_bytes_per_second
        try:
            async with asyncio.timeout(max(0, end - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body of the request came too slowly", {"connection": "close"}) from None
        self.is_complete = not message.get("more_body", False)
        length = len(message.get("body", b""))
        self.num_bytes += length
        self.guard.reserve_bytes(length)
        if self.num_bytes > limits.max_body_bytes:
            raise HTTPException(413, self.guard.too_large_message(), {"connection": "close"})
        return message


def _client_address(scope: Scope) -> str:
    return client_id(str((scope.get("client") or ("?",))[0]))


def _host_name(host: str) -> str:
    """Return the name in a header `Host`, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host.partition(":")[0] if host.count(":") < 2 else host
    return name.rstrip(".")[:200]


def _is_local_host(name: str) -> bool:
    """Is it a name that no page of another site can have? Addresses are not resolved, and localhost is this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _rate_limit_error(retry_after: int, message: str) -> ErrorReply:
    body = error_body(message, kind="rate_limit_error", code="rate_limit_exceeded")
    return ErrorReply(429, body, {"retry-after": str(retry_after)})


async def _send_error(send: Send, error: ErrorReply) -> None:
    data = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(data)), **error.headers}
    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": data})
