"""`unigen serve`: text and pictures behind the OpenAI API.

    unigen serve --model unigen-tiny --port 8000
    curl localhost:8000/v1/images/generations -H 'content-type: application/json' -d '{"prompt": "two apples"}'

Turns requests into jobs and their events into answers. Knows HTTP and OpenAI's schema; does not depend on how anything
is
generated: that is behind anything with `answer(job)`, `info`, `ready`, `down`, `alive` and `most`, such as
`process.EngineProcess`.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import socket
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from unigen.document import Document, Segment
from unigen.model.template import default_output, split_system_messages
from unigen.samplers.seeds import offset_seed
from unigen.serving import pictures, protocol
from unigen.serving.answers import AnswerBuilder, assistant_message, chat_chunks, chat_usage, image_chunks, images_usage
from unigen.serving.body import BoundedRoute
from unigen.serving.connection import TimedConnection
from unigen.serving.decoder import MAX_IMAGES, MAX_READ_PIXELS, DecoderBusy, EncodedImage, ImageDecoder, ImageError
from unigen.serving.jobs import Error, Event, Job, Part, Rejected, Started
from unigen.serving.metrics import Metrics
from unigen.serving.middleware import GuardMiddleware, Limits, error_body
from unigen.serving.page import add_page
from unigen.serving.process import EngineProcess, ModelUnavailable, QueueFull
from unigen.serving.responses import ResponsesRequest, response_events

log = logging.getLogger("unigen.serving")
MIN_FREE_BYTES_PER_IMAGE = 4 << 20
"""Of the disk, that must be free for each picture that is to be kept."""
STEP_TIMEOUT_MARGIN = 30.0
"""Seconds beyond the time that an answer may take, after which a step that still runs helps nobody."""
MAX_FORM_FILES = 20
"""Of a form; all but one picture and one mask are refused by name."""
T = TypeVar("T")


@dataclass(frozen=True)
class ServerConfig:
    """How the server behaves. model: the name under which it is asked for. seconds: that an answer may take. folder:
    where pictures asked for by url are kept; None refuses them. fetch: may pictures come from addresses? prompts: are
    they logged? origins: of pages that may ask from a browser. proxies: addresses and networks whose header
    X-Forwarded-For is believed. silence: seconds without a heartbeat after which the model's process is started again;
    patience: seconds without a model after which /health fails."""

    model: str
    limits: Limits = field(default_factory=Limits)
    seconds: float = 300.0
    folder: Path | None = None
    fetch: bool = False
    prompts: bool = False
    allowed_origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    silence: float = 30.0
    patience: float = 300.0

    def __post_init__(self) -> None:
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise ValueError(
                    f"{proxy!r} is no address and no network: name a proxy as 10.0.0.1 or 10.0.0.0/8"
                ) from None


class HTTPError(Exception):
    """What is answered instead: a status, and a message in one line."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait: int = 0):
        super().__init__(message)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.body = status, error_body(message, kind=kind, param=param, code=code)
        self.headers = {"retry-after": str(wait)} if wait else {}


