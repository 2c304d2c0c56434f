"""OpenAI's `/v1/responses`: what is asked there, and its answer, streamed or whole.

    client.responses.create(model="unigen-tiny", input="two apples", tools=[{"type": "image_generation"}])

`output` lists in order what was said, items `message`, and what was drawn, items `image_generation_call`. Pictures are
drawn where the tool `image_generation` is given. Nothing is stored: a conversation is sent whole, as `input`. Knows the
schema and the events of jobs; does not depend on HTTP.
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

from pydantic import Field, field_validator, model_validator

from unigen.document import Preview
from unigen.serving import pictures
from unigen.serving.answers import AnswerBuilder, Chunks, Events, chat_usage
from unigen.serving.jobs import Finished, Part, Started
from unigen.serving.protocol import (
    NO_REASONING,
    NO_TOOLS,
    NOT_STORED,
    SYSTEM_ROLES,
    ClientLabels,
    GenerationFields,
    LabelText,
    Message,
    PromptText,
    StrictModel,
    accept_only,
    bounded_field,
)

IMAGE_TOOL = "image_generation"
"""The one tool that there is."""
STATELESS = "nothing is stored here: send the whole conversation as input"


class ImageTool(StrictModel):
    """How pictures are made; size and partial_images count as those of the request."""

    type: Literal["image_generation"]
    model: LabelText | None = None
    size: str | None = None
    partial_images: int | None = bounded_field("previews")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    action: Annotated[Any, accept_only("auto", says="the model decides: leave it out")] = None
    background: Annotated[Any, accept_only("auto", "opaque", says="pictures are opaque here: leave it out")] = None
    input_fidelity: Annotated[Any, accept_only("low", says="there is one fidelity: leave it out")] = None
    input_image_mask: Annotated[Any, accept_only(says="see /v1/images/edits: leave it out")] = None
    moderation: Annotated[Any, accept_only("auto", "low", says="nothing is moderated here: leave it out")] = None
    quality: Annotated[Any, accept_only("auto", says="there is one quality: leave it out")] = None


class TextFormat(StrictModel):
    format: Annotated[Any, accept_only({"type": "text"}, says='text alone is written here: {"type": "text"}')] = None
    verbosity: Annotated[Any, accept_only("medium", says="the model chooses its length: leave it out")] = None


class ResponseStreamOptions(StrictModel):
    include_obfuscation: Annotated[Any, accept_only(False, says="streams are not padded here: leave it out")] = None


class ResponsesRequest(GenerationFields, ClientLabels):
    """input: a text, or messages and earlier pictures in order, as `output` listed them. instructions: a system
    message before them. All that draws takes the options of `GenerationFields` too."""

    model: str
    input: list[Message] = Field(min_length=1, max_length=1000)
    instructions: PromptText | None = None
    tools: list[ImageTool] | None = Field(None, max_length=1)
    tool_choice: Literal["auto", "none", "required"] | dict[LabelText, LabelText] | None = None
    n: Literal[1] = 1
    max_output_tokens: int | None = bounded_field("max_tokens")
    max_tool_calls: int | None = bounded_field("max_images")
    text: TextFormat | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Literal["reasoning.encrypted_content", "message.input_image.image_url"]] | None = None
    # what clients send though they ask for nothing by it
    access_programs: Annotated[Any, accept_only({}, says="there are none here: leave it out")] = None
    background: Annotated[Any, accept_only(False, says=STATELESS)] = None
    context_management: Annotated[Any, accept_only([], says="messages are read as they are: leave it out")] = None
    conversation: Annotated[Any, accept_only(says=STATELESS)] = None
    image: Annotated[Any, accept_only({}, says="messages are read as they are: leave it out")] = None
    moderation: Annotated[Any, accept_only(says="nothing is moderated here: leave it out")] = None
    previous_response_id: Annotated[Any, accept_only(says=STATELESS)] = None
    prompt: Annotated[Any, accept_only(says=STATELESS)] = None
    reasoning: Annotated[Any, accept_only({}, {"effort": "none"}, {"effort": "minimal"}, says=NO_REASONING)] = None
    service_tier: Annotated[Any, accept_only("auto", "default", says="there is one tier: leave it out")] = None
    store: Annotated[Any, accept_only(False, says=NOT_STORED)] = None
    top_logprobs: Annotated[Any, accept_only(0, says="no probabilities are given here: leave it out")] = None
    truncation: Annotated[Any, accept_only("disabled", says="messages are read as they are: leave it out")] = None

    @model_validator(mode="before")
    @classmethod
    def _lift_tool_options(cls, data: Any) -> Any:
        """The size and the previews of the tool, as the request's own."""
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
    def _input_as_messages(cls, given: Any) -> Any:
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
        return [_message(item) for item in given] if isinstance(given, list) else given

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
        """The places of `input` keep their numbers: the instructions are the last."""
        if not self.instructions:
            return self.input
        return [*self.input, Message.model_validate({"role": "system", "content": self.instructions})]

    @property
    def modalities(self) -> list[str] | None:
        """What the answer may hold; None is left to the model."""
        if not self.tools:
            return ["text"]
        return None if self.tool_choice in (None, "auto") else ["image"]

    def options(self) -> dict[str, Any]:
        given = {"max_tokens": self.max_output_tokens, "max_images": self.max_tool_calls}
        return super().options() | {name: value for name, value in given.items() if value is not None}


