"""Answers in OpenAI's schema: the objects of whole answers, and the chunks of streamed ones.

docs/serving.md describes the JSON. Does not depend on: HTTP, engines.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeAlias, TypedDict

from PIL import Image

from unigen.document import Preview
from unigen.media.output import data_uri
from unigen.serving import pictures
from unigen.serving.jobs import Event, Finished, Part, Started

JSONObject: TypeAlias = dict[str, object]
"""A JSON object."""
Events: TypeAlias = AsyncGenerator[tuple[int, Event], None]
"""Events of several jobs as they come, each with the index of its job."""
Chunks: TypeAlias = AsyncGenerator[JSONObject, None]
"""JSON objects of a stream."""


class OutputTokenDetails(TypedDict):
    """How many of the generated tokens are text, and how many are image codes."""

    text_tokens: int
    image_tokens: int


class ChatUsage(TypedDict):
    """OpenAI's `usage` of a chat completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: OutputTokenDetails


@dataclass
class AnswerBuilder:
    """The answer of one job, built from its events."""

    parts: list[str | Image.Image] = field(default_factory=list)
    """Texts and images in order."""
    settings: JSONObject = field(default_factory=dict)
    """How they are made, defaults filled in."""
    finish: Finished = field(default_factory=lambda: Finished("stop"))

    def add_event(self, event: Event) -> None:
        """Add what the event says; text joins the text before it."""
        if isinstance(event, Started):
            self.settings = event.settings
        elif isinstance(event, Finished):
            self.finish = event
        elif isinstance(event, Part):
            if isinstance(event.content, str) and self.parts and isinstance(self.parts[-1], str):
                self.parts[-1] += event.content
            else:
                self.parts.append(event.content)

    @property
    def images(self) -> list[Image.Image]:
        """The images of the answer, in order."""
        return [part for part in self.parts if not isinstance(part, str)]


async def chat_chunks(events: Events, head: JSONObject, usage: bool) -> Chunks:
    """Yield the chunks of a streamed chat completion, which joined are `assistant_message`.

    Texts are delta.content, images are delta.images; unfinished images are marked as partial.

    Args:
        events: of the n answers.
        head: id, created and model of every chunk.
        usage: whether a last chunk has the usage.
    """
    answers: defaultdict[int, AnswerBuilder] = defaultdict(AnswerBuilder)
    num_characters: defaultdict[int, int] = defaultdict(int)  # of content
    head = head | {"object": "chat.completion.chunk"}

    def chunk(i: int, delta: JSONObject, finish_reason: str | None = None, **extra: object) -> JSONObject:
        return {**head, "choices": [{"index": i, "delta": delta, "finish_reason": finish_reason, **extra}]}

    async with aclosing(events):
        async for i, event in events:
            answer = answers[i]
            separator = paragraph_break(answer.parts)
            answer.add_event(event)
            if isinstance(event, Started):
                yield chunk(i, {"role": "assistant", "content": ""}, settings=event.settings)
            elif isinstance(event, Part):
                if isinstance(event.content, str):
                    text = separator + event.content
                    num_characters[i] += len(text)
                    yield chunk(i, {"content": text})
                else:
                    place: JSONObject = {"index": len(answer.images) - 1, "offset": num_characters[i]}
                    yield chunk(i, {"images": [await image_part(event.content) | place]})
            elif isinstance(event, Preview):
                part = await image_part(event.image) | {"index": event.image_index, "partial": True}
                yield chunk(i, {"images": [part]})
            elif isinstance(event, Finished):
                yield chunk(i, {}, event.finish_reason)
    if usage:
        yield {**head, "choices": [], "usage": chat_usage(list(answers.values()))}


async def image_chunks(
    events: Events, model: str, event_prefix: str, format: str, quality: int | None = None
) -> Chunks:
    """Yield OpenAI's events of streamed images, each with the index of its answer and how it is made.

    Args:
        events: of the n answers.
        model: name of the model.
        event_prefix: of the events' names, as in "image_generation".
        format: "png", "jpeg" or "webp".
        quality: of JPEG and WebP, 0 to 100; None is the default of `pictures.encode_image`.
    """
    answers: defaultdict[int, AnswerBuilder] = defaultdict(AnswerBuilder)

    async def image_event(i: int, name: str, image: Image.Image, **extra: object) -> JSONObject:
        file = await asyncio.to_thread(pictures.encode_image, image, format, quality)
        return {
            "type": f"{event_prefix}.{name}",
            "index": i,
            "b64_json": base64.b64encode(file).decode(),
            "created_at": int(time.time()),
            "size": "{}x{}".format(*image.size),
            "output_format": format,
            "background": "opaque",
            "quality": "auto",
            **extra,
        }

    async with aclosing(events):
        async for i, event in events:
            answer = answers[i]
            answer.add_event(event)
            if isinstance(event, Preview):
                yield await image_event(i, "partial_image", event.image, partial_image_index=event.preview_index)
            elif isinstance(event, Finished):
                usage = images_usage([answer])
                yield await image_event(
                    i, "completed", answer.images[0], model=model, settings=answer.settings, usage=usage
                )


async def image_part(image: Image.Image) -> JSONObject:
    """Return the image as a part of a message's content."""
    return {"type": "image_url", "image_url": {"url": await asyncio.to_thread(data_uri, image)}}


async def assistant_message(parts: Sequence[str | Image.Image], as_parts: bool = False) -> JSONObject:
    """Return the message of an answer.

    The text is `content`, a string, and the images are `images`, each with the number of characters of `content` that
    stand before it (`offset`).

    Args:
        parts: texts and images in order.
        as_parts: whether `content` is a list of the parts in order instead, where there are images.
    """
    message: JSONObject = {"role": "assistant", "content": "", "refusal": None}
    if as_parts and not all(isinstance(part, str) for part in parts):
        content_parts = [{"type": "text", "text": p} if isinstance(p, str) else await image_part(p) for p in parts]
        return message | {"content": content_parts}
    content, images = "", list[JSONObject]()
    for i, part in enumerate(parts):
        if isinstance(part, str):
            content += paragraph_break(parts[:i]) + part
        else:
            images.append({**await image_part(part), "index": len(images), "offset": len(content)})
    message["content"] = content
    return message | ({"images": images} if images else {})


def paragraph_break(previous_parts: Sequence[str | Image.Image]) -> str:
    """Return what separates, in `content`, a text after an image from the text before that image."""
    after_image = bool(previous_parts) and not isinstance(previous_parts[-1], str)
    return "\n\n" if after_image and any(isinstance(part, str) for part in previous_parts) else ""


def chat_usage(answers: Sequence[AnswerBuilder]) -> ChatUsage | None:
    """Return the numbers of tokens read and generated, image codes among them; None where the model does not count."""
    finishes = [answer.finish for answer in answers]
    if any(finish.prompt_tokens is None for finish in finishes):
        return None
    text = sum(finish.text_tokens or 0 for finish in finishes)
    image = sum(finish.image_tokens or 0 for finish in finishes)
    prompt = finishes[0].prompt_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": text + image,
        "total_tokens": prompt + text + image,
        "completion_tokens_details": {"text_tokens": text, "image_tokens": image},
    }


def images_usage(answers: Sequence[AnswerBuilder]) -> JSONObject | None:
    """Return `chat_usage` under the names of OpenAI's image routes."""
    usage = chat_usage(answers)
    if usage is None:
        return None
    prompt_tokens, image_tokens = usage["prompt_tokens"], answers[0].finish.prompt_image_tokens
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"text_tokens": prompt_tokens - image_tokens, "image_tokens": image_tokens},
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }
