"""JSON bodies of requests: their size is checked before they are parsed, and they are parsed outside the event loop.

What makes parsing slow is counted: values, nesting, and characters outside of image data. The meaning of the fields is
checked by `unigen.serving.protocol`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

MAX_DELIMITERS = 200_000
"""Brackets and commas in a body; those within texts count too."""
MAX_JSON_VALUES = 20_000
"""Objects, lists, names, texts and numbers in a body."""
MAX_TEXT_CHARACTERS = 1_000_000
"""Of all texts together, without image data: data URIs in `url` or `image_url`, and base64 in `result`."""


def parse_json(data: bytes) -> object:
    """Return the value of a JSON body.

    Raises:
        json.JSONDecodeError: it is not JSON.
        HTTPException: it exceeds the limits above, is nested too deeply, or is not UTF-8 (status 400).
    """
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > MAX_DELIMITERS:
        raise HTTPException(400, f"the body holds too many values: at most {MAX_JSON_VALUES:,}")
    num_blanks = sum(data.count(mark) for mark in (b" ", b"\n", b"\r", b"\t"))
    if max(num_blanks, data.count(b"\\")) > 2 * MAX_TEXT_CHARACTERS:  # a character is at most two escapes
        raise HTTPException(400, f"the body holds too many characters of text: at most {MAX_TEXT_CHARACTERS:,}")
    try:
        value: object = json.loads(data)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise HTTPException(400, "the body is nested too deeply") from None
    except UnicodeError:
        raise HTTPException(400, "the body is no JSON: it is no UTF-8") from None
    except ValueError:
        raise HTTPException(400, "the body is no JSON: a number in it has thousands of digits") from None
    _check_size(value)
    return value


def _check_size(body: object) -> None:
    stack, num_values, num_characters = [body], 0, 0
    while stack:
        value = stack.pop()
        num_values += 1
        if isinstance(value, str):
            num_characters += len(value)
        elif isinstance(value, dict):
            stack += value.keys()
            stack += ["" if _is_image_data(name, inner) else inner for name, inner in value.items()]
        elif isinstance(value, list):
            stack += value
    if num_values > MAX_JSON_VALUES:
        raise HTTPException(400, f"the body holds {num_values:,} values: at most {MAX_JSON_VALUES:,}")
    if num_characters > MAX_TEXT_CHARACTERS:
        message = f"the body holds {num_characters:,} characters of text: at most {MAX_TEXT_CHARACTERS:,}"
        raise HTTPException(400, message)


def _is_image_data(name: str, value: object) -> bool:
    if not isinstance(value, str):
        return False
    return name == "result" or (name in ("url", "image_url") and value[:5].lower() == "data:")


class BoundedRequest(Request):
    """A request whose JSON is parsed in a thread, within the limits."""

    async def json(self) -> object:
        """The body as JSON, parsed once. Raises HTTPError for a body that is none."""
        if not hasattr(self, "_json"):
            data = await self.body()
            self._json = await asyncio.to_thread(parse_json, data)
        return self._json


class BoundedRoute(APIRoute):
    """A route that reads its body as `BoundedRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of FastAPI's, which gets a `BoundedRequest`."""
        handler = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return handle_bounded
