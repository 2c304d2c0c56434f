"""What the server accepts: hosts, origins, keys, bodies and times, each tested as an attacker would try it."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.exceptions import HTTPException

from tests.serving.test_fuzz import FakeImageEngine
from tests.serving.test_serving_units import FakeMetrics, call_guard, make_guard
from unigen.commands.main import main
from unigen.serving import body, connection
from unigen.serving.app import create_app, uvicorn_config
from unigen.serving.config import RequestLimits, ServerConfig
from unigen.serving.errors import error_body
from unigen.serving.form import parse_form_fields
from unigen.serving.middleware import GuardMiddleware
from unigen.serving.pictures import encode_image
from unigen.serving.protocol import MAX_STOP_LENGTH, EditRequest


def app(**settings: Any) -> tuple[FakeImageEngine, Any]:
    fake_engine = FakeImageEngine()
    return fake_engine, create_app(fake_engine, ServerConfig(model_name="m", **settings))


def send(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def ask() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("key", ["", " ", "\n", "a b", "clé", "a\x00"])
def test_unusable_api_key_is_rejected(key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        RequestLimits(api_keys=("good", key))


def test_wrong_keys_are_limited_per_address(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    monkeypatch.setattr("unigen.serving.middleware.time", clock)
    guard = make_guard(RequestLimits(api_keys=("one",), invalid_keys_per_minute=3))
    assert [call_guard(guard, authorization=f"Bearer {i}")[0] for i in range(5)] == [401, 401, 401, 429, 429]
    status, headers = call_guard(guard, authorization="Bearer one")
    assert status == 429, "else the one key that is let in would be known by it"
    assert call_guard(guard, authorization="Bearer one", client="5.6.7.8")[0] == 200
    now += int(headers["retry-after"])
    assert call_guard(guard, authorization="Bearer one")[0] == 200
    guard = make_guard(RequestLimits(api_keys=("one",), invalid_keys_per_minute=3))
    assert [call_guard(guard)[0] for _ in range(6)] == [401] * 6, "no key is no guess"


def test_ipv6_client_is_its_network() -> None:
    guard = make_guard(RequestLimits(requests_per_minute=2))
    statuses = [call_guard(guard, client=f"2001:db8:1:2::{i}")[0] for i in range(1, 5)]
    assert statuses == [200, 200, 429, 429] and call_guard(guard, client="2001:db8:1:3::1")[0] == 200


# ---------------------------------------------------------------- hosts and origins


HERE = RequestLimits(allowed_hosts=("unigen.example",), allowed_origins=("https://friend.example",))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.5", 200),
        ("a.localhost", 200),
        ("Unigen.Example.:8000", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("evillocalhost", 403),
        ("", 200),  # HTTP/1.0, no browser
    ],
)
def test_without_keys_only_allowed_hosts_are_answered(host: str, status: int) -> None:
    given = {"host": host} if host else {}
    assert call_guard(make_guard(HERE), **given)[0] == status
    assert call_guard(make_guard(HERE), "/", **given)[0] == status  # the page too
    assert call_guard(make_guard(HERE), "/health", **given)[0] == 200  # and probes by whatever name
    assert call_guard(make_guard(RequestLimits(allowed_hosts=("*",))), **given)[0] == 200
    keyed = make_guard(RequestLimits(api_keys=("one",), allowed_hosts=()))
    assert call_guard(keyed, authorization="Bearer one", **given)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "https://friend.example"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://localhost:8000]"}, 403),
        ({"origin": "\xe9"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
    ],
)
def test_without_keys_requests_of_other_origins_are_rejected(headers: dict[str, str], status: int) -> None:
    assert call_guard(make_guard(HERE), "/v1/images/edits", host="localhost:8000", **headers)[0] == status
    keyed = make_guard(RequestLimits(api_keys=("one",), allowed_hosts=()))
    assert call_guard(keyed, host="localhost:8000", authorization="Bearer one", **headers)[0] == 200


# ---------------------------------------------------------------- bodies


def test_slow_body_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit grows with the bytes received."""
    limits = RequestLimits(body_timeout=0.2, min_body_bytes_per_second=10)
    caught: list[int] = []

    async def read_body(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (await receive())["more_body"]:
                pass
        except HTTPException as error:
            caught.append(error.status_code)

    def served(parts: list[bytes], pause: float) -> list[int]:
        caught.clear()
        left = list(parts)

        async def receive() -> Any:
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def ask() -> None:
            scope = {"type": "http", "path": "/v1/models", "method": "POST", "client": ("1.2.3.4", 1), "headers": []}
            await asyncio.wait_for(GuardMiddleware(read_body, limits, FakeMetrics())(scope, receive, None), 30)

        asyncio.run(ask())
        return list(caught)

    assert served([b""] * 1000, 0.05) == [408]
    assert served([b"x" * 100] * 10, 0.05) == []


def test_pending_bodies_have_a_total_limit() -> None:
    """Bytes are counted, and subtracted when their requests end."""
    guard = make_guard(RequestLimits(max_body_bytes=10, max_pending_body_bytes=25))
    for _ in range(3):
        assert call_guard(guard, body=(b"x" * 10,))[0] == 200
    guard._pending_bytes = 16  # others hold so many
    assert call_guard(guard, body=(b"x" * 10,))[0] == 429 and guard._pending_bytes == 16
    guard._pending_bytes = 15
    assert call_guard(guard, body=(b"x" * 10,))[0] == 200


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1_000_000}]}, "values"),
        ({"messages": [{"role": "user", "content": "a"}], "stop": ["a"] * 50_000}, "values"),
        ({"messages": [{"role": "user", "content": "a" * 30_000_000}]}, "characters"),
        ({"messages": [{"role": "user", "content": "a" * 90_000}] * 20}, "characters"),
        ({"messages": [{"role": "user", "content": "a"}], "a" * 2_000_000: 1}, "characters"),
        ({"messages": [{"role": "user", "content": "\n" * 3_000_000}]}, "characters"),
        ({"messages": [{"role": "user", "content": " " * 3_000_000}]}, "characters"),
    ],
)
def test_too_large_json_is_rejected_before_validation(wrong: dict[str, Any], says: str) -> None:
    """Its fields are not checked, and no job is made."""
    fake_engine, served = app()
    answer = send(served, "POST", "/v1/chat/completions", json={"model": "m", **wrong})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text[:300]
    assert len(answer.text) < 1000 and not fake_engine.jobs


