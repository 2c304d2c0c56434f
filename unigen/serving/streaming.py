"""Answers as server-sent events, and work that ends when the client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import aclosing
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from unigen.serving.errors import HTTPError

T = TypeVar("T")


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await the work, and cancel it when the client disconnects.

    Raises:
        HTTPError: the client disconnected (status 499).
    """
    task = asyncio.ensure_future(work)
    disconnect_task = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait([task, disconnect_task], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HTTPError(499, "the client left")
    finally:
        task.cancel()
        disconnect_task.cancel()
        await asyncio.gather(task, disconnect_task, return_exceptions=True)


async def stream_response(request: Request, chunks: AsyncGenerator[dict[str, object], None]) -> Response:
    """Answer with server-sent events, the last one "[DONE]".

    The first chunk is awaited before the response starts, so that a request that is rejected gets its HTTP status. An
    error after that is an event with the error object, and no "[DONE]" follows.

    Raises:
        HTTPError: of the first chunk.
    """
    first_chunk = await cancel_on_disconnect(request, anext(chunks))

    async def events() -> AsyncIterator[str]:
        async with aclosing(chunks):
            try:
                yield server_sent_event(first_chunk)
                async for chunk in chunks:
                    yield server_sent_event(chunk)
                yield "data: [DONE]\n\n"
            except HTTPError as error:
                yield server_sent_event(error.body)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def server_sent_event(data: Mapping[str, object]) -> str:
    """Return one event as it is sent; `type`, where there is one, is the event's name."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
