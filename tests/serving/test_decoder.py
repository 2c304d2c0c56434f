"""Images of requests: their pixels are counted before decoding, another process decodes them one at a time, and they
are freed."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serving.test_middleware import app, send
from unigen.media.output import data_uri
from unigen.serving import decoder as decoding
from unigen.serving import pictures, server
from unigen.serving.decoder import (
    MAX_IMAGES,
    MAX_READ_PIXELS,
    MAX_REQUEST_PIXELS,
    DecoderBusy,
    EncodedImage,
    FairLock,
    ImageDecoder,
    ImageError,
)


def file(size: tuple[int, int], mode: str = "RGB", format: str = "PNG", colour: Any = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format)
    return buffer.getvalue()


BOMB = file((5656, 5656), "1")
"""32 million pixels in some kilobytes."""


@pytest.fixture(scope="module")
def decoder() -> Iterator[ImageDecoder]:
    made = ImageDecoder()
    yield made
    asyncio.run(made.__aexit__())


def decode(
    decoder: ImageDecoder, *files: bytes | str, copies: int = 1, max_pixels: int | None = None
) -> list[Image.Image]:
    return asyncio.run(decoder.decode([EncodedImage(data) for data in files], copies, max_pixels))


def test_decoded_images_equal_the_files(decoder: ImageDecoder) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    mask = file((4, 4), "RGBA", colour=(0, 0, 0, 0))
    files = [EncodedImage(buffer.getvalue()), EncodedImage(data_uri(noise)), EncodedImage(mask, mask=True)]
    plain, uri, marks = asyncio.run(decoder.decode(files))
    assert plain.tobytes() == uri.tobytes() == noise.tobytes() and plain.size == noise.size
    assert marks.mode == "L" and marks.getextrema() == (255, 255)


def test_error_names_the_damaged_image_and_decoder_survives(decoder: ImageDecoder) -> None:
    good = file((4, 4))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    cut = buffer.getvalue()[:9000]
    for bad in (
        b"",
        b"no picture",
        good[:40],
        cut,
        "data:image/png;base64,@@",
        "/etc/passwd",
        file((4, 4), format="BMP"),
    ):
        with pytest.raises(ImageError) as error:
            decode(decoder, good, bad)
        assert error.value.index == 1 and "\n" not in str(error.value)
        assert len(decode(decoder, good)) == 1
    with pytest.raises(ImageError, match="mask"):
        asyncio.run(decoder.decode([EncodedImage(cut, mask=True)]))


class FakePipe:
    """A pipe that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send_bytes(self, data: bytes) -> None:
        self.sent.append(data)


