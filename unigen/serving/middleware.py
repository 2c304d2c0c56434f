"""The door of the server, before any route: keys, hosts, sizes, rates and time, and a line of log and counters for each
request.

A pure ASGI middleware, so that streams pass unbuffered and a route sees its client leave. Knows no route and no model.
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
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from unigen.serving.connection import client_id

log = logging.getLogger("unigen.serving")

HEALTH_PATHS = ("/health", "/ready")
"""Answered to whoever asks, under whatever name of the host."""
PUBLIC_PATHS = (*HEALTH_PATHS, "/", "/favicon.ico")
WEB_PREFIX = "/web/"
"""Asked for without a key, and at any rate: these paths, and what the page at / is made of."""
MAX_TRACKED_CLIENTS = 10_000
"""Whose rates are remembered."""


@dataclass(frozen=True)
class Limits:
    """What the door lets in.

    Args:
        keys: without one of them nothing but `PUBLIC_PATHS` is answered; none: all is. Printable ASCII without blanks.
        body: bytes of one request.
        max_pending_body_bytes: bytes of all requests that are being read or answered; at least of two of them.
        rate: requests a minute of one key or address; 0 is any number.
        invalid_keys_per_minute: of one address; when they are used up, no key of that address is looked at.
        allowed_hosts: names of this server beside localhost and addresses, "*" is any; other names in the header
            `Host` are refused where there are no keys, and so are requests that pages of other origins send. None:
            neither is checked.
        allowed_origins: of pages that may send requests nevertheless, "*" is any.
        body_timeout: seconds that a body may take, and one more for each `min_body_bytes_per_second` bytes that came.
        min_body_bytes_per_second: see `body_timeout`.

    Raises:
        ValueError: a key is empty, or has blanks or characters that no header carries.
    """

    keys: tuple[str, ...] = ()
    body: int = 32 << 20
    max_pending_body_bytes: int = 256 << 20
    rate: int = 0
    invalid_keys_per_minute: int = 20
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    body_timeout: float = 20.0
    min_body_bytes_per_second: int = 32 << 10

    def __post_init__(self) -> None:
        for key in self.keys:
            if not key.strip():
                raise ValueError(
                    "an API key is empty (--api-key, UNIGEN_API_KEY) and would let all in: give one, or leave it out"
                )
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise ValueError("an API key holds blanks or characters beyond ASCII, which no header carries")


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Any:
    """OpenAI's form of an error; halves of characters, which JSON can name and UTF-8 cannot, become question marks."""
    fields = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": {name: text and text.encode("utf-8", "replace").decode() for name, text in fields.items()}}


