"""OpenAI's `/v1/responses`: the request, and its answer, streamed or whole.

    client.responses.create(model="unigen-tiny", input="two apples", tools=[{"type": "image_generation"}])

`output` lists texts (items `message`) and images (items `image_generation_call`) in order. Images are drawn if the tool
`image_generation` is given. Nothing is stored: the client sends the whole conversation as `input`.

Does not depend on: HTTP, engines.
OpenAI's reference: https://platform.openai.com/docs/api-reference (responses).
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
import uuid
from contextlib import aclosing
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, field_validator, model_validator

from unigen.document import Preview
from unigen.inference.options import AnswerLimits, Previews
from unigen.serving import pictures
from unigen.serving.answers import AnswerBuilder, Chunks, Events, JSONObject, chat_usage
from unigen.serving.jobs import Event, Finished, Part, Started
from unigen.serving.protocol import (
    NO_REASONING,
    NO_TOOLS,
    NOT_STORED,
    SYSTEM_ROLES,
    ClientLabels,
    GenerationFields,
    LabelText,
    Message,
    Obfuscation,
    PromptText,
    StrictModel,
    accept_only,
    option_field,
)

IMAGE_TOOL = "image_generation"
"""The only tool."""
IMAGE_CALL = "image_generation_call"
"""Type of an item of `output` that is an image."""
STATELESS = "nothing is stored here: send the whole conversation as input"


class ImageTool(StrictModel):
    """How images are made; `size` and `partial_images` count as those of the request."""

    type: Literal["image_generation"]
    model: LabelText | None = None
    size: str | None = None
    partial_images: int | None = option_field(Previews, "previews")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    action: Annotated[object, accept_only("auto", message="the model decides: leave it out")] = None
    background: Annotated[object, accept_only("auto", "opaque", message="pictures are opaque here: leave it out")] = (
        None
    )
    input_fidelity: Annotated[object, accept_only("low", message="there is one fidelity: leave it out")] = None
    input_image_mask: Annotated[object, accept_only(message="see /v1/images/edits: leave it out")] = None
    moderation: Annotated[object, accept_only("auto", "low", message="nothing is moderated here: leave it out")] = None
    quality: Annotated[object, accept_only("auto", message="there is one quality: leave it out")] = None


class TextFormat(StrictModel):
    """The format of texts."""

    format: Annotated[object, accept_only({"type": "text"}, message='text alone is written here: {"type": "text"}')] = (
        None
    )
    verbosity: Annotated[object, accept_only("medium", message="the model chooses its length: leave it out")] = None


class ResponseStreamOptions(StrictModel):
    """Options of a stream."""

    include_obfuscation: Obfuscation = None


class ResponsesRequest(GenerationFields, ClientLabels):
    """Body of `/v1/responses`; the options of `GenerationFields` are beside OpenAI's fields."""

    model: str
    input: list[Message] = Field(min_length=1, max_length=1000)
    """A text, or messages and earlier images in order, as `output` listed them."""
    instructions: PromptText | None = None
    """A system message before the input."""
    tools: list[ImageTool] | None = Field(None, max_length=1)
    tool_choice: Literal["auto", "none", "required"] | dict[LabelText, LabelText] | None = None
    n: Literal[1] = 1
    max_output_tokens: int | None = option_field(AnswerLimits, "max_tokens")
    max_tool_calls: int | None = option_field(AnswerLimits, "max_images")
    text: TextFormat | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Literal["reasoning.encrypted_content", "message.input_image.image_url"]] | None = None
    # fields of clients that are accepted at the values at which they change nothing
    access_programs: Annotated[object, accept_only({}, message="there are none here: leave it out")] = None
    background: Annotated[object, accept_only(False, message=STATELESS)] = None
    context_management: Annotated[object, accept_only([], message="messages are read as they are: leave it out")] = None
    conversation: Annotated[object, accept_only(message=STATELESS)] = None
    image: Annotated[object, accept_only({}, message="messages are read as they are: leave it out")] = None
    moderation: Annotated[object, accept_only(message="nothing is moderated here: leave it out")] = None
    previous_response_id: Annotated[object, accept_only(message=STATELESS)] = None
    prompt: Annotated[object, accept_only(message=STATELESS)] = None
    reasoning: Annotated[object, accept_only({}, {"effort": "none"}, {"effort": "minimal"}, message=NO_REASONING)] = (
        None
    )
    service_tier: Annotated[object, accept_only("auto", "default", message="there is one tier: leave it out")] = None
    store: Annotated[object, accept_only(False, message=NOT_STORED)] = None
    top_logprobs: Annotated[object, accept_only(0, message="no probabilities are given here: leave it out")] = None
    truncation: Annotated[object, accept_only("disabled", message="messages are read as they are: leave it out")] = None

    @model_validator(mode="before")
    @classmethod
    def _lift_tool_options(cls, data: object) -> object:
        """Copy the size and the previews of the tool to the request."""
        if not isinstance(data, dict) or not isinstance(data.get("tools"), list):
            return data
        if data.get("tool_choice") == "none":
            return {**data, "tools": None}
        for tool in data["tools"]:
            if not isinstance(tool, dict) or tool.get("type") != IMAGE_TOOL:
                raise ValueError(f"tools: {NO_TOOLS}, but for {IMAGE_TOOL}")
            lifted = {
                "size": tool.get("size"),
                "partial_images": tool.get("partial_images") if data.get("stream") else None,
            }
            data = {**data, **{name: value for name, value in lifted.items() if value is not None}}
        return data

    @field_validator("input", mode="before")
    @classmethod
    def _input_as_messages(cls, value: object) -> object:
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        return [_to_chat_message(item) for item in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_answerable(self) -> ResponsesRequest:
        turns = [message for message in self.input if message.role not in SYSTEM_ROLES]
        if not turns or turns[-1].role != "user":
            raise ValueError("the last message of input must be the user's")
        forced_tool = self.tool_choice.get("type") if isinstance(self.tool_choice, dict) else None
        if isinstance(self.tool_choice, dict) and forced_tool != IMAGE_TOOL:
            raise ValueError(f"tool_choice: {NO_TOOLS}, but for {IMAGE_TOOL}")
        if (forced_tool or self.tool_choice == "required") and not self.tools:
            raise ValueError(f'tool_choice is for tools: give [{{"type": "{IMAGE_TOOL}"}}]')
        return self

    @property
    def messages(self) -> list[Message]:
        """The conversation. The instructions come last, so that errors name the items of `input` by their index."""
        if not self.instructions:
            return self.input
        return [*self.input, Message.model_validate({"role": "system", "content": self.instructions})]

    @property
    def modalities(self) -> list[str] | None:
        """What the answer may contain; None leaves it to the model."""
        if not self.tools:
            return ["text"]
        return None if self.tool_choice in (None, "auto") else ["image"]

    def options(self) -> dict[str, Any]:
        """The options of the generation that the request gives, by name."""
        options = {"max_tokens": self.max_output_tokens, "max_images": self.max_tool_calls}
        return super().options() | {name: value for name, value in options.items() if value is not None}


def _to_chat_message(item: object) -> JSONObject:
    """Return an item of `input` as a message of `protocol.Message`.

    Raises:
        ValueError: it is an item of another kind.
    """
    if not isinstance(item, dict):
        raise ValueError("its items are objects, such as messages")
    kind = item.get("type") or "message"
    if kind == IMAGE_CALL:
        if not isinstance(item.get("result"), str):
            raise ValueError(f"an item of type {kind} needs its result, the picture in base64")
        return {"role": "assistant", "images": [{"image_url": {"url": "data:image/png;base64," + item["result"]}}]}
    if kind != "message":
        raise ValueError(f"its items are messages and {IMAGE_CALL}, not {str(kind)[:100]!r}")
    message = {name: value for name, value in item.items() if name not in ("type", "id", "status", "phase")}
    if isinstance(message.get("content"), list):
        message["content"] = [_to_chat_part(part) for part in message["content"]]
    return message


def _to_chat_part(part: object) -> object:
    """Return a part of a message's content as a part of a chat message."""
    if not isinstance(part, dict):
        return part
    fields = {name: value for name, value in part.items() if name not in ("annotations", "logprobs")}
    if fields.get("type") in ("input_text", "output_text"):
        return fields | {"type": "text"}
    if fields.get("type") == "input_image":
        if fields.pop("file_id", None) is not None or not isinstance(fields.get("image_url"), str):
            raise ValueError("an input_image needs its image_url: files are not stored here")
        image = {"url": fields["image_url"], "detail": fields.pop("detail", None) or "auto"}
        return fields | {"type": "image_url", "image_url": image}
    return part


async def response_events(events: Events, body: ResponsesRequest, model: str) -> Chunks:
    """Yield OpenAI's events of one answer; the last one contains the whole response.

    Args:
        events: of one job.
        body: the request.
        model: name of the model.
    """
    builder = _ResponseBuilder(body, model)
    async with aclosing(events):
        async for _, event in events:
            for response_event in await builder.add_event(event):
                yield response_event


class _ResponseBuilder:
    """A response, built from the events of its job. At most one item of `output` is open at a time."""

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        self.tool = body.tools[0] if body.tools else ImageTool.model_validate({"type": IMAGE_TOOL})
        self.response = _empty_response(body, model)
        self.output: list[JSONObject] = []
        self.answer = AnswerBuilder()
        self._item: JSONObject | None = None  # in progress
        self._sequence_numbers = itertools.count()

    async def add_event(self, event: Event) -> list[JSONObject]:
        """Add an event of the job.

        Returns:
            The events of the response that it causes, in order.
        """
        content = event.content if isinstance(event, Part) else None
        is_image = isinstance(event, Preview) or isinstance(content, Image.Image)
        new_events: list[JSONObject] = []
        if isinstance(event, Finished) or (is_image and self._item is not None and self._item["type"] == "message"):
            new_events += self._finish_message()
        self.answer.add_event(event)
        if isinstance(event, (Preview, Part)) and self._item is None:
            new_events += self._start_item(IMAGE_CALL if is_image else "message")
        if isinstance(event, Started):
            self.response["settings"] = event.settings
            new_events += [self._event(name, response=dict(self.response)) for name in ("created", "in_progress")]
        elif isinstance(event, Preview):
            new_events.append(await self._preview_event(event))
        elif isinstance(content, str):
            new_events.append(self._item_event("output_text.delta", content_index=0, delta=content, logprobs=[]))
        elif content is not None:
            new_events += await self._finish_image(content)
        elif isinstance(event, Finished):
            new_events.append(self._finish_response(event))
        return new_events

    def _event(self, kind: str, **fields: object) -> JSONObject:
        return {"type": f"response.{kind}", "sequence_number": next(self._sequence_numbers), **fields}

    def _item_event(self, kind: str, **fields: object) -> JSONObject:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self.output), **fields)

    def _start_item(self, kind: str) -> list[JSONObject]:
        if kind == "message":
            self._item = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "role": "assistant", "content": []}
        else:
            self._item = {"id": f"ig_{uuid.uuid4().hex}", "type": kind, "result": None}
        self._item["status"] = "in_progress"
        added = self._event("output_item.added", output_index=len(self.output), item=dict(self._item))
        if kind == "message":
            return [added, self._item_event("content_part.added", content_index=0, part=_output_text(""))]
        return [added, self._item_event(f"{kind}.in_progress"), self._item_event(f"{kind}.generating")]

    def _finish_item(self, **fields: object) -> JSONObject:
        """Complete the open item with these fields, and return its last event."""
        assert self._item is not None
        item = self._item | {"status": "completed", **fields}
        event = self._event("output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        self._item = None
        return event

    def _finish_message(self) -> list[JSONObject]:
        if self._item is None:
            return []
        text = str(self.answer.parts[-1])
        part = _output_text(text)
        return [
            self._item_event("output_text.done", content_index=0, text=text, logprobs=[]),
            self._item_event("content_part.done", content_index=0, part=part),
            self._finish_item(content=[part]),
        ]

    async def _preview_event(self, preview: Preview) -> JSONObject:
        return self._item_event(
            f"{IMAGE_CALL}.partial_image",
            size="{}x{}".format(*preview.image.size),
            output_format=self.tool.output_format,
            partial_image_index=preview.preview_index,
            partial_image_b64=await self._encode_base64(preview.image),
        )

    async def _finish_image(self, image: Image.Image) -> list[JSONObject]:
        result, size = await self._encode_base64(image), "{}x{}".format(*image.size)
        completed = self._item_event(f"{IMAGE_CALL}.completed")
        return [completed, self._finish_item(output_format=self.tool.output_format, result=result, size=size)]

    async def _encode_base64(self, image: Image.Image) -> str:
        options = (self.tool.output_format, self.tool.output_compression)
        return base64.b64encode(await asyncio.to_thread(pictures.encode_image, image, *options)).decode()

    def _finish_response(self, event: Finished) -> JSONObject:
        is_truncated = event.finish_reason == "length"
        status = "incomplete" if is_truncated else "completed"
        self.response |= {
            "status": status,
            "output": self.output,
            "usage": _response_usage(self.answer),
            "completed_at": None if is_truncated else time.time(),
            "incomplete_details": {"reason": "max_output_tokens"} if is_truncated else None,
        }
        return self._event(status, response=self.response)


def _output_text(text: str) -> JSONObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _empty_response(body: ResponsesRequest, model: str) -> JSONObject:
    """Return the response before anything is generated; like OpenAI's it repeats fields of the request."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": time.time(),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _response_usage(answer: AnswerBuilder) -> JSONObject | None:
    """Return `chat_usage` under the names of the responses API."""
    usage = chat_usage([answer])
    if usage is None:
        return None
    image_tokens = answer.finish.prompt_image_tokens
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, "image_tokens": image_tokens},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0, **usage["completion_tokens_details"]},
        "total_tokens": usage["total_tokens"],
    }
