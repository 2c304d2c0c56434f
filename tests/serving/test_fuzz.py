"""Random requests: valid ones are answered, others are a 4xx with a reason, and none causes a server error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unigen.document import Preview
from unigen.media.output import data_uri
from unigen.serving.app import create_app
from unigen.serving.config import ServerConfig
from unigen.serving.jobs import Event, Finished, Job, Part, Started, Stats


class FakeImageEngine:
    """A `JobEngine` in the place of the model's process: it answers at once, and keeps the jobs."""

    info = {"outputs": ["image", "text", "interleaved"]}
    stats, num_starts, unavailable_reason, is_alive, max_jobs = Stats(0, 0, 0, 0, 0, 0.0), 1, None, True, 24

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ready.set()
        self.jobs: list[Job] = []

    async def run_job(self, job: Job) -> AsyncGenerator[Event, None]:
        self.jobs.append(job)
        yield Started({"seed": job.options.get("seed")})
        if job.output != "image":
            yield Part("said")
        if job.output != "text":
            for number in range(job.num_previews):
                yield Preview(Image.new("RGB", (4, 4)), 0, number)
            yield Part(Image.new("RGB", (4, 4)))
        yield Finished("stop", 1, 1, 1)


FAKE_ENGINE = FakeImageEngine()
APP = create_app(FAKE_ENGINE, ServerConfig(model_name="m"))


def post(path: str, **options: Any) -> Any:
    async def ask() -> Any:
        transport = httpx.ASGITransport(APP)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, **options)

    return asyncio.run(ask())


URI = data_uri(Image.new("RGB", (4, 4)))
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m",
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": URI}}]},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
        ],
        "n": 2,
        "stop": ["x"],
        "temperature": 1,
        "max_tokens": 5,
        "modalities": ["text"],
    },
    "/v1/images/generations": {"model": "m", "prompt": "a", "n": 1, "size": "auto", "seed": 1, "guidance": 2.5},
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_json_body_causes_a_server_error(data: Any) -> None:
    path = data.draw(st.sampled_from(sorted(GOOD)))
    body: Any = GOOD[path]
    for _ in range(data.draw(st.integers(0, 2))):
        body = changed(body, data.draw(st.sampled_from(places(body))), data.draw(JUNK))
    if isinstance(body, dict) and data.draw(st.booleans()):
        body = {**body, data.draw(st.text(max_size=8)): data.draw(JUNK)}
    stream = isinstance(body, dict) and data.draw(st.booleans())
    if stream:
        body = {**body, "stream": True, "partial_images": data.draw(st.integers(0, 3))}
    answer = post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"] and "\n" not in error["message"] and set(error) == {"message", "type", "param", "code"}
    elif stream:
        assert answer.text.endswith("data: [DONE]\n\n")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60), st.sampled_from(sorted([*GOOD, "/v1/images/edits", "/v1/images/variations"])), st.data())
def test_no_bytes_cause_a_server_error(body: bytes, path: str, data: Any) -> None:
    kind = data.draw(st.sampled_from(["application/json", "multipart/form-data; boundary=x", "text/plain", ""]))
    if "multipart" in kind:
        body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + body + b"\r\n--x--\r\n"
    assert 400 <= post(path, content=body, headers={"content-type": kind}).status_code < 500


def test_valid_bodies_are_answered() -> None:
    """Negative control of the tests above: the bodies are valid before they are changed."""
    for path, body in GOOD.items():
        assert post(path, json=body).status_code == 200, path


def test_form_becomes_a_job() -> None:
    picture = Image.new("RGB", (4, 4), "red")
    from unigen.serving.pictures import encode_image

    files = {"image": ("a.png", encode_image(picture))}
    assert post("/v1/images/edits", files=files, data={"prompt": "b", "seed": "3", "guidance": "2"}).status_code == 200
    job = FAKE_ENGINE.jobs[-1]
    assert job.options == {"seed": 3, "guidance": 2} and job.output == "image" and job.base_image is None
    assert [s.text or s.image.getpixel((0, 0)) for s in job.prompt.segments] == [(255, 0, 0), "b"]
    shown = {"prompt": "b", "stream": "true", "partial_images": "2"}
    assert post("/v1/images/edits", files=files, data=shown).text.count("event: image_edit.partial_image") == 2
    for wrong in ({"prompt": "b", "seed": "x"}, {"prompt": "b", "stream": "yes"}, {"prompt": "b", "apple": "1"}, {}):
        assert post("/v1/images/edits", files=files, data=wrong).status_code == 400
    assert post("/v1/images/edits", files=files | {"more": ("b", b"")}, data={"prompt": "b"}).status_code == 400


def test_openapi_document_lists_the_routes() -> None:
    document = APP.openapi()
    assert {"/v1/chat/completions", "/v1/images/generations", "/v1/models", "/health"} <= set(document["paths"])
    fields = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "modalities", "seed", "guidance"} <= set(fields["properties"])
    assert fields["additionalProperties"] is False
