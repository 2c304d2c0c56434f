"""The web page of `unigen serve`: the files in web/, read once, each a route of its own with the headers it goes with.

Knows no API and no model: the page asks for itself. No path from a request is ever opened.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

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
"""Nothing from elsewhere, nothing inline, no text that becomes markup."""
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in CONTENT_SECURITY_POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: Any) -> None:
    """The page at /, and what it is made of under /web."""
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in CONTENT_TYPES:
            route = "/" if path.name == INDEX else f"/web/{path.name}"
            app.add_route(
                route,
                _file_route(path.read_bytes(), CONTENT_TYPES[path.suffix]),
                methods=["GET"],
                include_in_schema=False,
            )


def _file_route(data: bytes, kind: str) -> Any:
    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    headers = {**HEADERS, "etag": tag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(None, 304, headers)
        return Response(data, 200, {**headers, "content-type": kind})

    return answer
