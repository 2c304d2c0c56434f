"""The routes of the API: a request becomes jobs, and the events of the jobs become an answer.

Does not depend on: how answers are generated; that is behind `jobs.JobEngine`.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from fastapi import Request
from fastapi.responses import FileResponse, JSONResponse, Response

from unigen.document import Document, Role, Segment
from unigen.model.template import Output, default_output, split_system_messages
from unigen.samplers.seeds import offset_seed
from unigen.serving import pictures, protocol
from unigen.serving.answers import (
    AnswerBuilder,
    JSONObject,
    assistant_message,
    chat_chunks,
    chat_usage,
    image_chunks,
    images_usage,
)
from unigen.serving.config import ServerConfig
from unigen.serving.decoder import MAX_READ_PIXELS, ImageDecoder
from unigen.serving.errors import HTTPError
from unigen.serving.jobs import Error, Event, Job, JobEngine, Part, Rejected, Started
from unigen.serving.metrics import Metrics
from unigen.serving.process import ModelUnavailable, QueueFull
from unigen.serving.responses import ResponsesRequest, response_events
from unigen.serving.streaming import cancel_on_disconnect, stream_response
from unigen.serving.uploads import ImageLoader, ImageStore


class Server:
    """The routes of one app.

    Args:
        engine: runs the jobs.
        config: settings of the server.
    """

    def __init__(self, engine: JobEngine, config: ServerConfig) -> None:
        self.engine, self.config, self.decoder = engine, config, ImageDecoder()
        self.image_loader = ImageLoader(config, self.decoder)
        self.image_store = None if config.images_folder is None else ImageStore(config.images_folder)
        self.metrics = Metrics(engine)

    # ---------------------------------------------------------------- state

    async def health(self) -> Response:
        """Whether the server is alive. It is not after too long a time without a model: a restart may help then."""
        if self.engine.is_alive:
            return JSONResponse({"status": "ok"})
        timeout = self.config.unavailable_timeout
        reason = f"there has been no model for {timeout:g} s: {self.engine.unavailable_reason}"
        return JSONResponse({"status": "failing", "reason": reason}, 503)

    async def ready(self) -> Response:
        """Whether the model is loaded."""
        state: JSONObject = {"starts": self.engine.num_starts}
        if self.engine.ready.is_set():
            return JSONResponse({"status": "ready"} | state)
        return JSONResponse({"status": "not ready", "reason": self.engine.unavailable_reason} | state, 503)

    async def models(self) -> JSONObject:
        """The served model and its capabilities."""
        return {"object": "list", "data": [self._model_object()]}

    async def model(self, name: str) -> JSONObject:
        """The served model, by its name."""
        self._check_model(name)
        return self._model_object()

    def _model_object(self) -> JSONObject:
        model: JSONObject = {"id": self.config.model_name, "object": "model", "created": 0, "owned_by": "unigen"}
        return model | {"unigen": self.engine.info}

    async def prometheus_metrics(self) -> Response:
        """Counters in the format of Prometheus."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    # ---------------------------------------------------------------- chat

    async def chat(self, request: Request, body: protocol.ChatRequest) -> Response | JSONObject:
        """Text and images in, text and images out; docs/serving.md describes the format of the answer."""
        self._check_request(request, body, body.model)
        document = await cancel_on_disconnect(request, self._build_document(request, body))
        self._log_prompt(request, document)
        output = self._choose_output(body.modalities, document)
        document, ignored = self._without_system(document, output)
        jobs = self._make_jobs(body, Job(document, output, stop=tuple(body.stop or ()), extra_settings=ignored))
        head: JSONObject = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.config.model_name,
        }
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return await stream_response(request, chat_chunks(self._merge_events(jobs), head, usage))
        answers = await cancel_on_disconnect(request, self._collect(jobs))
        choices = [
            {
                "index": i,
                "message": await assistant_message(answer.parts, body.content_format == "parts"),
                "finish_reason": answer.finish.finish_reason,
                "logprobs": None,
                "settings": answer.settings,
            }
            for i, answer in enumerate(answers)
        ]
        return {**head, "object": "chat.completion", "choices": choices, "usage": chat_usage(answers)}

    async def responses(self, request: Request, body: ResponsesRequest) -> object:
        """A conversation as items in order, as in OpenAI's responses API."""
        self._check_request(request, body, body.model)
        document = await cancel_on_disconnect(request, self._build_document(request, body, "input"))
        self._log_prompt(request, document)
        supported_outputs = self.engine.info.get("outputs", ())
        if not body.tools and supported_outputs and "text" not in supported_outputs:
            raise HTTPError(400, 'this model draws: give tools [{"type": "image_generation"}]', param="tools")
        output = self._choose_output(body.modalities, document)
        document, ignored = self._without_system(document, output)
        jobs = self._make_jobs(body, Job(document, output, extra_settings=ignored))
        events = response_events(self._merge_events(jobs), body, self.config.model_name)
        if body.stream:
            return await stream_response(request, events)

        async def last_response() -> object:
            response: object = None
            async with aclosing(events):
                async for event in events:
                    response = event.get("response", response)
            return response

        return await cancel_on_disconnect(request, last_response())

    def _without_system(self, document: Document, output: str) -> tuple[Document, JSONObject]:
        """Leave system messages out where the model does not follow them.

        Returns:
            The document, and what the settings of the answer say about it.
        """
        system_text, segments = split_system_messages(document.segments)
        if system_text and (output == "image" or not self.engine.info.get("system")):
            return Document(segments), {"ignored": ["system"]}
        return document, {}

    async def _build_document(
        self, request: Request, body: protocol.ChatRequest | ResponsesRequest, field: str = "messages"
    ) -> Document:
        """Return the conversation as a document; field: name of the request's field that holds it, for errors."""
        last = max(m for m, message in enumerate(body.messages) if message.role == "user")
        if not body.messages[last].parts():
            param = f"{field}.{last}.content"
            raise HTTPError(400, "the last message is empty: say what to draw or ask", param=param)
        parts: list[tuple[Role, str | None]] = []  # a role, and a text or None for the next image
        urls, param_paths = [], []
        for m, message in enumerate(body.messages):
            role: Role = "system" if message.role == "developer" else message.role
            for kind, part, path in message.parts():
                parts.append((role, part if kind == "text" else None))
                if kind == "image":
                    urls.append(part)
                    param_paths.append(f"{field}.{m}.{path}")
        files = await self.image_loader.load_files(urls, param_paths)
        images = iter(await self.image_loader.decode(request, files, param_paths, body.n, MAX_READ_PIXELS))
        return Document(
            [
                Segment(image=next(images), role=role) if text is None else Segment(text=text, role=role)
                for role, text in parts
            ]
        )

    def _choose_output(self, modalities: Sequence[str] | None, document: Document) -> Output:
        if self.engine.unavailable_reason is not None:  # what the model can do is not known yet
            raise HTTPError(503, self.engine.unavailable_reason, code="not_ready", retry_after=1)
        supported_outputs = self.engine.info["outputs"]
        if modalities is None:
            return default_output(document, supported_outputs)
        name = "interleaved" if len(set(modalities)) == 2 else modalities[0]
        for output in supported_outputs:
            if output == name:
                return output
        message = f"this model cannot answer with {name}: it can with {' or '.join(supported_outputs)}"
        raise HTTPError(400, message, param="modalities")

    # ---------------------------------------------------------------- images

    async def generations(self, request: Request, body: protocol.GenerationRequest) -> Response | JSONObject:
        """Images of a prompt, or of a class."""
        document = Document.of(Segment(label=body.label) if body.prompt is None else Segment(text=body.prompt))
        return await self._generate_images(request, body, "image_generation", Job(document, "image"))

    async def edits(self, request: Request) -> Response | JSONObject:
        """The image changed as the prompt says, or, with a mask, redrawn in the marked area."""
        body, image, mask = await self.image_loader.parse_form(request, protocol.EditRequest)
        prompt = Segment(text=body.prompt)
        if mask is None:
            job = Job(Document.of([image, prompt]), "image")
        else:
            job = Job(Document.of(prompt), "image", base_image=image, mask=mask)
        return await self._generate_images(request, body, "image_edit", job)

    async def variations(self, request: Request) -> Response | JSONObject:
        """The image with a random share of it redrawn, with the model's own description as the prompt."""
        body, image, mask = await self.image_loader.parse_form(request, protocol.VariationRequest)
        if mask is not None:
            raise HTTPError(400, "a variation takes no mask: see /v1/images/edits", param="mask")
        self._check_request(request, body, body.model)
        question = Job(Document.of([image, "describe this picture"]), "text")
        (answer,) = await cancel_on_disconnect(request, self._collect([question]))
        caption = str(answer.parts[0]) if answer.parts else "a picture"
        job = Job(Document.of(Segment(text=caption)), "image", base_image=image, variation=body.variation)
        return await self._generate_images(request, body, "image_variation", job)

    async def _generate_images(
        self, request: Request, body: protocol.ImagesRequest, event_prefix: str, job: Job
    ) -> Response | JSONObject:
        """Answer with n images, whole or streamed; event_prefix: of the names of the stream's events."""
        self._check_request(request, body, body.model)
        store = self.image_store if body.response_format == "url" else None
        if body.response_format == "url" and store is None:
            message = "this server keeps no pictures (--images-folder): ask for b64_json"
            raise HTTPError(400, message, param="response_format")
        jobs = self._make_jobs(body, job)
        if store is not None:
            await asyncio.to_thread(store.check_space, body.n)
        self._log_prompt(request, job.prompt)
        format, compression = body.output_format, body.output_compression
        if body.stream:
            events = self._merge_events(jobs)
            return await stream_response(
                request, image_chunks(events, self.config.model_name, event_prefix, format, compression)
            )
        answers = await cancel_on_disconnect(request, self._collect(jobs))
        data: list[JSONObject] = []
        for answer in answers:
            file = await asyncio.to_thread(pictures.encode_image, answer.images[0], format, compression)
            if store is not None:
                name = await asyncio.to_thread(store.save, file, format)
                data.append({"url": str(request.url_for("picture", name=name)), "settings": answer.settings})
            else:
                data.append({"b64_json": base64.b64encode(file).decode(), "settings": answer.settings})
        return {
            "created": int(time.time()),
            "model": self.config.model_name,
            "data": data,
            "size": "{}x{}".format(*answers[0].images[0].size),
            "output_format": format,
            "usage": images_usage(answers),
        }

    async def saved_image(self, name: str) -> Response:
        """An image that was requested by URL."""
        path = None if self.image_store is None else self.image_store.find(name)
        if path is None:
            raise HTTPError(404, "no such picture")
        return FileResponse(path)

    # ---------------------------------------------------------------- jobs

    def _make_jobs(self, body: protocol.GenerationFields, job: Job) -> list[Job]:
        """Return a copy of the job for each of the n answers, with the options of the request and a seed of its own."""
        if body.n > self.engine.max_jobs:
            message = (
                f"n is {body.n}, and this server makes {self.engine.max_jobs} answers at a time (--queue): "
                "ask for fewer"
            )
            raise HTTPError(400, message, param="n")
        first_seed = secrets.randbelow(1 << 31) if body.seed is None else body.seed
        options, info, extra_settings = body.options(), self.engine.info, job.extra_settings
        if body.size in protocol.COMMON_SIZES and info.get("sizes") == "this one":
            options.pop("size", None)
            extra_settings = extra_settings | {"size": "{0}x{0}".format(info["image_size"])}
        job = replace(
            job, num_previews=body.partial_images, num_candidates=body.candidates, extra_settings=extra_settings
        )
        return [replace(job, options={**options, "seed": offset_seed(first_seed, i)}) for i in range(body.n)]

    async def _merge_events(self, jobs: list[Job]) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield the events of all jobs as they come, each with the index of its job.

        Closing the generator drops the jobs that still run.

        Raises:
            HTTPError: a job was rejected or failed, or the answer takes too long.
        """
        queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

        async def forward_events(i: int, job: Job) -> None:
            try:
                async with aclosing(self.engine.run_job(job)) as events:
                    async for event in events:
                        queue.put_nowait((i, event))
                queue.put_nowait((i, None))
            except Exception as error:
                queue.put_nowait((i, error))

        tasks = [asyncio.create_task(forward_events(i, job)) for i, job in enumerate(jobs)]
        num_running, start, has_part = len(jobs), time.perf_counter(), False
        try:
            while num_running:
                remaining_seconds = start + self.config.request_timeout - time.perf_counter()
                i, event = await asyncio.wait_for(queue.get(), remaining_seconds)
                if event is None:
                    num_running -= 1
                    continue
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, (Rejected, Error)):
                    raise _job_error(event)
                if isinstance(event, Started):
                    event = replace(event, settings=event.settings | jobs[i].extra_settings)
                if isinstance(event, Part) and not has_part:
                    self.metrics.first_part_seconds.observe(time.perf_counter() - start)
                    has_part = True
                self.metrics.count(event)
                yield i, event
        except TimeoutError:
            message = f"the answer took longer than {self.config.request_timeout:g} s"
            raise HTTPError(504, message, code="timeout") from None
        except QueueFull as error:
            raise HTTPError(429, str(error), code="busy", retry_after=error.retry_after) from None
        except ModelUnavailable as error:
            raise HTTPError(503, str(error), code="not_ready", retry_after=1) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _collect(self, jobs: list[Job]) -> list[AnswerBuilder]:
        """Run the jobs and return their whole answers."""
        answers = [AnswerBuilder() for _ in jobs]
        async with aclosing(self._merge_events(jobs)) as events:
            async for i, event in events:
                answers[i].add_event(event)
        return answers

    def _check_request(self, request: Request, body: protocol.GenerationFields, model: str | None) -> None:
        """Check the model's name, and note for the response's headers whether the request has old names."""
        request.scope["state"]["old_names"] = body.uses_old_names
        self._check_model(model)

    def _check_model(self, name: str | None) -> None:
        served_name = self.config.model_name
        if name is not None and name != served_name:
            message = f"no model {name!r}: {served_name!r} is served"
            raise HTTPError(404, message, param="model", code="model_not_found")

    def _log_prompt(self, request: Request, document: Document) -> None:
        if self.config.log_prompts:
            request.scope["state"]["log"] = {"prompt": [_log_entry(segment) for segment in document.segments]}


def _job_error(event: Rejected | Error) -> HTTPError:
    if isinstance(event, Rejected):
        return HTTPError(400, event.message)
    if not event.retryable:
        return HTTPError(500, event.message)
    return HTTPError(503, event.message, code="try_again", retry_after=1)


def _log_entry(segment: Segment) -> JSONObject:
    """Return a part of a prompt as it is logged: its text or label, or that it is an image."""
    if segment.text is not None:
        return {"role": segment.role, "text": segment.text}
    if segment.label is not None:
        return {"role": segment.role, "label": segment.label}
    return {"role": segment.role, "image": True}
