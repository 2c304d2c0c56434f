"""`unigen serve`: the ASGI app with its routes, and uvicorn that serves it.

unigen serve --model unigen-tiny --port 8000
curl localhost:8000/v1/images/generations -H 'content-type: application/json' -d '{"prompt": "two apples"}'
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import json
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from unigen.serving import protocol
from unigen.serving.body import BoundedRoute
from unigen.serving.config import ServerConfig
from unigen.serving.connection import TimedConnection
from unigen.serving.errors import ErrorResponse, add_error_handlers
from unigen.serving.form import form_schema
from unigen.serving.jobs import JobEngine
from unigen.serving.middleware import GuardMiddleware
from unigen.serving.page import add_page
from unigen.serving.process import EngineProcess
from unigen.serving.server import Server
from unigen.serving.uploads import MIN_FREE_BYTES_PER_IMAGE, check_disk_space

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("unigen.serving")
STEP_TIMEOUT_MARGIN = 30.0
"""Seconds that a step of the model may take beyond the time of an answer before the model's process is restarted."""


def create_app(engine: JobEngine, config: ServerConfig) -> FastAPI:
    """Build the ASGI app.

    Args:
        engine: runs the jobs, such as `EngineProcess`; the app's lifespan enters and leaves it.
        config: settings of the server.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine, server.decoder:
            await asyncio.to_thread(app.openapi)  # takes seconds, else at the first request for it
            yield

    server = Server(engine, config)
    app = FastAPI(
        title="unigen",
        summary="Text and pictures behind the OpenAI API",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = BoundedRoute
    _add_routes(app, server)
    add_page(app)
    app.add_middleware(GuardMiddleware, limits=config.limits, metrics=server.metrics)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    """Add the API. The name of a route is part of its operationId in the OpenAPI document, which clients keep."""
    edit_schema = form_schema(protocol.EditRequest, "image", "mask")
    variation_schema = form_schema(protocol.VariationRequest, "image")
    routes: list[tuple[str, str, str, Callable[..., object], dict[str, object] | None]] = [
        ("GET", "/health", "health", server.health, None),
        ("GET", "/ready", "ready", server.ready, None),
        ("GET", "/metrics", "metric", server.prometheus_metrics, None),
        ("GET", "/v1/models", "models", server.models, None),
        ("GET", "/v1/models/{name:path}", "model", server.model, None),
        ("POST", "/v1/chat/completions", "chat", server.chat, None),
        ("POST", "/v1/responses", "responses", server.responses, None),
        ("POST", "/v1/images/generations", "generations", server.generations, None),
        ("POST", "/v1/images/edits", "edits", server.edits, edit_schema),
        ("POST", "/v1/images/variations", "variations", server.variations, variation_schema),
        ("GET", "/images/{name}", "picture", server.saved_image, None),
    ]
    for method, path, name, handler, schema in routes:
        app.add_api_route(
            path,
            handler,
            methods=[method],
            name=name,
            response_model=None,
            openapi_extra=schema,
            responses={status: {"model": ErrorResponse, "description": "What is wrong"} for status in ("4XX", "5XX")},
        )
    endpoints = [f"{method} {path}" for method, path, *_ in routes if path.startswith("/v1/") and "{" not in path]
    add_error_handlers(app, endpoints)


def uvicorn_config(app: ASGIApp, config: ServerConfig, host: str, port: int) -> uvicorn.Config:
    """Return how uvicorn serves the app: with limits of time, and with proxy headers of trusted proxies alone.

    Args:
        app: the app.
        config: settings of the server.
        host: address that is listened on.
        port: port that is listened on.
    """
    import uvicorn

    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(config.request_timeout),
        server_header=False,
        http=TimedConnection,
        ws="none",
        proxy_headers=bool(config.trusted_proxies),
        forwarded_allow_ips=[str(ipaddress.ip_network(proxy, strict=False)) for proxy in config.trusted_proxies],
    )


def run(
    load_options: Mapping[str, object], config: ServerConfig, host: str, port: int, max_sequences: int, max_jobs: int
) -> None:
    """Serve until SIGINT or SIGTERM; answers that are running then are finished first.

    Args:
        load_options: keywords of `unigen.load`.
        config: settings of the server.
        host: address that is listened on.
        port: port that is listened on.
        max_sequences: sequences that are generated at a time.
        max_jobs: answers that may run and wait.

    Raises:
        ValueError: the model cannot be loaded, or the address is not available.
    """
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.images_folder is not None:
        check_disk_space(config.images_folder, MIN_FREE_BYTES_PER_IMAGE)
    engine = EngineProcess(
        load_options,
        max_sequences,
        max_jobs,
        heartbeat_timeout=config.heartbeat_timeout,
        step_timeout=config.request_timeout + STEP_TIMEOUT_MARGIN,
        unavailable_timeout=config.unavailable_timeout,
    )
    server = uvicorn.Server(uvicorn_config(create_app(engine, config), config, host, port))

    async def watch_startup() -> None:
        await engine.load_attempted.wait()
        if engine.load_error:
            server.should_exit = True
        else:
            log.info(json.dumps({"ready": config.model_name, "address": f"http://{host}:{port}"}))

    async def serve(sock: socket.socket) -> None:
        gc.freeze()  # else every request with many small values has the collector walk through all imported objects
        startup_task = asyncio.create_task(watch_startup())
        try:
            await server.serve([sock])
        finally:
            startup_task.cancel()

    with bind_socket(host, port) as sock:
        asyncio.run(serve(sock))
    if engine.load_error:
        raise ValueError(engine.load_error)


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address.

    Raises:
        ValueError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
    return sock