def _message(item: Any) -> Any:
    """An item of `input` as a message of a chat."""
    if not isinstance(item, dict):
        raise ValueError("its items are objects, such as messages")
    kind = item.get("type") or "message"
    if kind == f"{IMAGE_TOOL}_call":
        if not isinstance(item.get("result"), str):
            raise ValueError(f"an item of type {kind} needs its result, the picture in base64")
        return {"role": "assistant", "images": [{"image_url": {"url": "data:image/png;base64," + item["result"]}}]}
    if kind != "message":
        raise ValueError(f"its items are messages and {IMAGE_TOOL}_call, not {str(kind)[:100]!r}")
    message = {name: value for name, value in item.items() if name not in ("type", "id", "status", "phase")}
    if isinstance(message.get("content"), list):
        message["content"] = [_part(part) for part in message["content"]]
    return message


def _part(part: Any) -> Any:
    """A part of a message's content as chats have it."""
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


async def response_events(events: Events, asked: ResponsesRequest, model: str) -> Chunks:
    """The events of one answer, in OpenAI's order; the last one holds the whole response."""
    numbers, answer, output = itertools.count(), AnswerBuilder(), list[dict[str, Any]]()
    form = asked.tools[0] if asked.tools else ImageTool.model_validate({"type": IMAGE_TOOL})
    response = _response(asked, model)
    item: dict[str, Any] | None = None  # not yet finished

    def event_of(kind: str, **more: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "sequence_number": next(numbers), **more}

    def item_event(kind: str, **more: Any) -> dict[str, Any]:
        assert item is not None
        return event_of(kind, item_id=item["id"], output_index=len(output), **more)

    def start_item(kind: str) -> list[dict[str, Any]]:
        nonlocal item
        if kind == "message":
            item = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "role": "assistant", "content": []}
        else:
            item = {"id": f"ig_{uuid.uuid4().hex}", "type": kind, "result": None}
        item["status"] = "in_progress"
        events = [event_of("output_item.added", output_index=len(output), item=dict(item))]
        if kind == "message":
            return [*events, item_event("content_part.added", content_index=0, part=_text(""))]
        return [*events, item_event(f"{kind}.in_progress"), item_event(f"{kind}.generating")]

    def finish_message() -> list[dict[str, Any]]:
        nonlocal item
        if item is None:
            return []
        text = _text(str(answer.parts[-1]))
        item = item | {"status": "completed", "content": [text]}
        events = [
            item_event("output_text.done", content_index=0, text=text["text"], logprobs=[]),
            item_event("content_part.done", content_index=0, part=text),
            event_of("output_item.done", output_index=len(output), item=item),
        ]
        output.append(item)
        item = None
        return events

    async def encoded(picture: Any) -> str:
        file = await asyncio.to_thread(pictures.encode_image, picture, form.output_format, form.output_compression)
        return base64.b64encode(file).decode()

    call = f"{IMAGE_TOOL}_call"
    async with aclosing(events):
        async for _, event in events:
            is_image = isinstance(event, Preview) or (isinstance(event, Part) and not isinstance(event.part, str))
            if isinstance(event, Finished) or (is_image and item is not None and item["type"] == "message"):
                for one in finish_message():
                    yield one
            answer.take(event)
            if isinstance(event, Started):
                response["settings"] = event.settings
                yield event_of("created", response=dict(response))
                yield event_of("in_progress", response=dict(response))
            elif isinstance(event, (Preview, Part)) and item is None:
                for one in start_item(call if is_image else "message"):
                    yield one
            if isinstance(event, Part) and isinstance(event.part, str):
                yield item_event("output_text.delta", content_index=0, delta=event.part, logprobs=[])
            elif isinstance(event, Preview):
                preview_fields = {"partial_image_index": event.number, "partial_image_b64": await encoded(event.image)}
                size = "{}x{}".format(*event.image.size)
                yield item_event(f"{call}.partial_image", size=size, output_format=form.output_format, **preview_fields)
            elif isinstance(event, Part):
                assert item is not None and not isinstance(event.part, str)
                result_fields = {"result": await encoded(event.part), "size": "{}x{}".format(*event.part.size)}
                item = item | {"status": "completed", "output_format": form.output_format, **result_fields}
                yield item_event(f"{call}.completed")
                yield event_of("output_item.done", output_index=len(output), item=item)
                output.append(item)
                item = None
            elif isinstance(event, Finished):
                cut = event.reason == "length"
                response |= {"status": "incomplete" if cut else "completed", "output": output}
                response |= {"usage": _usage(answer), "completed_at": None if cut else time.time()}
                response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
                yield event_of("incomplete" if cut else "completed", response=response)


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response(asked: ResponsesRequest, model: str) -> dict[str, Any]:
    """Before anything is said: what was asked is told again, as OpenAI does."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": time.time(),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": asked.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto",
        "tools": [tool.model_dump(exclude_none=True) for tool in asked.tools or ()],
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
    }


def _usage(answer: AnswerBuilder) -> dict[str, Any] | None:
    usage = chat_usage([answer])
    if usage is None:
        return None
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, "image_tokens": answer.ended.seen},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0, **usage["completion_tokens_details"]},
        "total_tokens": usage["total_tokens"],
    }
