"""Pictures of strangers are decoded in a process of its own: one at a time, counted before, made smaller at once.

    async with ImageDecoder() as decoder:
        pictures = await decoder.decode([EncodedImage(data)], copies=1, area=AREA, client="10.0.0.1")

A file of some kilobytes may hold millions of pixels, and a damaged one may crash what decodes it. So neither the
process that answers HTTP nor the one that holds the model decodes: a third does, within limits of memory and time, and
is started anew where it ends. Its answers are sizes and bytes. Clients take turns, one picture each. Knows pictures and
a process; does not depend on HTTP.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from PIL import Image

from unigen.serving import pictures

MAX_IMAGES = 128
"""Of one request."""
MAX_REQUEST_PIXELS = 128_000_000
"""Of all pictures of one request, times the answers that it asks for; and of all that are held at a time."""
MAX_READ_PIXELS = 2048 * 2048
"""Pixels to which a picture is made smaller that is only looked at."""
MAX_TOTAL_READ_PIXELS = 32_000_000
"""Pixels of all pictures of one request that are only looked at."""
MAX_MEMORY_BYTES = 2 << 30
"""Bytes of the process."""
WALL_TIMEOUT = 30.0
"""For one picture, by the clock: then the process hangs."""
CPU_TIMEOUT = 8.0
"""Seconds of a processor for one picture, and for the heads of all pictures of one request: a small file may hold
millions of tiny pieces."""
SINGLE_THREAD_ENV = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of the process: on many cores the buffers of others would take the memory that it may have."""
T = TypeVar("T")


@dataclass(frozen=True)
class EncodedImage:
    """What is to be decoded: the bytes of a file, or a data URI. mask: where to paint, instead of a picture."""

    data: bytes | str
    mask: bool = False


class ImageError(ValueError):
    """A picture that cannot be had; place: among those that were asked for."""

    def __init__(self, message: str, place: int = 0) -> None:
        super().__init__(message)
        self.place = place


class DecoderBusy(Exception):
    """All that may be held is held, or there is no process to be had: ask again."""


class FairLock:
    """A lock that clients take in turns: of those who wait, whoever had it longest ago is next.

    async with turns.acquire("10.0.0.1"): ...
    """

    def __init__(self) -> None:
        self._is_held = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next client first

    @asynccontextmanager
    async def acquire(self, client: str) -> AsyncIterator[None]:
        if self._is_held:
            future = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(client, deque()).append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():  # it came at that very moment
                    self._pass_on()
                raise
        self._is_held = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            client, waiting = next(iter(self._waiting.items()))
            del self._waiting[client]
            future = waiting.popleft()
            if waiting:
                self._waiting[client] = waiting
            if not future.done():
                future.set_result(None)
                return
        self._is_held = False