class Server:
    """The routes of one app."""

    def __init__(self, engine: Any, settings: ServerConfig) -> None:
        self.engine, self.settings, self.decoder = engine, settings, ImageDecoder()
        self.metrics = Metrics(engine)

    # ---------------------------------------------------------------- state

    async def health(self) -> Response:
        """Is the server alive? Not when its model has been away for too long: then only a new start may help."""
        if self.engine.alive:
            return JSONResponse({"status": "ok"})
        reason = f"there has been no model for {self.settings.patience:g} s: {self.engine.down}"
        return JSONResponse({"status": "failing", "reason": reason}, 503)

    async def ready(self) -> Response:
        """Is the model there?"""
        if self.engine.ready.is_set():
            return JSONResponse({"status": "ready", "starts": self.engine.starts})
        return JSONResponse({"status": "not ready", "reason": self.engine.down, "starts": self.engine.starts}, 503)

    async def models(self) -> Any:
        """The one model that is served, and what it can do."""
        one = {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "unigen"}
        return {"object": "list", "data": [one | {"unigen": self.engine.info}]}

    async def model(self, name: str) -> Any:
        self._check_model(name)
        return (await self.models())["data"][0]

    async def metric(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # ---------------------------------------------------------------- chat

    async def chat(self, request: Request, asked: protocol.ChatRequest) -> Any:
        """Text and pictures in, text and pictures out; see docs/serving.md for the form of the answer."""
        self._check_model(asked.model)
        document = await self._cancel_on_disconnect(request, self._build_document(request, asked))
        self._log(request, document)
        stop, output = tuple(asked.stop or ()), self._choose_output(asked.modalities, document)
        document, notes = self._without_system(document, output)
        jobs = self._jobs(asked, document, output, stop=stop, notes=notes)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.settings.model}
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return await self._stream(request, chat_chunks(self._merge_events(jobs), head, usage))
        answers = await self._cancel_on_disconnect(request, self._collect(jobs))
        choices = [
            {
                "index": i,
                "message": await assistant_message(answer.parts, asked.content_format == "parts"),
                "finish_reason": answer.ended.reason,
                "logprobs": None,
                "settings": answer.settings,
            }
            for i, answer in enumerate(answers)
        ]
        return {**head, "object": "chat.completion", "choices": choices, "usage": chat_usage(answers)}

    async def responses(self, request: Request, asked: ResponsesRequest) -> Any:
        """The same as items in order; see `unigen.serving.responses`."""
        self._check_model(asked.model)
        document = await self._cancel_on_disconnect(request, self._build_document(request, asked, "input"))
        self._log(request, document)
        supported_outputs = self.engine.info.get("outputs", ())
        if not asked.tools and supported_outputs and "text" not in supported_outputs:
            raise HTTPError(400, 'this model draws: give tools [{"type": "image_generation"}]', param="tools")
        output = self._choose_output(asked.modalities, document)
        document, notes = self._without_system(document, output)
        jobs = self._jobs(asked, document, output, notes=notes)
        events = response_events(self._merge_events(jobs), asked, self.settings.model)
        if asked.stream:
            return await self._stream(request, events)

        async def last() -> Any:
            response = None
            async with aclosing(events):
                async for event in events:
                    response = event.get("response", response)
            return response

        return await self._cancel_on_disconnect(request, last())

    def _without_system(self, document: Document, output: str) -> tuple[Document, dict[str, Any]]:
        """Leave system messages out where the model does not follow them; the settings of the answer then note it."""
        system_text, said = split_system_messages(document.segments)
        if system_text and (output == "image" or not self.engine.info.get("system")):
            return Document(said), {"ignored": ["system"]}
        return document, {}

    async def _build_document(
        self, request: Request, asked: protocol.ChatRequest | ResponsesRequest, field: str = "messages"
    ) -> Document:
        """The conversation as the model reads it; field: of the request, which holds it."""
        last = max(m for m, message in enumerate(asked.messages) if message.role == "user")
        if not asked.messages[last].parts():
            param = f"{field}.{last}.content"
            raise HTTPError(400, "the last message is empty: say what to draw or ask", param=param)
        parts: list[tuple[Any, str | None, str]] = []  # a role; a text, or None for the next picture; its place
        urls = []
        for m, said in enumerate(asked.messages):
            role = "system" if said.role in protocol.SYSTEM_ROLES else said.role
            for kind, part, place in said.parts():
                parts.append((role, part if kind == "text" else None, f"{field}.{m}.{place}"))
                urls += [part] if kind == "image" else []
        places = [place for _, text, place in parts if text is None]
        images = iter(
            await self._decode_images(request, await self._load_files(urls, places), places, asked.n, MAX_READ_PIXELS)
        )
        return Document(
            [
                Segment(image=next(images), role=role) if text is None else Segment(text=text, role=role)
                for role, text, _ in parts
            ]
        )

    async def _load_files(self, urls: list[str], places: list[str]) -> list[EncodedImage]:
        """The pictures' files, or what holds them; together they are no larger than a body may be."""
        if len(urls) > MAX_IMAGES:
            message = f"the request has {len(urls)} pictures: at most {MAX_IMAGES}"
            raise HTTPError(400, message, param=places[MAX_IMAGES])
        files, left, end = [], self.settings.limits.body, time.monotonic() + self.settings.seconds
        for url, place in zip(urls, places, strict=True):
            if not url[:8].lower().startswith(("http://", "https://")):
                files.append(EncodedImage(url))
                continue
            try:
                if not self.settings.fetch:
                    raise ValueError("this server fetches no pictures (--allow-fetch): send data:image/png;base64,...")
                if time.monotonic() > end:
                    raise ValueError("the pictures' addresses take too long")
                files.append(EncodedImage(data := await pictures.fetch_image(url, left)))
            except ValueError as error:
                raise HTTPError(400, str(error), param=place) from None
            left -= len(data)
        return files

    async def _decode_images(
        self, request: Request, files: list[EncodedImage], places: Sequence[str], n: int, area: int | None = None
    ) -> list[Image.Image]:
        """The pictures of a request for n answers; area: pixels to which they are made smaller, where they may be."""
        try:
            return await self.decoder.decode(files, n, area, request.scope["state"].get("client", ""))
        except ImageError as error:
            raise HTTPError(400, str(error), param=places[error.place]) from None
        except DecoderBusy:
            message = "the server cannot take more pictures now: ask again"
            raise HTTPError(429, message, code="busy", wait=2) from None

    def _choose_output(self, modalities: list[Any] | None, document: Document) -> str:
        if self.engine.down is not None:  # what the model can do is known when it is there
            raise HTTPError(503, self.engine.down, code="not_ready", wait=1)
        supported_outputs = self.engine.info["outputs"]
        if modalities is None:
            return default_output(document, supported_outputs)
        output = "interleaved" if len(set(modalities)) == 2 else modalities[0]
        if output not in supported_outputs:
            raise HTTPError(
                400,
                f"this model cannot answer with {output}: it can with {' or '.join(supported_outputs)}",
                param="modalities",
            )
        return str(output)

    # ---------------------------------------------------------------- pictures

    async def generations(self, request: Request, asked: protocol.GenerationRequest) -> Any:
        """Pictures of words, or of a class."""
        document = Document.of(Segment(label=asked.label) if asked.prompt is None else Segment(text=asked.prompt))
        return await self._generate_images(request, asked, "image_generation", document)

    async def edits(self, request: Request) -> Any:
        """The picture changed as the prompt says; or, with a mask, painted anew where it marks."""
        body, image, mask = await self._form(request, protocol.EditRequest)
        if mask is None:
            return await self._generate_images(
                request, body, "image_edit", Document.of([image, Segment(text=body.prompt)])
            )
        painted: dict[str, Any] = {"around": image, "mask": mask}
        return await self._generate_images(
            request, body, "image_edit", Document.of(Segment(text=body.prompt)), **painted
        )

    async def variations(self, request: Request) -> Any:
        """The picture with a share of it drawn anew, by lot, as the model itself describes it."""
        body, image, mask = await self._form(request, protocol.VariationRequest)
        if mask is not None:
            raise HTTPError(400, "a variation takes no mask: see /v1/images/edits", param="mask")
        self._check_model(body.model)
        question = Job(Document.of([image, "describe this picture"]), "text")
        caption = (await self._cancel_on_disconnect(request, self._collect([question])))[0].parts
        document = Document.of(Segment(text=str(caption[0]) if caption else "a picture"))
        return await self._generate_images(request, body, "image_variation", document, around=image, vary=body.vary)

    async def _generate_images(
        self, request: Request, asked: protocol.ImagesRequest, kind: str, document: Document, **job: Any
    ) -> Any:
        """The pictures of a request, whole or streamed; kind: as its events are named."""
        self._check_model(asked.model)
        if asked.response_format == "url" and self.settings.folder is None:
            raise HTTPError(
                400, "this server keeps no pictures (--images-folder): ask for b64_json", param="response_format"
            )
        jobs = self._jobs(asked, document, "image", **job)
        if asked.response_format == "url":
            await asyncio.to_thread(self._check_folder, asked.n)
        self._log(request, document)
        if asked.stream:
            form = (asked.output_format, asked.output_compression)
            chunks = image_chunks(self._merge_events(jobs), self.settings.model, kind, *form)
            return await self._stream(request, chunks)
        answers = await self._cancel_on_disconnect(request, self._collect(jobs))
        data = []
        for answer in answers:
            form = (asked.output_format, asked.output_compression)
            file = await asyncio.to_thread(pictures.encode_image, answer.pictures[0], *form)
            if asked.response_format == "url":
                try:
                    name = await asyncio.to_thread(self._save_image, file, asked.output_format)
                except ValueError as error:  # which names the file: the server's path is not told
                    reason = getattr(error.__cause__, "strerror", None) or "the disk refuses"
                    log.error("a picture cannot be kept: %s", error)
                    raise HTTPError(507, f"this server cannot keep pictures now ({reason}): ask for b64_json") from None
                data.append({"url": str(request.url_for("picture", name=name)), "settings": answer.settings})
            else:
                data.append({"b64_json": base64.b64encode(file).decode(), "settings": answer.settings})
        return {
            "created": int(time.time()),
            "model": self.settings.model,
            "data": data,
            "size": "{}x{}".format(*answers[0].pictures[0].size),
            "output_format": asked.output_format,
            "usage": images_usage(answers),
        }

    async def _form(self, request: Request, kind: type[T]) -> tuple[T, Image.Image, Image.Image | None]:
        """A form's fields, its picture and its mask."""
        kinds: Any = kind
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise HTTPError(400, "send multipart/form-data with a file named image")
        try:
            form = await request.form(max_files=MAX_FORM_FILES, max_fields=40)
        except ClientDisconnect:
            raise HTTPError(499, "the client left") from None
        except OSError as full:  # large files of a form are laid on the disk
            raise HTTPError(507, f"this server cannot take files now: {full.strerror}") from None
        except HTTPException as error:
            if error.status_code != 400:  # of the door
                raise
            raise HTTPError(400, f"the form cannot be read: {error.detail}") from None
        except ValueError:  # a charset such as "undefined"
            raise HTTPError(400, "the form cannot be read: send it as UTF-8") from None
        files, fields = {}, {}
        for field_name, value in form.multi_items():
            name = field_name.removesuffix("[]")  # of a list, as clients have it that edit several pictures
            if name == "image" and name in files:
                raise HTTPError(
                    400, "one picture is edited at a time: send one image (a chat takes several)", param=name
                )
            if name in files or name in fields:
                raise HTTPError(400, f"the form has {name} more than once: give one", param=name)
            if isinstance(value, str):
                fields[name] = value
            else:
                files[name] = await value.read()
        for name in files:
            if name not in ("image", "mask"):
                raise HTTPError(400, f"unknown file {name!r}: there are image and mask", param=name)
        if "image" not in files:
            raise HTTPError(400, "the form has no file named image", param="image")
        try:
            body = kinds.model_validate(protocol.parse_form_fields(fields))
        except ValidationError as wrong:
            raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in wrong.errors()]) from None
        names = [name for name in ("image", "mask") if name in files]
        encoded_images = [EncodedImage(files[name], mask=name == "mask") for name in names]
        images = await self._cancel_on_disconnect(request, self._decode_images(request, encoded_images, names, body.n))
        return body, images[0], images[1] if "mask" in files else None

    def _check_folder(self, count: int) -> None:
        """Before so many pictures are drawn for it."""
        assert self.settings.folder is not None
        try:
            check_space(self.settings.folder, count * MIN_FREE_BYTES_PER_IMAGE)
        except ValueError as error:
            raise HTTPError(507, f"{error}: ask for b64_json", param="response_format") from None

    def _save_image(self, file: bytes, format: str) -> str:
        from unigen.media.output import write_atomically

        assert self.settings.folder is not None
        name = f"{uuid.uuid4().hex}.{format}"
        write_atomically(self.settings.folder / name, lambda out: out.write(file))
        return name

    async def picture(self, name: str) -> Response:
        """A picture that was asked for by url."""
        folder = self.settings.folder
        if folder is None or not re.fullmatch(r"[0-9a-f]{32}\.(png|jpeg|webp)", name) or not (folder / name).is_file():
            raise HTTPError(404, "no such picture")
        return FileResponse(folder / name)

    # ---------------------------------------------------------------- jobs

    async def _merge_events(self, jobs: list[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all jobs as they come, with the job's place. Raises `HTTPError`; leaving drops what still
        runs."""
        merged: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

        async def one(i: int, job: Job) -> None:
            try:
                async with aclosing(self.engine.answer(job)) as events:
                    async for event in events:
                        merged.put_nowait((i, event))
                merged.put_nowait((i, None))
            except Exception as error:
                merged.put_nowait((i, error))

        tasks = [asyncio.create_task(one(i, job)) for i, job in enumerate(jobs)]
        left, start, first = len(jobs), time.perf_counter(), True
        try:
            while left:
                seconds_left = start + self.settings.seconds - time.perf_counter()
                i, event = await asyncio.wait_for(merged.get(), seconds_left)
                if event is None:
                    left -= 1
                elif isinstance(event, Exception):
                    raise event
                elif isinstance(event, Rejected):
                    raise HTTPError(400, event.message)
                elif isinstance(event, Error) and not event.again:
                    raise HTTPError(500, event.message)
                elif isinstance(event, Error):
                    raise HTTPError(503, event.message, code="try_again", wait=1)
                else:
                    if isinstance(event, Started):
                        event = replace(event, settings=event.settings | jobs[i].notes)
                    if isinstance(event, Part) and first:
                        self.metrics.first.observe(time.perf_counter() - start)
                        first = False
                    self.metrics.count(event)
                    yield i, event
        except TimeoutError:
            raise HTTPError(504, f"the answer took longer than {self.settings.seconds:g} s", code="timeout") from None
        except QueueFull as busy:
            raise HTTPError(429, str(busy), code="busy", wait=busy.seconds) from None
        except ModelUnavailable as down:
            raise HTTPError(503, str(down), code="not_ready", wait=1) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _collect(self, jobs: list[Job]) -> list[AnswerBuilder]:
        answers = [AnswerBuilder() for _ in jobs]
        async with aclosing(self._merge_events(jobs)) as events:
            async for i, event in events:
                answers[i].take(event)
        return answers

    async def _cancel_on_disconnect(self, request: Request, work: Awaitable[T]) -> T:
        """What the work gives; it is cancelled when the client leaves."""
        task = asyncio.ensure_future(work)
        disconnect_task = asyncio.create_task(_wait_for_disconnect(request))
        try:
            await asyncio.wait([task, disconnect_task], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise HTTPError(499, "the client left")
        finally:
            for one in (task, disconnect_task):
                one.cancel()
            await asyncio.gather(task, disconnect_task, return_exceptions=True)

    async def _stream(self, request: Request, chunks: AsyncGenerator[dict[str, Any], None]) -> Response:
        """Server-sent events. The first is awaited, so that what is refused has its status; what goes wrong later is an
        event with an error, and no [DONE] follows."""
        first = await self._cancel_on_disconnect(request, anext(chunks))

        async def events() -> AsyncIterator[str]:
            async with aclosing(chunks):
                try:
                    yield _server_sent_event(first)
                    async for chunk in chunks:
                        yield _server_sent_event(chunk)
                    yield "data: [DONE]\n\n"
                except HTTPError as error:
                    yield _server_sent_event(error.body)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    # ---------------------------------------------------------------- small things

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model:
            raise HTTPError(
                404, f"no model {name!r}: {self.settings.model!r} is served", param="model", code="model_not_found"
            )

    def _jobs(self, asked: protocol.GenerationFields, document: Document, output: str, **more: Any) -> list[Job]:
        """One for each of the n answers, each with its seed."""
        if asked.n > self.engine.most:
            message = (
                f"n is {asked.n}, and this server makes {self.engine.most} answers at a time (--queue): ask for fewer"
            )
            raise HTTPError(400, message, param="n")
        first = secrets.randbelow(1 << 31) if asked.seed is None else asked.seed
        more |= {"previews": asked.partial_images, "candidates": asked.candidates}
        options, info = asked.options(), self.engine.info
        if asked.size in protocol.COMMON_SIZES and info.get("sizes") == "this one":
            options.pop("size", None)
            more["notes"] = more.get("notes", {}) | {"size": "{0}x{0}".format(info["image_size"])}
        seeds = [offset_seed(first, i) for i in range(asked.n)]
        return [Job(document, output, {**options, "seed": seed}, **more) for seed in seeds]

    def _log(self, request: Request, document: Document) -> None:
        if self.settings.prompts:
            request.scope["state"]["log"] = {"prompt": [_log_entry(segment) for segment in document.segments]}


def _validation_message(wrong: Any) -> tuple[str, str | None]:
    """One line for what pydantic found, and where."""
    if tuple(wrong["loc"]) == ("body",) and wrong["type"] in ("missing", "model_attributes_type", "model_type"):
        return "the body must be a JSON object, sent with the header content-type: application/json", None
    kinds = ("body", "int", "str", "float", "list[float]")  # of a field that may be one or the other
    places = [str(place) for place in wrong["loc"] if place not in kinds]
    param = ".".join(places) or None
    if wrong["type"] == "extra_forbidden":
        return f"unknown field {str(wrong['loc'][-1])[:100]!r}: leave it out", param and param[:200]
    if wrong["type"] == "json_invalid":
        return f"the body is no JSON: {wrong.get('ctx', {}).get('error', wrong['msg'])}", None
    message = wrong["msg"].removeprefix("Value error, ")[:1000]
    param = param and param[:200]
    return (f"{param}: {message}" if param else message), param


def _log_entry(segment: Segment) -> dict[str, Any]:
    """A part of a prompt as it is logged: its text, its class, or that it is a picture."""
    if segment.text is not None:
        return {"role": segment.role, "text": segment.text}
    if segment.label is not None:
        return {"role": segment.role, "label": segment.label}
    return {"role": segment.role, "image": True}


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _server_sent_event(data: dict[str, Any]) -> str:
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n"


def create_app(engine: Any, settings: ServerConfig) -> Any:
    """An ASGI app; engine: an async context manager, such as `EngineProcess`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine, server.decoder:
            await asyncio.to_thread(app.openapi)  # seconds, else at the first question for it
            yield

    server = Server(engine, settings)
    app = FastAPI(
        title="unigen",
        summary="Text and pictures behind the OpenAI API",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = BoundedRoute
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("GET", "/health", server.health),
        ("GET", "/ready", server.ready),
        ("GET", "/metrics", server.metric),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{name:path}", server.model),
        ("POST", "/v1/chat/completions", server.chat),
        ("POST", "/v1/responses", server.responses),
        ("POST", "/v1/images/generations", server.generations),
        ("POST", "/v1/images/edits", server.edits),
        ("POST", "/v1/images/variations", server.variations),
        ("GET", "/images/{name}", server.picture),
    ]
    forms = {
        server.edits: protocol.form_schema(protocol.EditRequest, "image", "mask"),
        server.variations: protocol.form_schema(protocol.VariationRequest, "image"),
    }
    error_responses: dict[int | str, Any] = {
        status: {"model": protocol.ErrorResponse, "description": "What is wrong"} for status in ("4XX", "5XX")
    }
    for method, path, route in routes:
        more: Any = {"responses": error_responses, "openapi_extra": forms.get(route)}
        app.add_api_route(path, route, methods=[method], name=route.__name__, response_model=None, **more)
    add_page(app)

    @app.exception_handler(HTTPError)
    async def wrong(_: Request, bad: HTTPError) -> Response:
        return JSONResponse(bad.body, bad.status, bad.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, bad: RequestValidationError) -> Response:
        message, param = _validation_message(bad.errors()[0])
        return JSONResponse(error_body(message, param=param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, bad: HTTPException) -> Response:
        message = str(bad.detail)
        if bad.status_code in (404, 405):
            offered = ", ".join(
                f"{how} {path}" for how, path, _ in routes if path.startswith("/v1/") and "{" not in path
            )
            message = f"there is no {request.method[:20]} {request.url.path[:200]} here: there are {offered}"
        return JSONResponse(HTTPError(bad.status_code, message).body, bad.status_code, bad.headers)

    app.add_middleware(GuardMiddleware, limits=settings.limits, metrics=server.metrics)
    if settings.allowed_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def uvicorn_config(app: Any, settings: ServerConfig, host: str, port: int) -> Any:
    """How uvicorn serves the app: within limits of time, and believing proxies that are named alone."""
    import uvicorn

    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.seconds),
        server_header=False,
        http=TimedConnection,
        ws="none",
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=[str(ipaddress.ip_network(proxy, strict=False)) for proxy in settings.proxies],
    )


def run(source: dict[str, Any], settings: ServerConfig, host: str, port: int, slots: int, most: int) -> None:
    """Serve until SIGINT or SIGTERM; what is being answered then is finished first. Raises ValueError for a model that
    cannot be loaded and an address that cannot be had."""
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if settings.folder is not None:
        check_space(settings.folder, MIN_FREE_BYTES_PER_IMAGE)
    engine = EngineProcess(
        source,
        slots,
        most,
        silence=settings.silence,
        longest_step=settings.seconds + STEP_TIMEOUT_MARGIN,
        patience=settings.patience,
    )
    server = uvicorn.Server(uvicorn_config(create_app(engine, settings), settings, host, port))

    async def watch() -> None:
        await engine.load_attempted.wait()
        if engine.load_error:
            server.should_exit = True
        else:
            log.info(json.dumps({"ready": settings.model, "address": f"http://{host}:{port}"}))

    async def serve(at: socket.socket) -> None:
        gc.freeze()  # what is imported: else each request of many small values has all of it looked through
        watching = asyncio.create_task(watch())
        try:
            await server.serve([at])
        finally:
            watching.cancel()

    with bind_socket(host, port) as at:
        asyncio.run(serve(at))
    if engine.load_error:
        raise ValueError(engine.load_error)


def check_space(folder: Path, size: int) -> None:
    """Can so many bytes be written into the folder, which is made where there is none? They are reserved for a moment,
    since permissions, quotas and full disks show then alone. Raises ValueError in one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise ValueError(f"the folder for pictures cannot take them now ({error.strerror})") from None


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket on that address. Raises ValueError."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(kind, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
    return sock
