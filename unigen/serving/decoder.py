"""Pictures of strangers are decoded in a process of its own: one at a time, counted before, made smaller at once.

    async with Decoder() as decoder:
        pictures = await decoder.read([data], copies=1, area=AREA)

A file of some kilobytes may hold millions of pixels, and a damaged one may crash what decodes it. So neither the
process that answers HTTP nor the one that holds the model decodes: a third does, within limits of memory and time, and
is started anew where it ends. Its answers are sizes and bytes. Knows pictures and a process; refuses to know HTTP.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

from PIL import Image

from unigen.serving import pictures

MOST_PICTURES = 128
"""Of one request."""
MOST_PIXELS = 128_000_000
"""Of all pictures of one request, times the answers that it asks for; and of all that are held at a time."""
AREA = 2048 * 2048
"""Pixels to which a picture is made smaller that is only looked at."""
KEPT = 32_000_000
"""Pixels of all pictures of one request that are only looked at."""
MEMORY = 2 << 30
"""Bytes of the process."""
SECONDS = 30.0
"""For one picture."""


@dataclass(frozen=True)
class File:
    """What is to be decoded: the bytes of a file, or a data URI. mask: where to paint, instead of a picture."""

    data: bytes | str
    mask: bool = False


class PictureError(ValueError):
    """A picture that cannot be had; place: among those that were asked for."""

    def __init__(self, message: str, place: int = 0) -> None:
        super().__init__(message)
        self.place = place


class Full(Exception):
    """All that may be held is held: ask again."""


class Decoder:
    """The process, started when it is first needed."""

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY, most_held: int = MOST_PIXELS) -> None:
        self.seconds, self.memory, self.most_held = seconds, memory, most_held
        self.held = 0
        """Pixels of the pictures that were given out and are still there, times their copies."""
        self._thread = ThreadPoolExecutor(1, "decoder")
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    async def __aenter__(self) -> Decoder:
        self._thread.submit(self._started)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._thread.shutdown(cancel_futures=True, wait=False)
        self._end()

    async def read(self, files: list[File], copies: int = 1, area: int | None = None) -> list[Image.Image]:
        """Decode the pictures of one request.

        Args:
            files: at most `MOST_PICTURES`.
            copies: how many answers need them, each of which gets its own.
            area: pixels to which larger pictures are made smaller; None leaves them as they are. Many are made smaller
                still, so that together they have at most `KEPT`, times their copies.
        Returns:
            The pictures in RGB, masks in L.
        Raises:
            PictureError: for one that cannot be decoded, and where they are too many or too large together.
            Full: what other requests hold leaves no room now.
        """
        if not files:
            return []
        if len(files) > MOST_PICTURES:
            raise PictureError(f"the request has {len(files)} pictures: at most {MOST_PICTURES}", MOST_PICTURES)
        if area is not None:
            area = max(1, min(area, KEPT // (len(files) * copies)))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read, files, copies, area)

    # ---------------------------------------------------------------- in the thread

    def _read(self, files: list[File], copies: int, area: int | None) -> list[Image.Image]:
        at = 0
        try:
            pipe = self._started()
            pipe.send((files, copies, area))
            pixels = self._answer(pipe)["pixels"] * copies
            if self.held + pixels > self.most_held:
                self._end()  # it waits to decode them
                raise Full
            pipe.send_bytes(b"go on")
            found = []
            for at in range(len(files)):  # noqa: B007
                head = self._answer(pipe)
                found.append(Image.frombytes(head["mode"], head["size"], pipe.recv_bytes()))
        except (EOFError, OSError):
            self._end()
            raise PictureError("the picture cannot be decoded: it takes too much time or memory", at) from None
        for image in found:
            own = image.width * image.height * copies
            self.held += own
            weakref.finalize(image, self._release, own)
        return found

    def _release(self, pixels: int) -> None:
        self.held -= pixels

    def _answer(self, pipe: Connection) -> Any:
        """Raises EOFError where none comes in time."""
        if not pipe.poll(self.seconds):
            raise EOFError
        answer = json.loads(pipe.recv_bytes())
        if "wrong" in answer:
            raise PictureError(answer["wrong"], answer["place"])
        return answer

    def _started(self) -> Connection:
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
                ]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
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


def serve(pipe: Connection) -> None:
    """Decode what is asked for until the other end is closed."""
    while True:
        try:
            files, copies, area = pipe.recv()
        except EOFError:
            return
        try:
            _decode(pipe, files, copies, area)
        except PictureError as wrong:
            pipe.send_bytes(json.dumps({"wrong": str(wrong), "place": wrong.place}).encode())


def _decode(pipe: Connection, files: list[File], copies: int, area: int | None) -> None:
    opened: list[Image.Image | None] = []
    counted, kept = 0, 0
    for place, file in enumerate(files):
        with _placed(place):
            data = pictures.data_of(file.data) if isinstance(file.data, str) else file.data
            image = pictures.opened(data, "the mask" if file.mask else "the picture")
            opened.append(image)
            width, height = image.size
            counted += width * height
            if counted > MOST_PIXELS or (area is None and counted * copies > MOST_PIXELS):
                most = f"at most {MOST_PIXELS // (copies if area is None else 1):,} in all"
                raise ValueError(f"the pictures of this request have too many pixels: {most}")
            kept += width * height if area is None else min(area, width * height)
    pipe.send_bytes(json.dumps({"pixels": kept}).encode())
    pipe.recv_bytes()
    for place, file in enumerate(files):
        with _placed(place):
            head, opened[place] = opened[place], None
            assert head is not None
            picture = pictures.decoded_mask(head) if file.mask else pictures.decoded(head, area)
            del head
        pipe.send_bytes(json.dumps({"mode": picture.mode, "size": picture.size}).encode())
        pipe.send_bytes(picture.tobytes())
        del picture


class _placed:
    """Says of what goes wrong with a picture which one it is."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, MemoryError):
            raise PictureError("the picture cannot be decoded: it takes too much memory", self.place) from None
        if isinstance(error, ValueError) and not isinstance(error, PictureError):
            raise PictureError(" ".join(str(error).split()), self.place) from None


def main() -> None:
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the server, which closes the pipe
    number, memory = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(number) as pipe:
        serve(pipe)
