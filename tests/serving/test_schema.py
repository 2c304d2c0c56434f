"""Further fields that common clients send: followed, accepted without effect, or rejected by name."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any

import httpx
import openai
import openai.resources.responses
import pytest
from PIL import Image

from tests.serving.test_fuzz import FakeImageEngine
from unigen.media.output import data_uri
from unigen.model.template import default_output, is_question
from unigen.serving import protocol
from unigen.serving.app import create_app
from unigen.serving.config import ServerConfig
from unigen.serving.pictures import encode_image
from unigen.serving.responses import ResponsesRequest

CHAT, DRAW, EDIT, VARY = (
    f"/v1/{name}" for name in ("chat/completions", "images/generations", "images/edits", "images/variations")
)
PICTURE = Image.new("RGB", (4, 4), "red")
URI = data_uri(PICTURE)
CHAT_BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
IMAGE_BODY: dict[str, Any] = {"model": "m", "prompt": "a"}


class FixedImageEngine(FakeImageEngine):
    """An engine with one image size."""

    info = FakeImageEngine.info | {"sizes": "this one", "image_size": 4}


ENGINE = FixedImageEngine()
APP = create_app(ENGINE, ServerConfig(model_name="m"))


def post(path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
    async def ask() -> Any:
        transport = httpx.ASGITransport(APP)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, json=body, **options)

    answer = asyncio.run(ask())
    return answer.status_code, answer.json() if answer.headers["content-type"] == "application/json" else answer.text


def fields_of(method: Any) -> set[str]:
    """The fields that the official client sends with this method."""
    return set(inspect.signature(method).parameters) - {
        *("self", "extra_headers", "extra_query", "extra_body", "timeout", "image", "mask", "markup"),
    }


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (openai.resources.chat.completions.Completions.create, protocol.ChatRequest),
        (openai.resources.responses.Responses.create, ResponsesRequest),
        (openai.resources.images.Images.generate, protocol.GenerationRequest),
        (openai.resources.images.Images.edit, protocol.EditRequest),
        (openai.resources.images.Images.create_variation, protocol.VariationRequest),
    ],
)
def test_every_field_of_the_openai_client_is_known(method: Any, kind: Any) -> None:
    assert fields_of(method) <= set(kind.model_fields)


NEUTRAL_VALUES: dict[str, dict[str, list[Any]]] = {
    CHAT: {
        "audio": [],
        "frequency_penalty": [0, 0.0],
        "function_call": ["none", "auto"],
        "functions": [[]],
        "logit_bias": [{}],
        "logprobs": [False],
        "max_completion_tokens": [5],
        "max_tokens": [5],
        "metadata": [{}, {"chat": "1"}],
        "modalities": [["text"], ["image", "text"]],
        "moderation": [],
        "n": [1],
        "parallel_tool_calls": [True, False],
        "partial_images": [0],
        "prediction": [],
        "presence_penalty": [0],
        "prompt_cache_key": ["a"],
        "prompt_cache_retention": ["24h"],
        "reasoning_effort": ["none"],
        "repetition_penalty": [1.0],
        "response_format": [{"type": "text"}],
        "safety_identifier": ["a"],
        "seed": [1],
        "service_tier": ["auto", "default"],
        "stop": ["x", [], ["x"]],
        "store": [False],
        "stream": [False],
        "stream_options": [],
        "temperature": [1, 0.5],
        "tool_choice": ["none", "auto"],
        "tools": [[]],
        "top_logprobs": [0],
        "top_p": [1],
        "user": ["someone"],
        "verbosity": ["medium"],
        "web_search_options": [],
        # of OpenRouter's clients
        "image_config": [{}],
        "include_reasoning": [False, True],
        "plugins": [[]],
        "provider": [{}],
        "reasoning": [{}, {"enabled": False}, {"effort": "none"}, {"exclude": True}],
        "route": ["fallback"],
        "transforms": [[]],
        "usage": [{"include": True}],
        # of vLLM's and Qwen's
        "add_generation_prompt": [True],
        "add_special_tokens": [False],
        "bad_words": [[]],
        "best_of": [1],
        "chat_template_kwargs": [{}, {"enable_thinking": False}],
        "continue_final_message": [False],
        "echo": [False],
        "enable_thinking": [False],
        "ignore_eos": [False],
        "include_stop_str_in_output": [False],
        "length_penalty": [1.0],
        "min_p": [0],
        "min_tokens": [0],
        "priority": [0],
        "request_id": ["a"],
        "skip_special_tokens": [True],
        "spaces_between_special_tokens": [True],
        "stop_token_ids": [[]],
        "thinking": [{"type": "disabled"}],
        "top_k": [-1, 0, 5],
        "use_beam_search": [False],
    },
    DRAW: {
        "background": ["auto", "opaque"],
        "complexity": [],
        "frame_count": [1],
        "frame_duration_ms": [],
        "moderation": ["auto", "low"],
        "n": [2],
        "output_compression": [100],
        "output_format": ["png", "jpeg", "webp"],
        "partial_images": [0],
        "quality": ["auto", "standard"],
        "response_format": ["b64_json"],
        "safety_identifier": ["a"],
        "size": ["auto", "256x256", "1024x1024", "1792x1024", "4x4"],
        "stream": [False],
        "style": ["vivid"],
        "svg": [],
        "user": ["someone"],
    },
}
REFUSED_VALUES: dict[str, dict[str, list[Any]]] = {
    CHAT: {
        "audio": [{"voice": "alloy", "format": "wav"}],
        "frequency_penalty": [0.5, False],
        "function_call": [{"name": "f"}],
        "functions": [[{"name": "f"}]],
        "logit_bias": [{"7": 1}],
        "logprobs": [True, 0],
        "metadata": [{"a": 1}],
        "modalities": [["text", "audio"], []],
        "moderation": [{"model": "a"}],
        "prediction": [{"type": "content", "content": "a"}],
        "presence_penalty": [1],
        "reasoning_effort": ["high"],
        "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
        "service_tier": ["priority"],
        "store": [True],
        "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
        "tools": [[{"type": "function", "function": {"name": "f"}}]],
        "top_logprobs": [2],
        "verbosity": ["low"],
        "web_search_options": [{}],
        "image_config": [{"aspect_ratio": "16:9"}],
        "plugins": [[{"id": "web"}]],
        "provider": [{"order": ["a"]}],
        "reasoning": [{"effort": "high"}],
        "transforms": [["middle-out"]],
        "usage": [{"banana": True}],
        "best_of": [2],
        "chat_template_kwargs": [{"enable_thinking": True}],
        "echo": [True],
        "ignore_eos": [True],
        "min_tokens": [5],
        "skip_special_tokens": [False],
        "stop_token_ids": [[1]],
        "thinking": [{"type": "enabled"}],
        "top_k": [-2, True],
        "use_beam_search": [True],
    },
    DRAW: {
        "background": ["transparent"],
        "complexity": ["high"],
        "frame_count": [4],
        "output_format": ["gif", "svg"],
        "quality": ["hd", "high"],
        "size": ["8x8", "1024", "0x0"],
        "style": ["natural"],
        "svg": [{"model": "a"}],
    },
}


@pytest.mark.parametrize("path", NEUTRAL_VALUES)
def test_neutral_values_are_accepted_and_others_named(path: str) -> None:
    whole = CHAT_BODY if path == CHAT else IMAGE_BODY
    kind: Any = protocol.ChatRequest if path == CHAT else protocol.GenerationRequest
    _, plain = post(path, whole)
    for name in set(kind.model_fields) - {"model", "messages", "prompt"}:
        status, answer = post(path, whole | {name: None})
        assert status == 200, (name, answer)
    for name, values in NEUTRAL_VALUES[path].items():
        for value in values:
            status, answer = post(path, whole | {name: value})
            assert status == 200, (name, value, answer)
    for name, values in REFUSED_VALUES[path].items():
        for value in values:
            status, answer = post(path, whole | {name: value})
            if name == "size":
                assert (status, value) == (200, "8x8") or status == 400  # the model itself refuses that one
                continue
            assert status == 400 and name in f"{answer['error']['param']}", (name, value, answer)
            assert name in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert post(path, whole | {"banana": None})[0] == 400 and set(plain) == set(post(path, whole)[1])


def test_top_k_minus_one_is_off() -> None:
    assert post(CHAT, CHAT_BODY | {"top_k": -1})[0] == 200 and ENGINE.jobs[-1].options["top_k"] == 0


def test_disabled_tools_are_accepted() -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    assert post(CHAT, CHAT_BODY | tools | {"tool_choice": "none"})[0] == 200
    assert post(CHAT, CHAT_BODY | tools | {"tool_choice": "auto"})[0] == 400


def test_common_size_becomes_the_models_size() -> None:
    for size, sent, told in (("1024x1024", None, "4x4"), ("auto", None, "4x4"), ("4x4", (4, 4), None)):
        _, answer = post(DRAW, IMAGE_BODY | {"size": size})
        assert ENGINE.jobs[-1].options.get("size") == sent and answer["size"] == "4x4"
        assert answer["data"][0]["settings"].get("size") == told


def test_output_compression() -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    assert len(encode_image(noise, "jpeg", 10)) < len(encode_image(noise, "jpeg", 90)) / 2
    assert len(encode_image(noise, "webp", 10)) < len(encode_image(noise, "webp", 90)) / 2
    assert post(DRAW, IMAGE_BODY | {"output_format": "webp", "output_compression": 50})[0] == 200
    status, answer = post(DRAW, IMAGE_BODY | {"output_compression": 50})
    assert status == 400 and "output_compression" in answer["error"]["message"]


def segments(messages: list[Any]) -> list[tuple[str, Any]]:
    """The segments of the job that these messages become: roles, and texts or True for images."""
    status, answer = post(CHAT, CHAT_BODY | {"messages": messages})
    assert status == 200, answer
    return [(s.role, True if s.image is not None else s.text) for s in ENGINE.jobs[-1].prompt.segments]


def test_message_formats_of_clients() -> None:
    part = {"type": "image_url", "image_url": {"url": URI, "detail": "original"}}
    cached = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    told = segments(
        [
            {"role": "system", "content": "be kind", "name": "guide"},
            {"role": "developer", "content": [{"type": "text", "text": "be short"}]},
            {"role": "user", "content": "a", "name": "someone"},
            {"role": "assistant", "content": None, "tool_calls": None},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {
                "role": "user",
                "content": [cached, part, {"type": "image_url", "image_url": URI}, {"type": "text", "text": ""}],
            },
        ]
    )
    assert told == [("user", "a"), ("assistant", "no"), ("user", "b"), ("user", True), ("user", True)]
    status, answer = post(CHAT, CHAT_BODY | {"messages": [{"role": "system", "content": "a"}, *CHAT_BODY["messages"]]})
    assert answer["choices"][0]["settings"]["ignored"] == ["system"]
    ENGINE.info = FixedImageEngine.info | {"system": True}
    try:
        told = segments([{"role": "developer", "content": "be kind"}, *CHAT_BODY["messages"]])
        assert told == [("system", "be kind"), ("user", "a")]
        _, answer = post(CHAT, CHAT_BODY | {"messages": [{"role": "system", "content": "a"}, *CHAT_BODY["messages"]]})
        assert "ignored" not in answer["choices"][0]["settings"]
        drawn = {"messages": [{"role": "system", "content": "a"}, *CHAT_BODY["messages"]], "modalities": ["image"]}
        _, answer = post(CHAT, CHAT_BODY | drawn)
        assert answer["choices"][0]["settings"]["ignored"] == ["system"] and len(ENGINE.jobs[-1].prompt.segments) == 1
    finally:
        del ENGINE.info
    for wrong, names in (
        ([{"role": "system", "content": "a"}], "user"),
        ([{"role": "system", "content": [part]}, *CHAT_BODY["messages"]], "system"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "user", "content": "a", "images": [part]}], "images"),
        ([{"role": "tool", "content": "a", "tool_call_id": "1"}, *CHAT_BODY["messages"]], "role"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}, *CHAT_BODY["messages"]], "tool_calls"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "input_audio"),
    ):
        status, answer = post(CHAT, CHAT_BODY | {"messages": wrong})
        assert status == 400 and names in str(answer["error"]), (wrong, answer)


def test_answer_can_be_sent_back() -> None:
    """With all fields that the official client adds, and each image at its place in the text."""
    _, answer = post(CHAT, CHAT_BODY | {"modalities": ["text", "image"]})
    given = openai.types.chat.ChatCompletion.model_validate(answer).choices[0].message
    assert given.content == "said" and given.images[0]["offset"] == 4  # type: ignore[attr-defined]
    asked = {"role": "user", "content": "a"}
    sdk = {
        "parsed": None,
        "cache_control": {"type": "ephemeral"},
        "provider_specific_fields": {"refusal": None},
        "reasoning_content": None,
        "annotations": [],
        "thinking_blocks": None,
    }
    for message in (given.model_dump(), given.model_dump(exclude_none=True), given.model_dump() | sdk):
        assert segments([asked, message, asked]) == [
            ("user", "a"),
            ("assistant", "said"),
            ("assistant", True),
            ("user", "a"),
        ]
    image = {"type": "image_url", "image_url": {"url": URI}}

    def laid(content: Any, *offsets: Any) -> list[Any]:
        images = [image if at is None else image | {"offset": at} for at in offsets]
        return [
            said
            for role, said in segments([asked, {"role": "assistant", "content": content, "images": images}, asked])[
                1:-1
            ]
        ]

    assert laid("one\n\ntwo", 3, 8) == ["one", True, "\n\ntwo", True]
    assert laid("one", None) == ["one", True] and laid(None, None) == [True] and laid("one", 0) == [True, "one"]
    assert laid("one", 900, 1) == ["o", True, "ne", True]


OPEN_WEBUI = {
    "stream": True,
    "model": "m",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": URI}}],
        },
    ],
    "stream_options": {"include_usage": True},
    "temperature": 0.8,
    "top_p": 0.9,
    "frequency_penalty": 0,
    "max_tokens": 128,
    "stop": ["<end>"],
}
OPEN_WEBUI_TITLE = {
    "model": "m",
    "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title"}],
    "stream": False,
    "max_completion_tokens": 1000,
}
LIBRECHAT = {
    "model": "m",
    "user": "65f0c0ffee",
    "stream": True,
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "stop": None,
    "n": 1,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "Ann"},
        {"role": "assistant", "content": "two apples", "tool_calls": []},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": URI, "detail": "auto"}},
            ],
        },
    ],
}


@pytest.mark.parametrize("body", [OPEN_WEBUI, OPEN_WEBUI_TITLE, LIBRECHAT])
def test_chat_requests_of_web_interfaces(body: dict[str, Any]) -> None:
    status, answer = post(CHAT, body)
    assert status == 200
    if body["stream"]:
        events = [json.loads(line[6:]) for line in answer.split("\n\n") if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == "said"
        assert ENGINE.jobs[-1].output == "text"  # a question about a picture


def test_image_requests_of_web_interfaces() -> None:
    """Open WebUI sends a size of its menu; it and the official client send `image[]` for edits."""
    asked = {"model": "m", "prompt": "a", "n": 1, "size": "512x512", "response_format": "b64_json"}
    assert post(DRAW, asked)[0] == 200
    libre = {"model": "m", "prompt": "a", "size": "1024x1024", "quality": "standard", "style": "vivid", "n": 1}
    assert post(DRAW, libre)[0] == 200
    data, file = {"model": "m", "prompt": "b", "size": "1024x1024", "n": "1"}, ("a.png", encode_image(PICTURE))
    mask = ("mask.png", encode_image(Image.new("RGB", PICTURE.size, "white")))
    for name in ("image", "image[]"):
        status, _ = post(EDIT, data=data | {"quality": "auto", "input_fidelity": "low"}, files=[(name, file)])
        assert status == 200 and ENGINE.jobs[-1].prompt.segments[1].text == "b"
        assert post(EDIT, data=data, files=[(name, file), ("mask", mask)])[0] == 200
        status, answer = post(EDIT, data=data, files=[(name, file), (name, file)])
        assert status == 400 and answer["error"]["param"] == "image" and "one image" in answer["error"]["message"]
    assert post(EDIT, data=data, files=[("image", file), ("image[]", file)])[0] == 400
    assert post(EDIT, data=data, files=[("image[]", file)] * 5)[1]["error"]["param"] == "image"
    assert post(EDIT, data=data | {"input_fidelity": "high"}, files=[("image", file)])[0] == 400
    assert post(VARY, data={"model": "m", "size": "1024x1024", "user": "a"}, files=[("image", file)])[0] == 200


QUESTIONS = """
What's in this image?
what is this
Describe the image.
Could you please describe this?
please, what is it
Here is my photo. What's in it?
can you see a dog?
Was ist das?
这是什么？
Are there dogs
a dog, right?
Tell me what you see
count the apples
"""
ORDERS = """
make the background red
can you make the background red?
Would you please add a dog?
Make it red.
whatever, make it blue
island in the sea
namesake
tell me a story about this dog
a red house
"""


def test_question_about_an_image_is_answered_in_text() -> None:
    from unigen.document import Document, Segment

    questions, orders = QUESTIONS.strip().split("\n"), ORDERS.strip().split("\n")
    assert all(map(is_question, questions)) and not any(map(is_question, [*orders, ""]))
    every: Any = ("image", "text", "interleaved")
    seen, question, order = Segment(image=PICTURE), Segment(text=questions[0]), Segment(text=orders[0])
    said = Segment(text="red", role="assistant")
    for document, output in (
        ([question, seen], "text"),
        ([seen, question], "text"),
        ([seen, order], "interleaved"),
        ([question], "interleaved"),
        ([seen, question, said, order], "interleaved"),
        ([seen, order, said, question], "text"),
    ):
        assert default_output(Document(document), every) == output
        assert default_output(Document(document), ("image", "text")) == "text"
        assert default_output(Document(document), ("image",)) == "image"
