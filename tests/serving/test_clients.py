"""Clients of the OpenAI ecosystem with a running server, each used as in its own documentation.

They are in the extra `clients`, except instructor. Tests of clients that are not installed are skipped; test_schema
tests
what they send and read without them."""

from __future__ import annotations

import base64
import io
import os
from typing import Any

import pytest
from PIL import Image

from unigen.media.output import data_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # litellm alone is imported for minutes by a busy machine

MODEL = "unigen-tiny"
STORY = "a story about a witch and her raven"
HOW_MANY = "how many apples are there?"
EXTRA = "it comes with the extra: pip install 'unigen[clients]'"
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # nothing is fetched
os.environ.setdefault("LANGSMITH_TRACING", "false")


@pytest.fixture(scope="module")
def picture(tiny_server: Any) -> bytes:
    """Two apples, as a PNG file."""
    made = tiny_server.client().images.generate(
        model=MODEL, prompt="two apples on a blue background", extra_body={"seed": 3}
    )
    return base64.b64decode(made.data[0].b64_json)


@pytest.fixture(scope="module")
def question(picture: bytes) -> list[dict[str, Any]]:
    """Text before the image, as in OpenAI's documentation, after a system message."""
    url = data_uri(Image.open(io.BytesIO(picture)))
    parts = [{"type": "text", "text": HOW_MANY}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def story(tiny_server: Any) -> dict[str, Any]:
    """The server's own answer to STORY, with one image."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": STORY}], "seed": 1, "max_images": 1}
    message: dict[str, Any] = tiny_server.get("/v1/chat/completions", body)[1]["choices"][0]["message"]
    assert message["content"] and len(message["images"]) == 1
    return message


def test_litellm(tiny_server: Any, question: Any, picture: bytes, story: dict[str, Any]) -> None:
    litellm = pytest.importorskip("litellm", reason=EXTRA)
    where = {"model": f"openai/{MODEL}", "api_base": tiny_server.url + "/v1", "api_key": "none", "num_retries": 0}
    answer = litellm.completion(messages=question, **where)
    assert answer.choices[0].message.content == "two" and answer.usage.total_tokens > 64
    asked = [{"role": "user", "content": STORY}]
    options: dict[str, Any] = {"seed": 1, "extra_body": {"max_images": 1}}
    message = litellm.completion(messages=asked, **options, **where).choices[0].message
    assert message.content == story["content"]
    assert message.images[0]["image_url"]["url"] == story["images"][0]["image_url"]["url"]
    text, images = "", []
    for chunk in litellm.completion(messages=asked, stream=True, **options, **where):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        images += getattr(delta, "images", None) or []
    assert text == message.content and len(images) == 1
    more = [*asked, message.model_dump(), {"role": "user", "content": HOW_MANY}]
    assert litellm.completion(messages=more, **where).choices[0].message.content
    drawn = litellm.image_generation(prompt="a rose", size="1024x1024", **where)
    assert Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json))).size == (64, 64)
    edited = litellm.image_edit(image=io.BytesIO(picture), prompt="make the background red", **where)
    assert base64.b64decode(edited.data[0].b64_json) != picture
    with pytest.raises(litellm.BadRequestError, match="tools"):
        litellm.completion(messages=question, tools=[{"type": "function", "function": {"name": "f"}}], **where)


def test_langchain(tiny_server: Any, question: Any, story: dict[str, Any]) -> None:
    openai_chat = pytest.importorskip("langchain_openai", reason=EXTRA)
    from langchain_core.messages import HumanMessage, SystemMessage

    where: dict[str, Any] = {"base_url": tiny_server.url + "/v1", "api_key": "none", "max_retries": 0}
    chat = openai_chat.ChatOpenAI(model=MODEL, **where)
    asked = [SystemMessage(question[0]["content"]), HumanMessage(question[1]["content"])]
    answer = chat.invoke(asked)
    assert answer.content == "two" and answer.usage_metadata["total_tokens"] > 64
    teller = chat.bind(seed=1, extra_body={"max_images": 1})
    told = teller.invoke(STORY)
    assert told.content == story["content"]
    assert "".join(chunk.content for chunk in teller.stream(STORY)) == story["content"]
    assert chat.invoke([HumanMessage(STORY), told, HumanMessage(HOW_MANY)]).content
    parts = chat.bind(seed=1, extra_body={"max_images": 1, "content_format": "parts"}).invoke(STORY).content
    assert [part["type"] for part in parts[:2]] == ["text", "image_url"]  # its own way to get the pictures
    responses = openai_chat.ChatOpenAI(model=MODEL, use_responses_api=True, **where)
    assert responses.invoke(asked).text == "two"
    drawn = responses.bind_tools([{"type": "image_generation"}]).invoke("two apples on a blue background")
    assert [block["type"] for block in drawn.content_blocks][-1] in ("image", "image_generation_call"), drawn.content


def test_llm(tiny_server: Any, picture: bytes, story: dict[str, Any]) -> None:
    llm = pytest.importorskip("llm", reason=EXTRA)
    from llm.default_plugins.openai_models import Chat

    model = Chat(MODEL, model_name=MODEL, api_base=tiny_server.url + "/v1", vision=True)
    seen = [llm.Attachment(content=picture, type="image/png")]
    for stream in (False, True):
        answer = model.prompt(HOW_MANY, system="Be brief.", attachments=seen, stream=stream, key="none")
        assert answer.text() == "two"
    told = model.prompt(STORY, stream=False, key="none", seed=1).text()
    assert told.startswith(story["content"].split("\n\n")[0])


def test_instructor(tiny_server: Any, question: Any) -> None:
    """Without tools: whole answers, and objects parsed from JSON text, which unigen-tiny does not write."""
    instructor = pytest.importorskip("instructor", reason="pip install instructor, without constraints.txt")
    from instructor.core import InstructorRetryException
    from pydantic import BaseModel

    class Count(BaseModel):
        count: str

    client = tiny_server.client()
    create = instructor.from_openai(client, mode=instructor.Mode.MD_JSON).chat.completions.create
    answer = create(model=MODEL, response_model=None, messages=question)
    assert answer.choices[0].message.content == "two"
    with pytest.raises(InstructorRetryException, match="validation error"):
        create(model=MODEL, response_model=Count, messages=question, max_retries=1)
    for mode, named in ((instructor.Mode.TOOLS, "tools"), (instructor.Mode.JSON, "response_format")):
        ask = instructor.from_openai(client, mode=mode).chat.completions.create
        with pytest.raises(InstructorRetryException, match=f"{named}: "):
            ask(model=MODEL, response_model=Count, messages=question, max_retries=1)
