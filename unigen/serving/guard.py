"""The door of the server, before any route: keys, sizes and rates, and a line of log and counters for every request.

A pure ASGI middleware, so that streams pass unbuffered and a route sees its client leave. Knows no route and no model.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

log = logging.getLogger("unigen.serving")

OPEN = ("/health", "/ready", "/", "/favicon.ico")
PAGE = "/web/"
"""Asked for without a key, and at any rate: these paths, and what the page at / is made of."""
MOST_CLIENTS = 10_000
"""Whose rates are remembered."""


@dataclass(frozen=True)
class Limits:
    """keys: without one of them nothing but `OPEN` is answered; none: all is. body: bytes of a request. rate: requests
    a minute of one key or address, 0 is any."""

    keys: tuple[str, ...] = ()
    body: int = 32 << 20
    rate: int = 0


def error(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Any:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    def __init__(self, app: Any, limits: Limits, metrics: Any) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # who: requests left, when that was

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, number, status = time.perf_counter(), uuid.uuid4().hex, 0
        scope.setdefault("state", {})["request"] = number
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        self.metrics.open.inc()
        try:
            refusal = self._refusal(scope, headers)
            if refusal:
                await _answer(noted, *refusal)
            else:
                await self.app(scope, self._bounded(receive), noted)
        except Exception:
            log.exception("a fault while a request was answered")
            if not status:
                await _answer(noted, 500, {}, error("a fault of the server", kind="server_error"))
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.open.dec()
            self.metrics.requests.labels(route, str(status or 499)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            line = {"request": number, "method": scope["method"], "route": route, "status": status or 499}
            log.info(json.dumps(line | {"seconds": round(seconds, 4)} | scope["state"].get("log", {})))

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], Any] | None:
        path = scope["path"]
        if path in OPEN or path.startswith(PAGE) or scope["method"] == "OPTIONS":
            return None
        who = (scope.get("client") or ("?",))[0]
        if self.limits.keys:
            kind, _, key = headers.get("authorization", "").partition(" ")
            known = [one for one in self.limits.keys if hmac.compare_digest(one.encode(), key.strip().encode())]
            if kind.lower() != "bearer" or not known:
                wrong = error("give an API key: Authorization: Bearer ...", code="invalid_api_key")
                return 401, {"www-authenticate": "Bearer"}, wrong
            who = known[0]
        wait = self._wait(who)
        if wait:
            told = error(
                f"too many requests: ask again in {wait} s", kind="rate_limit_error", code="rate_limit_exceeded"
            )
            return 429, {"retry-after": str(wait)}, told
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.limits.body:
            return 413, {"connection": "close"}, error(self._too_long(), code="request_too_large")
        return None

    def _too_long(self) -> str:
        return f"the request is longer than {self.limits.body} bytes"

    def _wait(self, who: str) -> int:
        """Seconds until this one may ask again: a bucket of `rate` requests that fills up within a minute."""
        rate = self.limits.rate
        if not rate:
            return 0
        now = time.monotonic()
        left, then = self._buckets.pop(who, (float(rate), now))
        left = min(rate, left + (now - then) * rate / 60)
        allowed = left >= 1
        self._buckets[who] = (left - allowed, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if allowed else math.ceil((1 - left) * 60 / rate)

    def _bounded(self, receive: Any) -> Any:
        """No more of a body than is allowed, whatever its length was said to be."""
        read = 0

        async def limited() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limits.body:
                raise HTTPException(413, self._too_long())
            return message

        return limited


async def _answer(send: Any, status: int, headers: dict[str, str], body: Any) -> None:
    data = json.dumps(body).encode()
    given = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    listed = [(name.encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": data})
