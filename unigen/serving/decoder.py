"""Images of requests are decoded in a process of their own: one at a time, counted before, reduced at once.

    async with ImageDecoder() as decoder:
        images = await decoder.decode([EncodedImage(data)], copies=1, max_pixels=MAX_READ_PIXELS, client="10.0.0.1")

A file of some kilobytes may contain millions of pixels, and a damaged one may crash the library that decodes it. So
neither the process that answers HTTP nor the one that holds the model decodes. A third process does, within limits of
memory and time, and is restarted when it ends. It answers with sizes and bytes. Clients take turns, one image each.

Does not depend on: HTTP.
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
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar, TypeVarTuple

from PIL import Image

from unigen.serving import pictures

MAX_IMAGES = 128
"""Images of one request."""
MAX_REQUEST_PIXELS = 128_000_000
"""Pixels of all images of one request, times its number of answers; and of all images that are held at a time."""
MAX_READ_PIXELS = 2048 * 2048
"""Pixels to which an image is reduced that the model only reads."""
MAX_TOTAL_READ_PIXELS = 32_000_000
"""Pixels of all images of one request that the model only reads."""
MAX_MEMORY_BYTES = 2 << 30
"""Memory of the process."""
WALL_TIMEOUT = 30.0
"""Seconds for one image, after which the process counts as hanging."""
CPU_TIMEOUT = 8.0
"""Seconds of processor time for one image, and for the headers of all images of one request: a small file may contain
millions of tiny pieces."""
SINGLE_THREAD_ENV = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of the process: on many cores, buffers of further threads would use up its memory."""
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class EncodedImage:
    """An image that is to be decoded."""

    data: bytes | str
    """The bytes of a file, or a data URI."""
    mask: bool = False
    """Whether it is a mask of where to inpaint."""


class ImageError(ValueError):
    """An image that cannot be decoded.

    Args:
        message: why, in one line.
        index: of the image among those of the request.
    """

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index


class DecoderBusy(Exception):
    """Other requests hold all memory for images, or no process can be started now: try again."""


class FairLock:
    """A lock that clients take in turns: among those who wait, the one who held it longest ago is next.

    async with lock.hold("10.0.0.1"): ...
    """

    def __init__(self) -> None:
        self._is_held = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next client first

    @asynccontextmanager
    async def hold(self, client: str) -> AsyncIterator[None]:
        """Hold the lock for this client."""
        if self._is_held:
            future = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(client, deque()).append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():  # the lock was passed on to it at that moment
                    self._release()
                raise
        self._is_held = True
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        while self._waiting:
            client, futures = next(iter(self._waiting.items()))
            del self._waiting[client]
            future = futures.popleft()
            if futures:
                self._waiting[client] = futures
            if not future.done():
                future.set_result(None)
                return
        self._is_held = False


