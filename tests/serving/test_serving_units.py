"""Parts of the server on their own: stop strings, image files, addresses, the middleware."""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import itertools
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

from unigen.serving import pictures
from unigen.serving.config import RequestLimits
from unigen.serving.middleware import GuardMiddleware
from unigen.serving.stop_strings import StopStringFilter

CLIENT = httpx.AsyncClient


def filter_pieces(pieces: list[str], *stops: str) -> tuple[list[str], bool]:
    words = StopStringFilter(stops)
    said = [part for piece in pieces if (part := words.feed(piece))]
    if not words.stopped:
        said += [words.end()] if words.pending_text else []
    return [part for part in said if part], words.stopped


def test_text_is_emitted_as_soon_as_no_stop_can_match() -> None:
    assert filter_pieces([" a", " b", " "]) == (["a", " b"], False)
    assert filter_pieces(["  ", " a ", "b", "\n"]) == (["a", " b"], False)
    assert filter_pieces(["a b", " ST", "AY", " c"], " STOP") == (["a b", " STAY", " c"], False)
    assert filter_pieces(["a b", " ST", "OP c"], " STOP") == (["a b"], True)
    assert filter_pieces(["a ST"], "STOP") == (["a", " ST"], False)
    assert filter_pieces(["x one two"], "two", "one") == (["x"], True)


def test_filtered_text_does_not_depend_on_chunks() -> None:
    text = "  the red house, the red horse; the red h"
    for stop in ("the red horse", "house,", "no", "h"):
        whole = "".join(filter_pieces([text], stop)[0])
        assert whole == text.split(stop)[0].strip()
        for size in (1, 2, 3, 7):
            assert "".join(filter_pieces([text[i : i + size] for i in range(0, len(text), size)], stop)[0]) == whole


@pytest.mark.parametrize("stop", ["aab", "abab", "aaaa", "ab"])
def test_stop_string_matches_at_its_first_end(stop: str) -> None:
    """For all short texts of two letters, in any chunks; the text before the stop is emitted."""
    for text in map("".join, itertools.product("ab", repeat=7)):
        for size in (1, 3, 7):
            said, stopped = filter_pieces([text[i : i + size] for i in range(0, 7, size)], stop)
            assert ("".join(said), stopped) == (text.split(stop)[0], stop in text), (text, size)


def test_long_stop_strings_cost_as_much_as_short_ones() -> None:
    """Counted in steps: at most two for each character and stop string, whatever partial matches there are."""
    steps = 0

    class Counting(str):
        def __getitem__(self, place: Any) -> Any:
            nonlocal steps
            steps += 1
            return str(self)[place]

    words = StopStringFilter(tuple(Counting("a" * 2000 + end) for end in "bcde"))
    steps = 0
    text = "".join(words.feed("a" * 5) for _ in range(2000))
    assert steps <= 4 * 3 * 10_000 and not words.stopped and len(text) == 8000


def test_image_file_checks() -> None:
    def file(format: str, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, format)
        return buffer.getvalue()

    for format in ("PNG", "JPEG", "WEBP", "GIF"):
        assert pictures.decode_image(file(format)).size == (8, 8)
    for bad in (b"", b"x" * 100, file("BMP"), file("TIFF"), file("PNG")[:40]):
        with pytest.raises(ValueError) as error:
            pictures.decode_image(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="too large|too many"):
        pictures.decode_image(file("PNG", "1", (8000, 8000)))
    good = "data:image/png;base64," + base64.b64encode(file("PNG")).decode()
    assert pictures.image_from_data_uri(good).size == (8, 8)
    assert pictures.decode_image(pictures.encode_image(Image.new("RGB", (4, 4)), "webp")).size == (4, 4)


