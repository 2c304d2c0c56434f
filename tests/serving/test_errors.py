"""Status of an answer that fails: 503 if a retry may succeed, 500 if not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from tests.serving.test_fuzz import FakeImageEngine
from unigen.document import Document
from unigen.inference.engine import Engine
from unigen.serving.app import create_app
from unigen.serving.config import ServerConfig
from unigen.serving.jobs import Error, Event, Job
from unigen.serving.worker import BatchedWorker


@pytest.mark.parametrize(("retryable", "status"), [(True, 503), (False, 500)])
def test_status_says_whether_to_retry(retryable: bool, status: int) -> None:
    class Failing(FakeImageEngine):
        async def run_job(self, job: Job) -> AsyncGenerator[Event, None]:
            yield Error("scores of this model are not finite", retryable)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Failing(), ServerConfig(model_name="m")))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/v1/images/generations", json={"model": "m", "prompt": "a"})

    answer = asyncio.run(ask())
    error = answer.json()["error"]
    assert answer.status_code == status and error["message"] == "scores of this model are not finite"
    assert ("retry-after" in answer.headers) == retryable and (error["code"] == "try_again") == retryable


def test_non_finite_numbers_are_not_retryable(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.model.cached_hidden_states
    monkeypatch.setattr(engine.model, "cached_hidden_states", lambda *inputs: step(*inputs) * float("nan"))
    worker, events = BatchedWorker(engine, 4), list[Any]()
    worker.submit(0, Job(Document.of("a dog"), "image"))
    while worker.busy:
        events += [event for _, event in worker.step()]
    assert isinstance(events[-1], Error) and not events[-1].retryable and "not finite" in events[-1].message
