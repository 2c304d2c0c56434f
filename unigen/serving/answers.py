"""Answers in the words of OpenAI's schema: the parts of whole ones, and the chunks of those that are streamed.

Knows the events of jobs and the JSON that a client reads (docs/serving.md); does not depend on HTTP, and where the
events come from.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from PIL import Image

from unigen.document import Preview
from unigen.media.output import data_uri
from unigen.serving import pictures
from unigen.serving.jobs import Event, Finished, Part, Started

Events: TypeAlias = AsyncGenerator[tuple[int, Event], None]
"""Of several jobs as they come, each with its job's place."""
Chunks: TypeAlias = AsyncGenerator[dict[str, Any], None]


@dataclass
class AnswerBuilder:
    """What became of a job: texts and pictures in order, and how they were made."""

    parts: list[str | Image.Image] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    ended: Finished = field(default_factory=lambda: Finished("stop"))

    def take(self, event: Event) -> None:
        if isinstance(event, Started):
            self.settings = event.settings
        elif isinstance(event, Finished):
            self.ended = event
        elif isinstance(event, Part):
            if isinstance(event.part, str) and self.parts and isinstance(self.parts[-1], str):
                self.parts[-1] += event.part
            else:
                self.parts.append(event.part)

    @property
    def pictures(self) -> list[Image.Image]:
        return [part for part in self.parts if not isinstance(part, str)]


async def chat_chunks(events: Events, head: dict[str, Any], usage: bool) -> Chunks:
    """A streamed chat, which joined is `assistant_message`: texts as delta.content, pictures as delta.images,
    unfinished ones marked as partial."""
    answers: defaultdict[int, AnswerBuilder] = defaultdict(AnswerBuilder)
    said: defaultdict[int, int] = defaultdict(int)  # characters of content
    head = head | {"object": "chat.completion.chunk"}

    def chunk(i: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
        return {**head, "choices": [{"index": i, "delta": delta, "finish_reason": reason, **more}]}

    async with aclosing(events):
        async for i, event in events:
            answer = answers[i]
            parted = paragraph_break(answer.parts)
            answer.take(event)
            if isinstance(event, Started):
                yield chunk(i, {"role": "assistant", "content": ""}, settings=event.settings)
            elif isinstance(event, Part):
                if isinstance(event.part, str):
                    said[i] += len(parted + event.part)
                    yield chunk(i, {"content": parted + event.part})
                else:
                    place = {"index": len(answer.pictures) - 1, "offset": said[i]}
                    yield chunk(i, {"images": [await image_part(event.part) | place]})
            elif isinstance(event, Preview):
                part = await image_part(event.image) | {"index": event.picture, "partial": True}
                yield chunk(i, {"images": [part]})
            elif isinstance(event, Finished):
                yield chunk(i, {}, event.reason)
    if usage:
        yield {**head, "choices": [], "usage": chat_usage(list(answers.values()))}


async def image_chunks(events: Events, model: str, kind: str, format: str, quality: int | None = None) -> Chunks:
    """Streamed pictures: OpenAI's events of this kind, with the picture's place among the n, and how it was made."""
    answers: defaultdict[int, AnswerBuilder] = defaultdict(AnswerBuilder)

    async def image_event(i: int, what: str, picture: Image.Image, **more: Any) -> dict[str, Any]:
        file = await asyncio.to_thread(pictures.encode_image, picture, format, quality)
        return {
            "type": f"{kind}.{what}",
            "index": i,
            "b64_json": base64.b64encode(file).decode(),
            "created_at": int(time.time()),
            "size": "{}x{}".format(*picture.size),
            "output_format": format,
            "background": "opaque",
            "quality": "auto",
            **more,
        }

    async with aclosing(events):
        async for i, event in events:
            answer = answers[i]
            answer.take(event)
            if isinstance(event, Preview):
                yield await image_event(i, "partial_image", event.image, partial_image_index=event.number)
            elif isinstance(event, Finished):
                told = {"model": model, "settings": answer.settings, "usage": images_usage([answer])}
                yield await image_event(i, "completed", answer.pictures[0], **told)


async def image_part(picture: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": await asyncio.to_thread(data_uri, picture)}}


async def assistant_message(parts: list[str | Image.Image], as_parts: bool = False) -> dict[str, Any]:
    """The assistant's message. Its text is `content`, a string, and its pictures are `images`, each with the number of
    characters of `content` that stand before it (`offset`). as_parts: `content` is a list of parts in order instead,
    where there are pictures."""
    told: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    if as_parts and not all(isinstance(part, str) for part in parts):
        content_parts = [{"type": "text", "text": p} if isinstance(p, str) else await image_part(p) for p in parts]
        return told | {"content": content_parts}
    images: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            told["content"] += paragraph_break(parts[:number]) + part
        else:
            images.append({**await image_part(part), "index": len(images), "offset": len(told["content"])})
    return told | ({"images": images} if images else {})


def paragraph_break(before: list[str | Image.Image]) -> str:
    """What parts a text from that before the last picture, in `content`."""
    return "\n\n" if before and not isinstance(before[-1], str) and any(isinstance(p, str) for p in before) else ""


def chat_usage(answers: list[AnswerBuilder]) -> dict[str, Any] | None:
    """Tokens read and written, the codes of pictures among the latter; None where the model does not count."""
    finishes = [answer.ended for answer in answers]
    if any(finish.prompt is None for finish in finishes):
        return None
    text, image = (sum(getattr(finish, name) for finish in finishes) for name in ("text", "image"))
    prompt = finishes[0].prompt or 0
    details = {"text_tokens": text, "image_tokens": image}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": text + image,
        "total_tokens": prompt + text + image,
        "completion_tokens_details": details,
    }


def images_usage(answers: list[AnswerBuilder]) -> dict[str, Any] | None:
    """The same as OpenAI's routes of pictures have it."""
    usage = chat_usage(answers)
    if usage is None:
        return None
    prompt_tokens, image_tokens = usage["prompt_tokens"], answers[0].ended.seen
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"text_tokens": prompt_tokens - image_tokens, "image_tokens": image_tokens},
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }
