"""JSON bodies of strangers: bounded by counting before they are read, and read beside the event loop.

What is counted here is what makes reading slow: values, nesting, and characters that are not of a picture. What a field
means is checked by `unigen.serving.protocol`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

MAX_DELIMITERS = 200_000
"""Brackets and commas in a body; those within texts count too."""
MAX_JSON_VALUES = 20_000
"""Objects, lists, names, texts and numbers in a body."""
MAX_TEXT_CHARACTERS = 1_000_000
"""Of all texts together; pictures apart, which are data URIs in `url` or `image_url`, and base64 in `result`."""


def parse_json(data: bytes) -> Any:
    """The value of a JSON body.

    Raises:
        json.JSONDecodeError: it is no JSON.
        HTTPException: it holds more than the limits above, or what is no text.
    """
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > MAX_DELIMITERS:
        raise HTTPException(400, f"the body holds too many values: at most {MAX_JSON_VALUES:,}")
    blanks = sum(data.count(mark) for mark in (b" ", b"\n", b"\r", b"\t"))
    if max(blanks, data.count(b"\\")) > 2 * MAX_TEXT_CHARACTERS:  # a character is two escapes at most
        raise HTTPException(400, f"the body holds too many characters of text: at most {MAX_TEXT_CHARACTERS:,}")
    try:
        value = json.loads(data)
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


def _check_size(value: Any) -> None:
    stack, values, characters = [value], 0, 0
    while stack:
        one = stack.pop()
        values += 1
        if isinstance(one, str):
            characters += len(one)
        elif isinstance(one, dict):
            stack += one.keys()
            stack += ["" if _is_image_data(name, inner) else inner for name, inner in one.items()]
        elif isinstance(one, list):
            stack += one
    if values > MAX_JSON_VALUES:
        raise HTTPException(400, f"the body holds {values:,} values: at most {MAX_JSON_VALUES:,}")
    if characters > MAX_TEXT_CHARACTERS:
        raise HTTPException(400, f"the body holds {characters:,} characters of text: at most {MAX_TEXT_CHARACTERS:,}")


def _is_image_data(name: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    return name == "result" or (name in ("url", "image_url") and value[:5].lower() == "data:")


class BoundedRequest(Request):
    """Its JSON is read in a thread, within the limits."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            data = await self.body()
            self._json = await asyncio.to_thread(parse_json, data)
        return self._json


class BoundedRoute(APIRoute):
    """A route whose bodies are read so."""

    def get_route_handler(self) -> Any:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Any:
            return await handler(BoundedRequest(request.scope, request.receive))

        return bounded