class ImageDecoder:
    """The process that decodes. It is started with the server, and again when it has ended.

    Args:
        wall_timeout: seconds for one image.
        max_memory: bytes of the process.
        max_held_pixels: pixels of the images of all requests that are held at a time.
        cpu_timeout: seconds of processor time for one image.
    """

    def __init__(
        self,
        wall_timeout: float = WALL_TIMEOUT,
        max_memory: int = MAX_MEMORY_BYTES,
        max_held_pixels: int = MAX_REQUEST_PIXELS,
        cpu_timeout: float = CPU_TIMEOUT,
    ) -> None:
        self.wall_timeout, self.cpu_timeout = wall_timeout, cpu_timeout
        self.max_memory, self.max_held_pixels = max_memory, max_held_pixels
        self.held_pixels = 0
        """Pixels of the images that were returned and still exist, times their copies; and of those to come."""
        self._lock = FairLock()
        self._thread = ThreadPoolExecutor(1, "decoder")
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    async def __aenter__(self) -> ImageDecoder:
        self._thread.submit(self._ensure_started)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True, wait=False)
        self._stop()

    async def decode(
        self, files: list[EncodedImage], copies: int = 1, max_pixels: int | None = None, client: str = ""
    ) -> list[Image.Image]:
        """Decode the images of one request.

        Args:
            files: at most `MAX_IMAGES`.
            copies: number of answers that use them, each with a copy of its own.
            max_pixels: size to which larger images are reduced; None keeps them as they are. Many images are reduced
                further, so that together they have at most `MAX_TOTAL_READ_PIXELS`, times their copies.
            client: who sent them. Between two images of one client those of others are decoded.

        Returns:
            The images in RGB, masks in L.

        Raises:
            ImageError: an image cannot be decoded, or they are too many or too large together.
            DecoderBusy: the images of other requests leave no room now, or the process cannot be started now.
        """
        if not files:
            return []
        if len(files) > MAX_IMAGES:
            raise ImageError(f"the request has {len(files)} pictures: at most {MAX_IMAGES}", MAX_IMAGES)
        if max_pixels is not None:
            max_pixels = max(1, min(max_pixels, MAX_TOTAL_READ_PIXELS // (len(files) * copies)))
        async with self._lock.hold(client):
            sizes = await self._in_thread(self._count, files, copies, max_pixels)
        reserved_pixels = sum(sizes) * copies
        if self.held_pixels + reserved_pixels > self.max_held_pixels:
            raise DecoderBusy
        self.held_pixels += reserved_pixels
        images: list[Image.Image] = []
        try:
            for i, (file, size) in enumerate(zip(files, sizes, strict=True)):
                async with self._lock.hold(client):
                    image = await self._in_thread(self._decode, file, max_pixels, i)
                weakref.finalize(image, self._free_pixels, size * copies)
                reserved_pixels -= size * copies
                images.append(image)
        finally:
            self.held_pixels -= reserved_pixels
        return images

    async def _in_thread(self, call: Callable[[*Ts], T], *arguments: *Ts) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _free_pixels(self, num_pixels: int) -> None:
        self.held_pixels -= num_pixels

    # ---------------------------------------------------------------- in the thread

    def _count(self, files: list[EncodedImage], copies: int, max_pixels: int | None) -> list[int]:
        """Return the number of pixels that each image will have."""
        answer, _ = self._call_process(0, "count", files, copies, max_pixels)
        return [int(size) for size in answer["pixels"]]

    def _decode(self, file: EncodedImage, max_pixels: int | None, index: int) -> Image.Image:
        answer, data = self._call_process(index, "decode", file, max_pixels, index)
        return Image.frombytes(answer["mode"], answer["size"], data)

    def _call_process(self, index: int, name: str, *arguments: object) -> tuple[dict[str, Any], bytes]:
        """Call a function of the process; index: of the image that is blamed where the process ends.

        Returns:
            Its answer, and the bytes of the image that it decoded.
        """
        try:
            pipe = self._ensure_started()
        except OSError:  # no memory, process or file is available now
            self._stop()
            raise DecoderBusy from None
        try:
            pipe.send((name, *arguments))
            answer = self._receive(pipe)
            return answer, b"" if name == "count" else pipe.recv_bytes()
        except (EOFError, OSError):
            self._stop()
            raise ImageError("the picture cannot be decoded: it takes too much time or memory", index) from None

    def _receive(self, pipe: Connection) -> dict[str, Any]:
        """Receive an answer.

        Raises:
            ImageError: the process found an error in an image.
            EOFError: none comes in time.
        """
        if not pipe.poll(self.wall_timeout):
            raise EOFError
        answer: dict[str, Any] = json.loads(pipe.recv_bytes())
        if "error" in answer:
            raise ImageError(answer["error"], answer["index"])
        return answer

    def _ensure_started(self) -> Connection:
        if self._process is None or self._process.poll() is not None or self._pipe is None:
            self._stop()
            self._pipe, process_end = Pipe()
            with process_end:
                command = [
                    sys.executable,
                    "-c",
                    f"from {__name__} import main; main()",
                    str(process_end.fileno()),
                    str(self.max_memory),
                    str(self.cpu_timeout),
                ]
                paths = os.pathsep.join(filter(None, sys.path))
                environment = {**os.environ, "PYTHONPATH": paths, **SINGLE_THREAD_ENV}
                self._process = subprocess.Popen(command, pass_fds=[process_end.fileno()], env=environment)
        return self._pipe

    def _stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


# ---------------------------------------------------------------- in the process


def run_decoder(pipe: Connection, cpu_timeout: float) -> None:
    """Count and decode until the other end is closed, or one request takes too long.

    Args:
        pipe: requests come in and answers go out.
        cpu_timeout: seconds of processor time for one request, after which a signal ends the process.
    """
    calls: dict[str, Callable[..., None]] = {"count": _count, "decode": _decode}
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_timeout)  # whose signal ends the process
        try:
            calls[name](pipe, *arguments)
        except ImageError as error:
            pipe.send_bytes(json.dumps({"error": str(error), "index": error.index}).encode())
        signal.setitimer(signal.ITIMER_PROF, 0)


def _open(file: EncodedImage) -> Image.Image:
    data = pictures.bytes_from_data_uri(file.data) if isinstance(file.data, str) else file.data
    return pictures.open_image(data, "the mask" if file.mask else "the picture")


def _count(pipe: Connection, files: list[EncodedImage], copies: int, max_pixels: int | None) -> None:
    total, image_pixels = 0, []
    limit = MAX_REQUEST_PIXELS // (copies if max_pixels is None else 1)
    for i, file in enumerate(files):
        with _index_errors(i):
            width, height = _open(file).size
            num_pixels = width * height
            total += num_pixels
            if total > limit:
                raise ValueError(f"the pictures of this request have too many pixels: at most {limit:,} in all")
            image_pixels.append(num_pixels if max_pixels is None else min(max_pixels, num_pixels))
    pipe.send_bytes(json.dumps({"pixels": image_pixels}).encode())


def _decode(pipe: Connection, file: EncodedImage, max_pixels: int | None, index: int) -> None:
    with _index_errors(index):
        opened = _open(file)
        image = pictures.decode_mask(opened) if file.mask else pictures.decode_image(opened, max_pixels)
        data = image.tobytes()
    pipe.send_bytes(json.dumps({"mode": image.mode, "size": image.size}).encode())
    pipe.send_bytes(data)


@contextmanager
def _index_errors(index: int) -> Iterator[None]:
    """Turn errors into an `ImageError` with the index of the image."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("the picture cannot be decoded: it takes too much memory", index) from None
    except ValueError as error:
        raise ImageError(" ".join(str(error).split()), index) from None


def main() -> None:
    """Run the decoder with the pipe, the bytes of memory and the seconds of processor time of the command line."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles interrupts and closes the pipe
    pipe_fd, max_memory, cpu_timeout = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_DATA, (max_memory, max_memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(pipe_fd) as pipe:
        run_decoder(pipe, cpu_timeout)
