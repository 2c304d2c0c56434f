"""`/v1/responses` with the official client: whole and streamed, texts and images, and rejected requests."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.serving.test_fuzz import FakeImageEngine
from unigen.media.output import data_uri
from unigen.serving.app import create_app
from unigen.serving.config import ServerConfig
from unigen.serving.jobs import Error, Event, Finished, Job, Part, Started

DRAWS: Any = [{"type": "image_generation"}]
PICTURE = Image.new("RGB", (4, 4), "red")


def with_client(
    test: Callable[[Any], Awaitable[Any]], fake_engine: FakeImageEngine | None = None
) -> tuple[Any, list[Job]]:
    """Run the test with a client. Returns its result, and the jobs of the model."""
    fake_engine = fake_engine or FakeImageEngine()

    async def run() -> Any:
        transport = httpx.ASGITransport(create_app(fake_engine, ServerConfig(model_name="m")))
        web = httpx.AsyncClient(transport=transport)
        async with openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=web) as client:
            return await test(client)

    return asyncio.run(run()), fake_engine.jobs


def create(fake_engine: FakeImageEngine | None = None, **asked: Any) -> tuple[Any, Job]:
    """The response, and the job."""
    answer, (job,) = with_client(
        lambda client: client.responses.create(**{"model": "m", "input": "a"} | asked), fake_engine
    )
    return answer, job


def streamed(fake_engine: FakeImageEngine | None = None, **asked: Any) -> list[Any]:
    async def ask(client: Any) -> Any:
        return [event async for event in await client.responses.create(model="m", input="a", stream=True, **asked)]

    return with_client(ask, fake_engine)[0]


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


class Cut(FakeImageEngine):
    async def run_job(self, job: Job) -> AsyncGenerator[Event, None]:
        self.jobs.append(job)
        yield Started({})
        for piece in ("on", "e"):
            yield Part(piece)
        yield Part(PICTURE)
        yield Part("two")
        yield Finished("length", 2, 3, 4, 1)


class Broken(FakeImageEngine):
    async def run_job(self, job: Job) -> AsyncGenerator[Event, None]:
        yield Started({})
        yield Part("one")
        yield Error("it broke")


def test_text_answer() -> None:
    answer, job = create(instructions="be kind", metadata={"a": "b"}, max_output_tokens=9, temperature=0.5)
    assert answer.output_text == "said" and [item.type for item in answer.output] == ["message"]
    assert (answer.object, answer.status, answer.model, answer.error) == ("response", "completed", "m", None)
    assert answer.metadata == {"a": "b"} and answer.instructions == "be kind" and answer.max_output_tokens == 9
    assert answer.usage.input_tokens == 1 and answer.usage.output_tokens == 2 and answer.usage.total_tokens == 3
    assert job.output == "text" and job.options["max_tokens"] == 9 and job.options["temperature"] == 0.5
    assert answer.settings["ignored"] == ["system"] and [s.text for s in job.prompt.segments] == ["a"]


def test_images_are_generated_with_the_tool() -> None:
    for choice, output in ((None, "interleaved"), ("auto", "interleaved"), ("required", "image"), (DRAWS[0], "image")):
        more = {} if choice is None else {"tool_choice": choice}
        answer, job = create(tools=DRAWS, extra_body={"seed": 3, "guidance": 2.0}, **more)
        assert job.output == output and job.options["seed"] == 3 and job.options["guidance"] == 2.0
        types = ["message", "image_generation_call"] if output == "interleaved" else ["image_generation_call"]
        assert [item.type for item in answer.output] == types
        made = answer.output[-1]
        assert opened(made.result).size == (4, 4) and made.status == "completed" and answer.settings == {"seed": 3}
    _, job = create(tools=DRAWS, tool_choice="none")
    assert job.output == "text"
    tool = DRAWS[0] | {"size": "8x4", "output_format": "webp", "quality": "auto", "partial_images": 2}
    answer, job = create(tools=[tool], tool_choice="required")
    assert job.options["size"] == (8, 4) and opened(answer.output[0].result).format == "WEBP" and job.num_previews == 0


def test_truncated_answer_is_incomplete() -> None:
    """Its items are in the order in which they were generated."""
    answer, _ = create(Cut(), tools=DRAWS)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert [getattr(item, "content", [None])[0] and item.content[0].text for item in answer.output] == [
        "one",
        None,
        "two",
    ]
    assert answer.output_text == "onetwo" and answer.usage.output_tokens_details.image_tokens == 4
    assert len({item.id for item in answer.output}) == 3


def test_stream_has_openai_events_in_order() -> None:
    events = streamed(tools=[DRAWS[0] | {"partial_images": 2}])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "image_generation_call.in_progress",
        "image_generation_call.generating",
        "image_generation_call.partial_image",
        "image_generation_call.partial_image",
        "image_generation_call.completed",
        "output_item.done",
        "completed",
    ]
    for event in events:
        kind: Any = type(event)
        kind.model_validate(event.to_dict())  # what the client itself leaves unchecked
    assert [event.partial_image_index for event in events if "partial" in event.type] == [0, 1]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in events if hasattr(event, "output_index")] == [0] * 6 + [1] * 7
    whole = events[-1].response
    assert whole.output == done and whole.id == events[0].response.id and whole.output_text == "said"
    places = {(event.output_index, event.item_id) for event in events if hasattr(event, "item_id")}
    assert places == {(i, item.id) for i, item in enumerate(done)}
    cut = streamed(Cut(), tools=DRAWS)
    assert cut[-1].type == "response.incomplete" and len(cut[-1].response.output) == 3


def test_openai_client_reads_the_stream() -> None:
    async def ask(client: Any) -> Any:
        async with client.responses.stream(model="m", input="a", tools=DRAWS) as stream:
            said = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
            return said, await stream.get_final_response()

    (said, whole), _ = with_client(ask)
    assert said == ["said"] and whole.output_text == "said" and len(whole.output) == 2


def test_failure_in_a_stream_is_an_error_event() -> None:
    with pytest.raises(openai.APIError, match="it broke"):
        streamed(Broken())


def test_conversation_can_be_sent_back() -> None:
    """As the client's own objects, and as dictionaries."""
    seen = {"type": "input_image", "image_url": data_uri(PICTURE), "detail": "auto"}
    asked = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [seen, {"type": "input_text", "text": "b"}]},
    ]
    first, _ = create(Cut(), input=asked, tools=DRAWS)
    for given in (first.output, [item.model_dump() for item in first.output]):
        again = [*asked, *given, {"role": "user", "content": "c"}]
        _, job = create(input=again)
        segments = [(s.role, s.text or s.image.getpixel((0, 0))) for s in job.prompt.segments]
        assert segments == [
            ("user", (255, 0, 0)),
            ("user", "b"),
            ("assistant", "one"),
            ("assistant", (255, 0, 0)),
            ("assistant", "two"),
            ("user", "c"),
        ]


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}]}, "tools"),
        ({"tools": [{"type": "web_search"}, DRAWS[0]]}, "tools"),
        ({"tools": [DRAWS[0] | {"background": "transparent"}]}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "a"}]}, "function_call_output"),
        ({"input": [{"type": "image_generation_call", "id": "ig_1", "status": "completed"}]}, "result"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}]}, "image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file_1"}]}]}, "input_file"),
        ({"input": [{"role": "assistant", "content": "a"}]}, "input"),
        ({"input": ["a"]}, "input"),
        ({"input": ""}, "empty"),
        ({"input": ""}, "input.0.content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a", "detail": "low"}]}]},
            "input.0.content.0.image_url",
        ),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"extra_body": {"banana": 1}}, "banana"),
        ({"model": "other"}, "other"),
    ],
)
def test_unsupported_fields_are_named(asked: dict[str, Any], names: str) -> None:
    fake_engine = FakeImageEngine()
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        create(fake_engine, **asked)
    assert names in str(error.value.body) and "\n" not in error.value.message and not fake_engine.jobs


def test_image_only_model_requires_the_tool() -> None:
    class Draws(FakeImageEngine):
        info = {"outputs": ["image"]}

    with pytest.raises(openai.BadRequestError, match="image_generation"):
        create(Draws())
    assert create(Draws(), tools=DRAWS)[1].output == "image"