class ImageDecoder:
    """The process, started when it is first needed."""

    def __init__(
        self,
        seconds: float = WALL_TIMEOUT,
        memory: int = MAX_MEMORY_BYTES,
        most_held: int = MAX_REQUEST_PIXELS,
        work: float = CPU_TIMEOUT,
    ) -> None:
        self.seconds, self.memory, self.most_held, self.work = seconds, memory, most_held, work
        self.held = 0
        """Pixels of the pictures that were given out and are still there, times their copies; and of those to come."""
        self._turns = FairLock()
        self._thread = ThreadPoolExecutor(1, "decoder")
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    async def __aenter__(self) -> ImageDecoder:
        self._thread.submit(self._ensure_started)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._thread.shutdown(cancel_futures=True, wait=False)
        self._end()

    async def decode(
        self, files: list[EncodedImage], copies: int = 1, area: int | None = None, client: str = ""
    ) -> list[Image.Image]:
        """Decode the pictures of one request.

        Args:
            files: at most `MAX_IMAGES`.
            copies: how many answers need them, each of which gets its own.
            area: pixels to which larger pictures are made smaller; None leaves them as they are. Many are made smaller
                still, so that together they have at most `MAX_TOTAL_READ_PIXELS`, times their copies.
            client: who asks. Between two pictures of one client those of others are decoded.
        Returns:
            The pictures in RGB, masks in L.
        Raises:
            ImageError: for one that cannot be decoded, and where they are too many or too large together.
            DecoderBusy: what other requests hold leaves no room now, or the process cannot be started now.
        """
        if not files:
            return []
        if len(files) > MAX_IMAGES:
            raise ImageError(f"the request has {len(files)} pictures: at most {MAX_IMAGES}", MAX_IMAGES)
        if area is not None:
            area = max(1, min(area, MAX_TOTAL_READ_PIXELS // (len(files) * copies)))
        async with self._turns.acquire(client):
            sizes = await self._in_thread(self._count, files, copies, area)
        reserved_pixels = sum(sizes) * copies
        if self.held + reserved_pixels > self.most_held:
            raise DecoderBusy
        self.held += reserved_pixels
        images: list[Image.Image] = []
        try:
            for place, (file, size) in enumerate(zip(files, sizes, strict=True)):
                async with self._turns.acquire(client):
                    image = await self._in_thread(self._decode, file, area, place)
                weakref.finalize(image, self._release, size * copies)
                reserved_pixels -= size * copies
                images.append(image)
        finally:
            self.held -= reserved_pixels
        return images

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    # ---------------------------------------------------------------- in the thread

    def _count(self, files: list[EncodedImage], copies: int, area: int | None) -> list[int]:
        """The pixels that each of the pictures will have."""
        return [int(size) for size in self._ask(0, "count", files, copies, area)["pixels"]]

    def _decode(self, file: EncodedImage, area: int | None, place: int) -> Image.Image:
        head, data = self._ask(place, "decode", file, area, place)
        return Image.frombytes(head["mode"], head["size"], data)

    def _ask(self, place: int, *request: Any) -> Any:
        try:
            pipe = self._ensure_started()
        except OSError:  # no memory, no process or no file to be had now
            self._end()
            raise DecoderBusy from None
        try:
            pipe.send(request)
            answer = self._answer(pipe)
            return answer if request[0] == "count" else (answer, pipe.recv_bytes())
        except (EOFError, OSError):
            self._end()
            raise ImageError("the picture cannot be decoded: it takes too much time or memory", place) from None

    def _release(self, pixels: int) -> None:
        self.held -= pixels

    def _answer(self, pipe: Connection) -> Any:
        """Raises EOFError where none comes in time."""
        if not pipe.poll(self.seconds):
            raise EOFError
        answer = json.loads(pipe.recv_bytes())
        if "wrong" in answer:
            raise ImageError(answer["wrong"], answer["place"])
        return answer

    def _ensure_started(self) -> Connection:
        if self._process is None or self._process.poll() is not None or self._pipe is None:
            self._end()
            self._pipe, theirs = Pipe()
            with theirs:
                command = [
                    sys.executable,
                    "-c",
                    f"from {__name__} import main; main()",
                    str(theirs.fileno()),
                    str(self.memory),
                    str(self.work),
                ]
                paths = os.pathsep.join(filter(None, sys.path))
                environment = {**os.environ, "PYTHONPATH": paths, **SINGLE_THREAD_ENV}
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        return self._pipe

    def _end(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


# ---------------------------------------------------------------- in the process


def run_decoder(pipe: Connection, work: float) -> None:
    """Count and decode what is asked for until the other end is closed, or one request takes too much work."""
    calls: dict[str, Callable[..., None]] = {"count": _count, "decode": _decode}
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, work)  # whose signal ends the process
        try:
            calls[name](pipe, *arguments)
        except ImageError as error:
            pipe.send_bytes(json.dumps({"wrong": str(error), "place": error.place}).encode())
        signal.setitimer(signal.ITIMER_PROF, 0)


def _open(file: EncodedImage) -> Image.Image:
    data = pictures.bytes_from_data_uri(file.data) if isinstance(file.data, str) else file.data
    return pictures.open_image(data, "the mask" if file.mask else "the picture")


def _count(pipe: Connection, files: list[EncodedImage], copies: int, area: int | None) -> None:
    counted, image_pixels = 0, []
    for place, file in enumerate(files):
        with _index_errors(place):
            width, height = _open(file).size
            counted += width * height
            if counted > MAX_REQUEST_PIXELS or (area is None and counted * copies > MAX_REQUEST_PIXELS):
                limit_text = f"at most {MAX_REQUEST_PIXELS // (copies if area is None else 1):,} in all"
                raise ValueError(f"the pictures of this request have too many pixels: {limit_text}")
            image_pixels.append(width * height if area is None else min(area, width * height))
    pipe.send_bytes(json.dumps({"pixels": image_pixels}).encode())


def _decode(pipe: Connection, file: EncodedImage, area: int | None, place: int) -> None:
    with _index_errors(place):
        head = _open(file)
        picture = pictures.decode_mask(head) if file.mask else pictures.decode_image(head, area)
        data = picture.tobytes()
    pipe.send_bytes(json.dumps({"mode": picture.mode, "size": picture.size}).encode())
    pipe.send_bytes(data)


class _index_errors:
    """Says of what goes wrong with a picture which one it is."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, MemoryError):
            raise ImageError("the picture cannot be decoded: it takes too much memory", self.place) from None
        if isinstance(error, ValueError) and not isinstance(error, ImageError):
            raise ImageError(" ".join(str(error).split()), self.place) from None


def main() -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the server, which closes the pipe
    number, memory, work = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(number) as pipe:
        run_decoder(pipe, work)