@pytest.mark.parametrize(
    "data", [b"[]," * 100_001, b" " * 2_000_001, b"\r\n" * 1_000_001, b'"' + b"\\n" * 2_000_001 + b'"']
)
def test_far_too_large_json_is_not_parsed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(body.json, "loads", fail)
    with pytest.raises(HTTPException, match="too many"):
        body.parse_json(data)
    with pytest.raises(AssertionError, match="it was read"):
        body.parse_json(data[: len(data) // 2])


def test_json_is_parsed_outside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    threads: list[Any] = []

    def parse(data: bytes) -> Any:
        threads.append(threading.current_thread())
        return json.loads(data)

    monkeypatch.setattr(body, "parse_json", parse)
    _, served = app()
    assert send(served, "POST", "/v1/images/generations", json={"prompt": "a"}).status_code == 200
    assert threads and threads[0] is not threading.main_thread()


@pytest.mark.parametrize("start", ["data:image/png;base64,", "data:", ""])
def test_text_that_looks_like_an_image_is_counted(start: str) -> None:
    """Only fields of images may be longer."""
    text = start + "a" * 90_000
    fake_engine, served = app()
    many = {"model": "m", "messages": [{"role": "user", "content": text}] * 12}
    answer = send(served, "POST", "/v1/chat/completions", json=many)
    assert answer.status_code == 400 and "characters" in answer.json()["error"]["message"] and not fake_engine.jobs


def test_image_data_is_not_counted_as_text() -> None:
    """A million characters may stand beside images, wherever these are."""
    from unigen.serving.body import parse_json

    picture = "Data:image/png;base64," + "A" * 2_000_000
    for inner in (
        {"url": picture},
        {"image_url": picture},
        {"image_url": {"url": picture}},
        {"result": "A" * 2_000_000},
    ):
        assert parse_json(json.dumps({"input": [inner, "a" * 900_000]}).encode())
        with pytest.raises(HTTPException, match="characters"):
            parse_json(json.dumps({"input": [inner, "a" * 1_000_001]}).encode())
    for wrong in ({"url": "http://" + "a" * 2_000_000}, {"text": picture}, {"result": ["A" * 2_000_000]}):
        with pytest.raises(HTTPException, match="characters"):
            parse_json(json.dumps(wrong).encode())


@pytest.mark.parametrize("name", ["banana", "messages.0.banana"])
def test_lone_surrogates_in_names_are_no_server_error(name: str) -> None:
    """JSON can express them and UTF-8 cannot, so the error must not contain them either."""
    body: dict[str, Any] = {"model": "\ud800", "messages": [{"role": "user", "content": "a"}]}
    _, served = app()
    content = json.dumps(body).encode()
    answer = send(served, "POST", "/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 404
    body["model"] = "m"
    (body if name == "banana" else body["messages"][0])["\ud800"] = "\udfff"
    content = json.dumps(body).encode()
    answer = send(served, "POST", "/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    wrong = {"model": "m", "messages": [{"role": "user", "content": [{"type": "\ud800"}]}]}
    content = json.dumps(wrong).encode()
    answer = send(served, "POST", "/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "type" in answer.json()["error"]["message"]
    assert json.dumps(error_body("no \ud800", param="\udfff"), ensure_ascii=False).encode()


@pytest.mark.parametrize("where", ["metadata", "name", "tool_choice", "user", "instructions", "label"])
def test_lone_surrogates_in_values_are_rejected(where: str) -> None:
    half, path = "\ud800", "/v1/images/generations" if where == "label" else "/v1/responses"
    body: dict[str, Any] = {"model": "m"} if where == "label" else {"model": "m", "input": "a"}
    body |= {"metadata": {"a": half}} if where == "metadata" else {"metadata": {half: "a"}} if where == "name" else {}
    if where == "tool_choice":
        tool = {"type": "image_generation"}
        body |= {"tools": [tool], "tool_choice": {**tool, "name": half}}
    elif where not in ("metadata", "name"):
        body[where] = half
    for stream in (False, True):
        content = json.dumps(body | {"stream": stream}).encode()
        _, served = app()
        answer = send(served, "POST", path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
        whole = content.replace(b"\\ud800", b"b")
        answer = send(served, "POST", path, content=whole, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "é"])
def test_wrong_content_type_is_explained(kind: str) -> None:
    """As sent by `curl -d` without a header."""
    _, served = app()
    headers = {"content-type": kind.encode("latin-1")} if kind else {}
    answer = send(served, "POST", "/v1/images/generations", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 400 and "content-type: application/json" in answer.json()["error"]["message"]
    for text in (b"[]", b"null", b"1", b""):
        headers = {"content-type": "application/json"}
        answer = send(served, "POST", "/v1/images/generations", content=text, headers=headers)
        assert answer.status_code == 400 and "JSON object" in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "Deflate", "zstd, gzip"])
def test_compressed_bodies_are_rejected(encoding: str) -> None:
    _, served = app()
    for given, status in ((encoding, 415), ("identity", 200), ("", 200)):
        headers = {"content-encoding": given, "content-type": "application/json"}
        answer = send(served, "POST", "/v1/images/generations", content=b'{"prompt": "a"}', headers=headers)
        assert answer.status_code == status, answer.text


@pytest.mark.parametrize("charset", ["undefined", "a\0", "utf-16", "nope", "idna", "\xe9"])
def test_unknown_charset_of_a_form_is_no_server_error(charset: str) -> None:
    _, served = app()
    kind = f"multipart/form-data; boundary=x; charset={charset}".encode("latin-1")
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    answer = send(served, "POST", "/v1/images/edits", content=part, headers={"content-type": kind})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}", b'"\xff"', b"{", b""])
def test_invalid_json_is_a_one_line_error(data: bytes) -> None:
    _, served = app()
    answer = send(served, "POST", "/v1/images/generations", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"]


def test_stop_strings_have_a_maximum_length() -> None:
    _, served = app()

    def ask(stop: Any) -> int:
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "modalities": ["text"], "stop": stop}
        return send(served, "POST", "/v1/chat/completions", json=body).status_code

    assert ask("a" * MAX_STOP_LENGTH) == 200 and ask(["a"] * 4) == 200
    assert ask("a" * (MAX_STOP_LENGTH + 1)) == 400 and ask(["a"] * 5) == 400 and ask([""]) == 400


@pytest.mark.parametrize(
    "text", ["1_0", " 1", "1 ", "+1", "\u0661", "\uff11", "0x1", "1e", "", "nan", "inf", "1.", "-"]
)
def test_form_numbers_follow_json_syntax(text: str) -> None:
    _, served = app()
    from PIL import Image

    from unigen.serving.pictures import encode_image

    files = {"image": ("a.png", encode_image(Image.new("RGB", (4, 4))))}
    answer = send(served, "POST", "/v1/images/edits", files=files, data={"prompt": "b", "n": text})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n", answer.text


def test_form_fields_are_parsed_as_numbers() -> None:
    given = {"n": "2", "guidance": "2.5", "temperature": "1e-1", "seed": "-1", "prompt": "1"}
    assert parse_form_fields(EditRequest, given) == {
        "n": 2,
        "guidance": 2.5,
        "temperature": 0.1,
        "seed": -1,
        "prompt": "1",
    }


# ---------------------------------------------------------------- routes


def test_n_above_the_queue_is_400() -> None:
    fake_engine, served = app()
    fake_engine.max_jobs = 3
    answer = send(served, "POST", "/v1/images/generations", json={"prompt": "a", "n": 4})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n", answer.text
    assert send(served, "POST", "/v1/images/generations", json={"prompt": "a", "n": 3}).status_code == 200


def test_head_requests_and_no_external_docs_pages() -> None:
    _, served = app()
    for path in ("/health", "/ready", "/", "/v1/models"):
        assert send(served, "HEAD", path).status_code == 200, path
    assert send(served, "HEAD", "/v1/images/generations").status_code == 405
    assert send(served, "GET", "/redoc").status_code == send(served, "GET", "/docs").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/chat/completions", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/openai/deployments/m/chat/completions?api-version=2024-02-01", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/" + "a" * 5000, 404),
    ],
)
def test_unknown_route_lists_the_routes(method: str, path: str, status: int) -> None:
    _, served = app()
    answer = send(served, method, path)
    message = answer.json()["error"]["message"]
    assert answer.status_code == status and "POST /v1/chat/completions" in message and len(message) < 600
    assert send(served, "GET", "/v1/models?api-version=2024-02-01").status_code == 200


def test_imported_objects_are_frozen_for_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body with many small lists triggers the collector again and again, and /health waits for it."""
    import uvicorn

    from unigen.serving import app as serving_app

    frozen: list[str] = []
    monkeypatch.setattr(serving_app.gc, "freeze", lambda: frozen.append("freeze"))

    async def serve(self: Any, sockets: Any) -> None:
        frozen.append("serve")

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    serving_app.run({}, ServerConfig(model_name="m"), "127.0.0.1", 0, 1, 1)
    assert frozen == ["freeze", "serve"]


def test_health_fails_without_a_model() -> None:
    fake_engine, served = app()
    assert send(served, "GET", "/health").status_code == 200
    fake_engine.is_alive, fake_engine.unavailable_reason = False, "no memory"
    answer = send(served, "GET", "/health")
    assert answer.status_code == 503 and "no memory" in answer.json()["reason"]


def test_unwritable_images_folder_is_found_before_generation(tmp_path: Any) -> None:
    asked_for = {"prompt": "a", "response_format": "url"}
    fake_engine, served = app(images_folder=tmp_path / "new")
    answer = send(served, "POST", "/v1/images/generations", json=asked_for)
    assert answer.status_code == 200 and answer.json()["data"][0]["url"].startswith("http://localhost/images/")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        fake_engine, served = app(images_folder=folder)
        answer = send(served, "POST", "/v1/images/generations", json=asked_for)
        assert answer.status_code == 507 and "folder" in answer.json()["error"]["message"] and not fake_engine.jobs


def test_full_disk_is_found_before_generation(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    fake_engine, served = app(images_folder=tmp_path)
    answer = send(served, "POST", "/v1/images/generations", json={"prompt": "a", "response_format": "url"})
    assert answer.status_code == 507 and "No space left" in answer.json()["error"]["message"] and not fake_engine.jobs
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_during_generation_is_507(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("unigen.media.output.tempfile.NamedTemporaryFile", full)
    fake_engine, served = app(images_folder=tmp_path)
    answer = send(served, "POST", "/v1/images/generations", json={"prompt": "a", "response_format": "url"})
    said = answer.json()["error"]["message"]
    assert answer.status_code == 507 and "No space left" in said and "\n" not in said and fake_engine.jobs
    assert str(tmp_path) not in answer.text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked_for", [{"prompt": "a"}, {"label": "dog"}, {"label": 7}])
def test_prompts_are_logged_as_text(asked_for: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, served = app(log_prompts=True)
    with caplog.at_level("INFO", "unigen.serving"):
        assert send(served, "POST", "/v1/images/generations", json=asked_for).status_code == 200
    (line,) = [json.loads(record.message) for record in caplog.records if "prompt" in record.message]
    part = {"text": "a"} if "prompt" in asked_for else asked_for
    assert line["prompt"] == [{"role": "user", **part}]


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/images/variations", "/v1/images/generations"])
def test_disconnect_during_upload_is_no_server_error(path: str, caplog: pytest.LogCaptureFixture) -> None:
    messages: list[Any] = [{"type": "http.request", "body": b"--x\r\n", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def keep(message: Any) -> None:
        sent.append(message)

    kind = b"application/json" if path.endswith("generations") else b"multipart/form-data; boundary=x"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("1.2.3.4", 1)}
    headers = [(b"host", b"localhost"), (b"content-type", kind)]
    _, served = app()
    with caplog.at_level("INFO", "unigen.serving"):
        asyncio.run(served(scope | {"headers": headers, "root_path": ""}, receive, keep))
    assert sent[0]["status"] in (400, 499) and not [one for one in caplog.records if one.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--api-key", ""], "API key"),
        (["--api-key", "good", "--api-key", " "], "API key"),
        (["--trusted-proxy", "nginx"], "proxy"),
        (["--images-folder", "file/inside"], "folder"),
        (["--port", "80_00"], "80_00"),
        (["--port", "\u0668\u0660"], "whole number"),
        (["--timeout", "1_0"], "finite number"),
    ],
)
def test_server_with_impossible_options_does_not_start(
    arguments: list[str],
    says: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said


def test_empty_key_in_the_environment_is_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNIGEN_API_KEY", "")
    assert main(["serve"]) == 2 and "UNIGEN_API_KEY" in capsys.readouterr().err


def test_trusted_proxy_is_an_address_or_a_network() -> None:
    ServerConfig(model_name="m", trusted_proxies=("10.0.0.0/8", "::1"))


# ---------------------------------------------------------------- connections


@pytest.mark.parametrize(
    ("proxies", "who"), [((), "127.0.0.1"), (("127.0.0.1",), "9.9.9.9"), (("127.0.0.5/8",), "9.9.9.9")]
)
def test_forwarded_for_is_used_from_trusted_proxies_only(proxies: tuple[str, ...], who: str) -> None:
    """The header of any other client is ignored, and of a chain the last address counts."""
    import uvicorn

    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"][0])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> None:
        server = uvicorn.Server(
            uvicorn_config(app, ServerConfig(model_name="m", trusted_proxies=proxies), "127.0.0.1", 0)
        )
        server.config.lifespan = "off"
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        (port,) = [one.getsockname()[1] for one in server.servers[0].sockets]
        async with httpx.AsyncClient() as client:
            await client.get(f"http://127.0.0.1:{port}/", headers={"x-forwarded-for": "1.1.1.1, 9.9.9.9"})
        server.should_exit = True
        await task

    asyncio.run(ask())
    assert seen == [who]


async def serving(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> Any:
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "http" and (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    config = uvicorn.Config(app, port=0, lifespan="off", log_level="critical", http=connection.TimedConnection)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    (address,) = [one.getsockname() for one in server.servers[0].sockets]
    return server, task, address


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HT"])
def test_missing_request_head_closes_the_connection(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Whether nothing comes, or a few bytes now and then."""
    monkeypatch.setattr(connection, "HEADER_TIMEOUT", 0.3)

    async def attack() -> None:
        server, task, address = await serving(monkeypatch, b"x")
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)

        async def trickle() -> None:
            while sent:
                await asyncio.sleep(0.05)
                writer.write(b"a")

        trickling = asyncio.create_task(trickle())
        try:
            await asyncio.wait_for(reader.read(), 20)  # until it is closed
        except ConnectionResetError:
            pass
        trickling.cancel()
        server.should_exit = True
        await task

    asyncio.run(attack())


async def left_open(server: Any) -> None:
    while server.server_state.connections:
        await asyncio.sleep(0.01)


def test_tiny_chunks_close_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thousand chunks may be of any size."""
    head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"

    async def ask(pieces: int, size: int) -> bytes:
        server, task, address = await serving(monkeypatch, b"answered")
        reader, writer = await asyncio.open_connection(*address)
        piece = b"%x\r\n" % size + b"a" * size + b"\r\n"
        got = b""
        try:
            writer.write(head + piece * pieces + b"0\r\n\r\n")
            got = await asyncio.wait_for(reader.read(4096), 20)
        except ConnectionResetError:
            pass
        writer.close()
        await left_open(server)
        server.should_exit = True
        await task
        return got

    few, many, large = (
        asyncio.run(ask(*given))
        for given in ((connection.MAX_SMALL_CHUNKS, 1), (5000, 1), (5000, connection.MIN_CHUNK_BYTES))
    )
    assert b" 200 " in few and b" 200 " in large and not many


@pytest.mark.parametrize("trusted", [False, True])
def test_connections_per_address_are_limited(monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    """Other addresses are accepted, and so is one that has closed connections; a trusted proxy has no limit."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS_PER_CLIENT", 3)

    async def attack() -> None:
        server, task, address = await serving(monkeypatch, b"answered")
        server.config.forwarded_allow_ips = ["127.0.0.0/8"] if trusted else []

        async def ask(source: str) -> tuple[bytes, Any]:
            reader, writer = await asyncio.open_connection(*address, local_addr=(source, 0))
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            return (await asyncio.wait_for(reader.read(9999), 20)).split(b" ")[1], writer

        writers = []
        for status in [b"200"] * 3 + [b"200" if trusted else b"429"]:
            got, writer = await ask("127.0.0.1")
            assert got == status
            writers.append(writer)
        assert (await ask("127.0.0.2"))[0] == b"200"
        for writer in writers:
            writer.close()
        await asyncio.sleep(0.1)
        assert (await ask("127.0.0.1"))[0] == b"200"
        server.should_exit = True
        await task

    asyncio.run(attack())
    assert not connection.TimedConnection.open_connections


