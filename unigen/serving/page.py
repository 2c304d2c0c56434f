"""The web page of `unigen serve`: the files of web/ are read once, and each is a route with its headers.

Does not depend on: the API, the model; the page calls the API itself. No path of a request is ever opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "web"
INDEX = "index.html"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
"""Nothing from other origins, nothing inline, no text that becomes markup."""
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in CONTENT_SECURITY_POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: Starlette) -> None:
    """Serve the page at / and its files under /web.

    Args:
        app: gets one route for each file.
    """
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in CONTENT_TYPES:
            route = "/" if path.name == INDEX else f"/web/{path.name}"
            handler = _file_route(path.read_bytes(), CONTENT_TYPES[path.suffix])
            app.add_route(route, handler, methods=["GET"], include_in_schema=False)


def _file_route(data: bytes, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    headers = {**HEADERS, "etag": etag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(None, 304, headers)
        return Response(data, 200, {**headers, "content-type": content_type})

    return answer