def test_data_uri_formats_of_clients() -> None:
    """The bytes determine the format; line breaks, missing padding and the URL-safe alphabet are accepted."""
    noise = Image.effect_noise((40, 40), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    data = buffer.getvalue() + b"\xfb\xff\xfe\xff"  # with "+" and "/" in it
    text = base64.b64encode(data).decode()
    assert text.endswith("=") and "+" in text and "/" in text
    lines = [text[i : i + 76] for i in range(0, len(text), 76)]
    plain = "data:image/png;base64,"
    for good in (
        plain + text,
        "data:image/jpg;base64," + text,
        "data:image/heic;base64," + text,
        "DATA:Image/PNG;charset=utf-8; Base64," + text,
        "data:;base64," + text,
        "data:application/octet-stream;base64," + text,
        plain + "\n".join(lines) + "\n",
        plain + " " + "\r\n\t".join(lines),
        plain + text.rstrip("="),
        plain + base64.urlsafe_b64encode(data).decode(),
    ):
        assert pictures.bytes_from_data_uri(good) == data, good[:60]
    for bad in (
        "",
        text,
        "data:",
        "data:image/png",
        "data:image/png," + text,
        "data:text/plain;base64," + text,
        "data:image/png;base64;charset=a," + text,
        "data:" + "a" * 300 + "image/png;base64," + text,
        " " + plain + text,
        plain + text + "A",
        plain + "é" + text,
        plain + "\ud800" + text,
        plain + text[:40] + "=" + text[40:],
        "file:///etc/passwd",
        "javascript:alert(1)",
    ):
        with pytest.raises(ValueError, match="data:image/png|damaged") as error:
            pictures.bytes_from_data_uri(bad)
        assert not isinstance(error.value, UnicodeError), bad[:60]


def test_mask_from_transparency_or_white() -> None:
    def marks(mode: str, ground: Any, mark: Any) -> Image.Image:
        picture, buffer = Image.new(mode, (4, 4), ground), io.BytesIO()
        picture.paste(mark, (0, 0, 2, 4))
        picture.save(buffer, "PNG")
        return pictures.decode_mask(buffer.getvalue())

    for mask in (marks("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)), marks("L", 0, 255)):
        assert [mask.getpixel((x, 0)) for x in (0, 3)] == [255, 0]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://localhost:1/a.png",
        "http://[::1]/a.png",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest",
        "http://[::ffff:127.0.0.1]/",
        "http://0/",
        "http://[::127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[64:ff9b::808:808]/",
        "http://[64:ff9b:1::808:808]/",
        "http://[fec0::1]/",
        "http://[fc00::1]/",
        "http://[fe80::1%25lo]/",
        "http://[2002:7f00:1::]/",
        "http://[2002:808:808::]/",
        "http://[2001:0:808:808::1]/",
        "http://[2001:db8::1]/",
        "http://[2a00:1450::5efe:10.0.0.1]/",
        "http://[::ffff:0:127.0.0.1]/",
        "http://[ff0e::1]/",
        "http://192.88.99.1/",
        "http://100.64.0.1/",
        "http://198.18.0.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://2130706433/",
        "ftp://example.com/a.png",
        "http://user@example.com/",
        "http://",
    ],
)
def test_private_addresses_are_not_fetched(url: str) -> None:
    with pytest.raises(ValueError) as error:
        asyncio.run(pictures.fetch_image(url, 1000))
    assert str(error.value).startswith("the picture's address") or "http or https" in str(error.value)


def test_addresses_that_embed_private_ones_are_private() -> None:
    for address in (
        "127.0.0.1 10.0.0.1 100.64.0.1 169.254.169.254 192.88.99.1 198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255 ::1"
        " ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::808:808"
        " fc00::1 fe80::1 fec0::1 ff0e::1 100::1 2001:db8::1 2001:0:808:808::1 2002:7f00:1:: 2002:808:808::"
        " 2a00:1450::5efe:10.0.0.1 2a00:1450::200:5efe:10.0.0.1 5f00::1 ::"
    ).split():
        assert not pictures._is_public_address(ipaddress.ip_address(address)), address


def test_public_addresses_are_accepted() -> None:
    """Negative control: both versions of IP, and IPv4 within IPv6."""
    for address in ("8.8.8.8", "93.184.215.14", "2a00:1450:4001:82a::200e", "2606:4700::1111", "::ffff:8.8.8.8"):
        assert pictures._is_public_address(ipaddress.ip_address(address)), address


def answers(monkeypatch: pytest.MonkeyPatch, *pages: Any) -> list[tuple[str, str]]:
    """Replace the network: all names are public, and requests get these pages in order.

    Returns:
        The address and the host name of each request.
    """
    seen: list[tuple[str, str]] = []
    left = list(pages)

    async def public(host: str, port: int) -> str:
        if host.startswith("inner"):
            raise ValueError("the picture's address is a private one")
        return "8.8.8.8"

    async def handle(request: Any) -> Any:
        seen.append((request.url.host, request.headers["host"]))
        page = left.pop(0)
        return await page() if callable(page) else page

    monkeypatch.setattr(pictures, "_resolve_public_address", public)
    monkeypatch.setattr(
        httpx, "AsyncClient", lambda **options: CLIENT(transport=httpx.MockTransport(handle), **options)
    )
    return seen


def test_redirects_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the connection is made to the address that was checked."""

    async def file() -> Any:
        yield b"x"

    image = httpx.Response(200, headers={"content-type": "image/png"}, content=file())
    seen = answers(monkeypatch, httpx.Response(302, headers={"location": "http://other.example/b"}), image)
    assert asyncio.run(pictures.fetch_image("http://a.example/", 10)) == b"x"
    assert seen == [("8.8.8.8", "a.example"), ("8.8.8.8", "other.example")]
    answers(monkeypatch, httpx.Response(302, headers={"location": "http://inner.example/b"}), image)
    with pytest.raises(ValueError, match="private"):
        asyncio.run(pictures.fetch_image("http://a.example/", 10))


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://bücher.example:80/ü.png", "xn--bcher-kva.example"),
        ("https://A.example:8443/?q=ü#x", "a.example:8443"),
        ("HTTP://a.example", "a.example"),
    ],
)
def test_international_addresses_are_fetched(monkeypatch: pytest.MonkeyPatch, url: str, host: str) -> None:
    async def file() -> Any:
        yield b"x"

    image = httpx.Response(200, headers={"content-type": "image/png"}, content=file())
    seen = answers(monkeypatch, image)
    assert asyncio.run(pictures.fetch_image(url, 10)) == b"x" and seen == [("8.8.8.8", host)]


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://a.example:99999/",
        "http://a.example:x/",
        "http://a\x00b/",
        "http://\ud800/",
    ],
)
def test_malformed_addresses_are_a_one_line_error(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    seen = answers(monkeypatch)
    with pytest.raises(ValueError, match="the picture's address cannot be read") as error:
        asyncio.run(pictures.fetch_image(url, 10))
    assert "\n" not in str(error.value) and not isinstance(error.value, UnicodeError) and not seen


def test_chunked_download_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is rejected if it is too large."""
    whole = bytes(range(256)) * 4

    async def pieces() -> Any:
        for i in range(0, len(whole), 3):
            yield whole[i : i + 3]

    def page() -> Any:
        return httpx.Response(200, headers={"content-type": "image/png"}, content=pieces())

    answers(monkeypatch, page(), page())
    found = asyncio.run(pictures.fetch_image("http://a.example/", len(whole)))
    assert found == whole and type(found) is bytes
    with pytest.raises(ValueError, match="larger than 1023 bytes"):
        asyncio.run(pictures.fetch_image("http://a.example/", len(whole) - 1))


def test_slow_download_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk comes in time, but not all of them."""
    monkeypatch.setattr(pictures, "FETCH_TIMEOUT", 0.3)

    async def trickle() -> Any:
        for _ in range(1000):
            await asyncio.sleep(0.02)
            yield b"x"

    page = httpx.Response(200, headers={"content-type": "image/png"}, content=trickle())
    answers(monkeypatch, page)
    with pytest.raises(ValueError, match="takes longer"):
        asyncio.run(pictures.fetch_image("http://a.example/", 10_000))


class FakeMetrics:
    """Metrics that count nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def labels(self, *_: Any) -> Any:
        return self

    def inc(self, *_: Any) -> None: ...

    dec = observe = inc


def call_guard(
    guard: GuardMiddleware,
    path: str = "/v1/models",
    body: tuple[bytes, ...] = (b"",),
    client: str = "1.2.3.4",
    **headers: str,
) -> tuple[int, Any]:
    """Status and headers of the response to a request."""
    scope = {"type": "http", "path": path, "method": "POST", "client": (client, 1)}
    scope["headers"] = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def make_guard(limits: RequestLimits) -> GuardMiddleware:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        from starlette.exceptions import HTTPException

        status = 200
        try:
            for _ in range(2):
                await receive()
        except IndexError:
            pass
        except HTTPException as error:
            status = error.status_code
        await send({"type": "http.response.start", "status": status, "headers": []})

    return GuardMiddleware(app, limits, FakeMetrics())


def test_api_key_is_required() -> None:
    guard = make_guard(RequestLimits(api_keys=("one", "two")))
    assert call_guard(guard)[0] == 401 and call_guard(guard, authorization="Bearer three")[0] == 401
    assert (
        call_guard(guard, authorization="Basic one")[0] == 401 and call_guard(guard, authorization="Bearer")[0] == 401
    )
    assert call_guard(guard, authorization="Bearer two")[0] == 200 and call_guard(guard, "/health")[0] == 200


def test_body_size_is_counted_whatever_the_header_says() -> None:
    guard = make_guard(RequestLimits(max_body_bytes=10))
    assert call_guard(guard, content_length="11")[0] == 413
    assert call_guard(guard, body=(b"x" * 6, b"x" * 6), content_length="6")[0] == 413
    assert call_guard(guard, body=(b"x" * 5, b"x" * 5))[0] == 200


def test_rate_limit() -> None:
    guard = make_guard(RequestLimits(requests_per_minute=3))
    assert [call_guard(guard)[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    assert 1 <= int(call_guard(guard)[1]["retry-after"]) <= 20
    assert call_guard(guard, "/ready")[0] == 200


@pytest.mark.parametrize("rate", [1, 7, 11, 45])
def test_request_after_retry_after_is_accepted(monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    monkeypatch.setattr("unigen.serving.middleware.time", clock)
    guard = make_guard(RequestLimits(requests_per_minute=rate))
    assert [call_guard(guard)[0] for _ in range(rate + 1)] == [200] * rate + [429]
    now += int(call_guard(guard)[1]["retry-after"])
    assert call_guard(guard)[0] == 200