class RateLimiter:
    """So many requests a minute of each one, given out again as time passes."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # who: requests left, when that was

    def wait(self, who: str) -> int:
        """Seconds until this one may ask again; 0: now."""
        tokens = self._refill(who)
        return 0 if tokens >= 1 else math.ceil((1 - tokens) * 60 / self.rate)

    def take(self, who: str) -> None:
        """Count one request."""
        self._left[who] = (self._refill(who) - 1, time.monotonic())
        self._left.move_to_end(who)
        if len(self._left) > MAX_TRACKED_CLIENTS:
            self._left.popitem(last=False)

    def _refill(self, who: str) -> float:
        tokens, then = self._left.get(who, (float(self.rate), 0.0))
        return min(self.rate, tokens + (time.monotonic() - then) * self.rate / 60)


class GuardMiddleware:
    def __init__(self, app: Any, limits: Limits, metrics: Any) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self._requests, self._invalid_keys = RateLimiter(limits.rate), RateLimiter(limits.invalid_keys_per_minute)
        self._pending_bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, number, status = time.perf_counter(), uuid.uuid4().hex, 0
        scope = {**scope, "state": {**scope.get("state", {}), "request": number}}
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["method"] == "HEAD":  # as GET: whoever sends the answer leaves its body out
            scope["method"] = "GET"
        body = _LimitedBody(self, receive)

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        self.metrics.open.inc()
        try:
            refusal = self._check_request(scope, headers)
            if refusal:
                await _send_json(noted, *refusal)
            else:
                await self.app(scope, body.receive, noted)
        except Exception:
            log.exception("a fault while a request was answered")
            if not status:
                await _send_json(noted, 500, {}, error_body("a fault of the server", kind="server_error"))
        finally:
            self._pending_bytes -= body.bytes
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.open.dec()
            self.metrics.requests.labels(route, str(status or 499)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            line = {"request": number, "method": scope["method"], "route": route, "status": status or 499}
            log.info(json.dumps(line | {"seconds": round(seconds, 4)} | scope["state"].get("log", {})))

    def _check_request(self, scope: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], Any] | None:
        path, limits = scope["path"], self.limits
        if path in HEALTH_PATHS:
            return None
        if (
            not limits.keys
            and limits.allowed_hosts is not None
            and (stranger := self._check_origin(scope["method"], headers))
        ):
            return 403, {}, error_body(stranger, code="forbidden")
        if path in PUBLIC_PATHS or path.startswith(WEB_PREFIX) or scope["method"] == "OPTIONS":
            return None
        if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            return 415, {}, error_body("bodies are read as they are: send it without content-encoding")
        who = _client_address(scope)
        if limits.keys:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if wait := self._invalid_keys.wait(who):
                return _rate_limit_response(wait, f"too many wrong keys: try again in {wait} s")
            matching_keys = [one for one in limits.keys if hmac.compare_digest(one.encode(), key.strip().encode())]
            if kind.lower() != "bearer" or not matching_keys:
                if key:
                    self._invalid_keys.take(who)
                body = error_body("give an API key: Authorization: Bearer ...", code="invalid_api_key")
                return 401, {"www-authenticate": "Bearer"}, body
            who = matching_keys[0]
        scope["state"]["client"] = who
        if limits.rate:
            if wait := self._requests.wait(who):
                return _rate_limit_response(wait, f"too many requests: ask again in {wait} s")
            self._requests.take(who)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limits.body:
            return 413, {"connection": "close"}, error_body(self.too_large_message(), code="request_too_large")
        return None

    def _check_origin(self, method: str, headers: dict[str, str]) -> str | None:
        """Why a browser that other pages lead here is refused: they could not read a key, but need none."""
        host, limits = headers.get("host", ""), self.limits
        name = _host_name(host)
        if (
            host
            and not _is_local_host(name)
            and not {name, "*"} & {_host_name(key) for key in limits.allowed_hosts or ()}
        ):
            return f"this server is not asked as {name!r} without a key: start it with --allow-host {name} or --api-key"
        origin = headers.get("origin")
        if origin is None:
            crossed = method != "GET" and headers.get("sec-fetch-site") == "cross-site"
            return "pages of other sites may not send requests here: see --allow-origin" if crossed else None
        if {origin, "*"} & set(limits.allowed_origins) or (host and origin.partition("://")[2].lower() == host.lower()):
            return None
        return (
            f"pages of {origin[:200]} may not send requests here: start the server with --allow-origin {origin[:200]}"
        )

    def too_large_message(self) -> str:
        return f"the request is longer than {self.limits.body} bytes"

    def count(self, bytes: int) -> None:
        """Bytes of bodies that are held. Raises HTTPException where it is too many."""
        self._pending_bytes += bytes
        if self._pending_bytes > max(self.limits.max_pending_body_bytes, 2 * self.limits.body):
            raise HTTPException(429, "the server reads too many requests at a time: ask again", {"retry-after": "2"})


class _LimitedBody:
    """A request's body: no more bytes than are allowed, whatever its length was said to be, and in time."""

    def __init__(self, guard: GuardMiddleware, receive: Any) -> None:
        self.guard, self._receive = guard, receive
        self.bytes, self.whole, self.start = 0, False, time.monotonic()

    async def receive(self) -> Any:
        if self.whole:  # what comes is that the client leaves
            return await self._receive()
        limits = self.guard.limits
        end = self.start + limits.body_timeout + self.bytes / limits.min_body_bytes_per_second
        try:
            async with asyncio.timeout(max(0, end - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body of the request came too slowly", {"connection": "close"}) from None
        self.whole = not message.get("more_body", False)
        length = len(message.get("body", b""))
        self.bytes += length
        self.guard.count(length)
        if self.bytes > limits.body:
            raise HTTPException(413, self.guard.too_large_message(), {"connection": "close"})
        return message


def _client_address(scope: Any) -> str:
    return client_id(str((scope.get("client") or ("?",))[0]))


def _host_name(host: str) -> str:
    """The name in a header `Host`, without its port."""
    host = host.strip().lower()
    name = (
        host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0] if host.count(":") < 2 else host
    )
    return name.rstrip(".")[:200]


def _is_local_host(name: str) -> bool:
    """A name that no page of another site can have: addresses are not resolved, and localhost is here."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _rate_limit_response(wait: int, message: str) -> tuple[int, dict[str, str], Any]:
    body = error_body(message, kind="rate_limit_error", code="rate_limit_exceeded")
    return 429, {"retry-after": str(wait)}, body


async def _send_json(send: Any, status: int, headers: dict[str, str], body: Any) -> None:
    data = json.dumps(body).encode()
    all_headers = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    raw_headers = [(name.encode(), value.encode()) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": data})