def test_head_timeout_ignores_time_in_which_the_server_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example with its machine: the client could not send in that time either."""
    monkeypatch.setattr(connection, "HEADER_TIMEOUT", 2.0)

    async def ask() -> bytes:
        server, task, address = await serving(monkeypatch, b"answered")
        reader, writer = await asyncio.open_connection(*address)
        while not server.server_state.connections:
            await asyncio.sleep(0.01)
        time.sleep(2.5)
        for _ in range(3):
            await asyncio.sleep(0)  # time to find that it is late
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        got = await asyncio.wait_for(reader.read(), 20)
        server.should_exit = True
        await task
        return got

    assert b" 200 " in asyncio.run(ask())


@pytest.mark.parametrize("reads", [False, True])
def test_unread_answer_closes_the_connection(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    monkeypatch.setattr(connection, "CLIENT_READ_TIMEOUT", 0.5)
    size = 30 << 20

    async def attack() -> int:
        server, task, address = await serving(monkeypatch, b"x" * size)
        reader, writer = await asyncio.open_connection(*address, limit=1 << 16)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        if not reads:
            while not server.server_state.connections:
                await asyncio.sleep(0.01)
            while server.server_state.connections:  # it ends by itself
                await asyncio.sleep(0.05)
        got = 0
        try:
            while data := await reader.read(1 << 20):
                got += len(data)
        except ConnectionResetError:
            pass
        server.should_exit = True
        await task
        return got

    got = asyncio.run(asyncio.wait_for(attack(), 60))
    assert (got > size) == reads


# ---------------------------------------------------------------- old names


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("generations", {"sampler": "heun"}, {"solver": "heun"}),
        ("generations", {"sampler": "heun", "stream": True}, {"solver": "heun", "stream": True}),
        ("generations", {"sampler": "heun", "model": "none"}, {"solver": "heun", "model": "none"}),
        ("edits", {"negative": "red"}, {"negative_prompt": "red"}),
        ("edits", {"negative": "red", "stream": "true"}, {"negative_prompt": "red", "stream": "true"}),
        ("variations", {"vary": "0.25"}, {"variation": "0.25"}),
        ("chat", {"guidance_kind": "apg"}, {"guider": "apg"}),
        ("responses", {"sampler": "heun", "stream": True}, {"solver": "heun", "stream": True}),
    ],
)
def test_old_names_are_deprecated(path: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Responses to them say since when, whole or streamed, answers or errors; those to new names do not."""
    file = {"image": ("a.png", encode_image(Image.new("RGB", (4, 4))))}

    def ask(options: dict[str, Any]) -> httpx.Response:
        if path == "chat":
            body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **options}
            return send(server, "POST", "/v1/chat/completions", json=body)
        if path == "responses":
            return send(server, "POST", "/v1/responses", json={"model": "m", "input": "a", **options})
        if path == "generations":
            return send(server, "POST", "/v1/images/generations", json={"prompt": "a", **options})
        text = {"prompt": "a"} if path == "edits" else {}
        return send(server, "POST", f"/v1/images/{path}", files=file, data=text | options)

    _, server = app()
    answers = [ask(options) for options in (old, new, old)]
    assert {answer.status_code for answer in answers} == {404 if "model" in old else 200}, answers[0].text
    assert [answer.headers.get("deprecation") for answer in answers] == ["@1795996800", None, "@1795996800"]
    assert datetime.fromtimestamp(1795996800, UTC) == datetime(2026, 11, 30, tzinfo=UTC)