def test_pixels_are_counted_before_decoding(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = decoder._call_process
    monkeypatch.setattr(decoder, "_call_process", lambda index, *call: asked.append(call[0]) or ask(index, *call))
    with pytest.raises(ImageError, match="too many pixels"):
        decode(decoder, *[BOMB] * 5, max_pixels=MAX_READ_PIXELS)
    assert asked == ["count"]
    assert len(decode(decoder, file((4, 4)), file((5, 5)))) == 2 and asked == ["count", "count", "decode", "decode"]
    decoded: list[Any] = []
    monkeypatch.setattr(pictures, "decode_image", lambda *given: decoded.append(given) or Image.new("RGB", (1, 1)))
    many = MAX_REQUEST_PIXELS // 5656**2 + 1
    for files, copies, max_pixels in (
        ([BOMB] * many, 1, MAX_READ_PIXELS),
        ([BOMB] * many, 1, None),
        ([BOMB], many, None),
    ):
        pipe = FakePipe()
        with pytest.raises(ImageError, match="too many pixels"):
            decoding._count(pipe, [EncodedImage(data) for data in files], copies, max_pixels)  # type: ignore[arg-type]
        assert not decoded and not pipe.sent
    with pytest.raises(ImageError, match="too large"):
        decoding._count(FakePipe(), [EncodedImage(file((6000, 6000), "1"))], 1, MAX_READ_PIXELS)  # type: ignore[arg-type]
    pipe = FakePipe()
    decoding._count(pipe, [EncodedImage(BOMB)] * (many - 1), 1, MAX_READ_PIXELS)  # type: ignore[arg-type]
    assert json.loads(pipe.sent[0])["pixels"] == [MAX_READ_PIXELS] * (many - 1), "and fewer are let in"


def test_read_images_are_reduced_while_decoded(decoder: ImageDecoder) -> None:
    pipe = FakePipe()
    decoding._decode(pipe, EncodedImage(BOMB), MAX_READ_PIXELS, 0)  # type: ignore[arg-type]
    head, pixels = pipe.sent
    width, height = json.loads(head)["size"]
    assert MAX_READ_PIXELS / 4 < width * height == len(pixels) / 3 <= MAX_READ_PIXELS
    long = file((4000, 100), "L", "JPEG", 200)
    (small,) = decode(decoder, long, max_pixels=10_000)
    assert abs(small.width / small.height - 40) < 3 and small.width * small.height <= 10_000
    assert np.abs(np.asarray(small, int) - 200).max() <= 2
    (whole,) = decode(decoder, long)
    assert whole.size == (4000, 100)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("side", [100, 150, 400])
def test_reduced_image_looks_like_the_original(mode: str, side: int) -> None:
    """In every mode, with the EXIF orientation, and if it is only slightly larger."""
    whole = Image.new("RGB", (side, side // 2), "white")
    whole.paste("black", (0, 0, side // 2, side // 2))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter to the right
    whole.convert(mode).save(buffer, "PNG", exif=exif)
    small = pictures.decode_image(buffer.getvalue(), max_pixels=2000)
    assert small.width < small.height and 500 <= small.width * small.height <= 2000
    places = (small.width // 2, small.height // 8), (small.width // 2, small.height * 7 // 8)
    assert [small.getpixel(place) for place in places] == [(0, 0, 0), (255, 255, 255)]


def test_many_images_share_the_pixel_limit(decoder: ImageDecoder) -> None:
    big = file((1600, 1600), "1")
    found = decode(decoder, *[big] * 10, copies=16, max_pixels=MAX_READ_PIXELS)
    assert sum(one.width * one.height for one in found) * 16 <= decoding.MAX_TOTAL_READ_PIXELS
    with pytest.raises(ImageError, match=str(MAX_IMAGES)):
        decode(decoder, *[big] * (MAX_IMAGES + 1))


def test_clients_take_turns() -> None:
    """The client that held the lock longest ago is next; one that disconnects is skipped."""
    order: list[str] = []

    async def take(lock: FairLock, client: str) -> None:
        async with lock.hold(client):
            order.append(client)
            await asyncio.sleep(0)

    async def run() -> None:
        lock = FairLock()
        tasks = [asyncio.create_task(take(lock, client)) for client in "aaaabxc"]
        await asyncio.sleep(0)
        tasks[5].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await take(lock, "d")

    asyncio.run(run())
    assert order == list("aabcaad")


def test_many_requests_of_one_client_do_not_block_another(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client waits for at most two images of another client, however many requests that one sends."""
    asked: list[str] = []
    ask = decoder._call_process
    monkeypatch.setattr(decoder, "_call_process", lambda index, *call: asked.append(call[0]) or ask(index, *call))
    files = [EncodedImage(file((4, 4)))] * 10

    async def run() -> None:
        first = [asyncio.create_task(decoder.decode(files, client="a")) for _ in range(10)]
        await asyncio.sleep(0)
        await decoder.decode(files[:3], client="b")
        assert len(asked) <= 4 * 3 + 2
        await asyncio.gather(*first)

    asyncio.run(run())
    assert len(asked) == 10 * 11 + 4


def test_decoding_stops_when_the_client_disconnects(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    asked: list[str] = []
    ask, held = decoder._call_process, decoder.held_pixels
    monkeypatch.setattr(decoder, "_call_process", lambda index, *call: asked.append(call[0]) or ask(index, *call))

    async def run() -> None:
        task = asyncio.create_task(decoder.decode([EncodedImage(file((1000, 1000)))] * 100, client="a"))
        while len(asked) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await decoder.decode([EncodedImage(file((4, 4)))], client="b")

    asyncio.run(run())
    gc.collect()
    assert len(asked) < 20 and decoder.held_pixels == held


def test_held_pixels_are_counted_until_freed() -> None:
    small = ImageDecoder(max_held_pixels=40_000)
    try:
        first = decode(small, file((100, 100)), copies=2)
        assert small.held_pixels == 20_000
        with pytest.raises(DecoderBusy):
            decode(small, file((150, 150)))
        assert small.held_pixels == 20_000
        second = decode(small, file((100, 100)), copies=2)
        assert small.held_pixels == 40_000
        del first, second
        gc.collect()
        assert small.held_pixels == 0 and len(decode(small, file((200, 200)))) == 1
    finally:
        asyncio.run(small.__aexit__())


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_dead_or_hanging_process_is_one_error_and_is_restarted(signal_number: int) -> None:
    fragile = ImageDecoder(wall_timeout=60)
    try:
        assert len(decode(fragile, file((4, 4)))) == 1
        assert fragile._process is not None
        fragile.wall_timeout = 1.0 if signal_number == signal.SIGSTOP else 60
        os.kill(fragile._process.pid, signal_number)
        try:
            decode(fragile, file((4, 4)))
            assert signal_number == signal.SIGKILL, "it had ended before it was asked"
        except ImageError as error:
            assert "too much time or memory" in str(error)
        fragile.wall_timeout = 60
        assert len(decode(fragile, file((4, 4)))) == 1
    finally:
        asyncio.run(fragile.__aexit__())


def test_cpu_timeout_is_one_error() -> None:
    """A GIF with many comments: appending each to those before takes minutes for a few megabytes."""
    patient = ImageDecoder(wall_timeout=600, cpu_timeout=1.0)
    gif = file((4, 4), "P", "GIF")
    start = gif.rindex(b",")
    try:
        with pytest.raises(ImageError, match="time") as error:
            decode(patient, file((4, 4)), gif[:start] + b"\x21\xfe" + b"\x01a" * 10_000_000 + b"\0" + gif[start:])
        assert error.value.index == 0 and len(decode(patient, file((4, 4)), gif)) == 2
    finally:
        asyncio.run(patient.__aexit__())


@pytest.mark.parametrize("name", ["subprocess.Popen", "Pipe"])
def test_failed_start_of_the_process_is_429(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    decoder = ImageDecoder()
    monkeypatch.setattr(server, "ImageDecoder", lambda: decoder)
    _, served = app()
    uri = data_uri(Image.new("RGB", (4, 4), "red"))
    try:
        with monkeypatch.context() as poor:
            poor.setattr(f"unigen.serving.decoder.{name}", fail)
            answer = send(served, "POST", "/v1/chat/completions", json=chat(uri))
        assert answer.status_code == 429 and answer.headers["retry-after"], answer.text
        assert send(served, "POST", "/v1/chat/completions", json=chat(uri)).status_code == 200
    finally:
        asyncio.run(decoder.__aexit__())


def test_process_uses_one_thread_per_library(decoder: ImageDecoder) -> None:
    """Buffers of further threads would count as its memory, on machines with many cores."""
    decode(decoder, file((4, 4)))
    assert decoder._process is not None
    environment = Path(f"/proc/{decoder._process.pid}/environ").read_bytes().split(b"\0")
    assert {b"OMP_NUM_THREADS=1", b"OPENBLAS_NUM_THREADS=1"} <= set(environment)


def test_memory_limit_is_one_error() -> None:
    poor = ImageDecoder(max_memory=150 << 20)
    try:
        with pytest.raises(ImageError, match="memory"):
            decode(poor, BOMB)
        assert len(decode(poor, file((4, 4)))) == 1
    finally:
        asyncio.run(poor.__aexit__())


# ---------------------------------------------------------------- in the server


def chat(*uris: str, **more: Any) -> dict[str, Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    content = [*parts, {"type": "text", "text": "what is it?"}]
    return {"model": "m", "messages": [{"role": "user", "content": content}], "modalities": ["text"], **more}


def test_server_process_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("decoded in the server")

    load: Callable[..., Any] = Image.Image.load
    monkeypatch.setattr(pictures, "decode_image", fail)
    monkeypatch.setattr(pictures, "decode_mask", fail)
    fake_engine, served = app()
    uri, png = data_uri(Image.new("RGB", (4, 4), "red")), file((4, 4), colour=(255, 0, 0))
    assert send(served, "POST", "/v1/chat/completions", json=chat(uri)).status_code == 200
    assert fake_engine.jobs[-1].prompt.images()[0].getpixel((0, 0)) == (255, 0, 0)
    files = {"image": ("a.png", png), "mask": ("b.png", file((4, 4), "L", colour=255))}
    assert send(served, "POST", "/v1/images/edits", files=files, data={"prompt": "a"}).status_code == 200
    assert fake_engine.jobs[-1].mask is not None and load is Image.Image.load


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/images/edits"])
def test_server_stops_when_the_client_disconnects(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its images are decoded."""
    ends: list[str] = []

    async def decode(*_: Any) -> Any:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    monkeypatch.setattr(ImageDecoder, "decode", decode)
    png = file((4, 4))
    asked = httpx.Request("POST", "http://localhost", json=chat(data_uri(Image.open(io.BytesIO(png)))))
    if path.endswith("responses"):
        given = {"role": "user", "content": [{"type": "input_image", "image_url": data_uri(Image.new("RGB", (4, 4)))}]}
        asked = httpx.Request("POST", "http://localhost", json={"model": "m", "input": [given]})
    elif path.endswith("edits"):
        asked = httpx.Request("POST", "http://localhost", files={"image": ("a.png", png)}, data={"prompt": "a"})
    sent: list[Any] = []
    messages: list[Any] = [{"type": "http.request", "body": asked.read()}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("1.2.3.4", 1)}
    headers = [(name.lower(), value) for name, value in asked.headers.raw]
    _, served = app()
    asyncio.run(asyncio.wait_for(served(scope | {"headers": headers, "root_path": ""}, receive, send), 60))
    assert ends == ["cancelled"] and sent[0]["status"] == 499


def test_server_rejects_decompression_bombs_by_name() -> None:
    import base64

    fake_engine, served = app()
    uri = "data:image/png;base64," + base64.b64encode(BOMB).decode()
    for uris in ([uri] * 20, [uri] * (MAX_IMAGES + 1)):
        answer = send(served, "POST", "/v1/chat/completions", json=chat(*uris))
        assert answer.status_code == 400 and "image_url" in answer.json()["error"]["param"], answer.text
    files = {"image": ("a.png", BOMB)}
    answer = send(served, "POST", "/v1/images/edits", files=files, data={"prompt": "a", "n": "16"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"
    assert not fake_engine.jobs
