"""The model's process ends, hangs and is restarted; each test gives a script to a fake worker."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from unigen.document import Document
from unigen.media.output import data_uri
from unigen.serving import server
from unigen.serving.app import create_app
from unigen.serving.config import ServerConfig
from unigen.serving.decoder import ImageDecoder
from unigen.serving.jobs import Error, Finished, Heartbeat, Job, Ready, Rejected, Started, Stats
from unigen.serving.metrics import Metrics
from unigen.serving.process import EngineProcess, ModelUnavailable

JOB = Job(Document.of("a"), "text")


def is_running(jobs: Any, events: Any, source: dict[str, Any], slots: int) -> None:
    """A fake worker. Each letter of `lives` is one start: r(ejects), d(ies), s(ilent), l(ong step), g(ood); the last is
    good."""
    os.setsid()
    count = Path(source["count"])
    life = len(count.read_text())
    count.write_text("x" * (life + 1))
    what = source["lives"][life] if life < len(source["lives"]) else "g"
    if what == "r":
        events.send((None, Rejected("no memory")))
        return
    if what == "d":
        os._exit(1)
    events.send((None, Ready({})))
    events.send((None, Stats(3, 2, 1, 5, 7, 0.5)))
    began = time.monotonic()
    while what != "s":
        events.send((None, Heartbeat(time.monotonic() - began if what == "l" else 0.0)))
        while jobs.poll(0.05):
            number, job = jobs.recv()
            if job is not None and what == "g":
                for event in (Started({}), Finished("stop")):
                    events.send((number, event))
    time.sleep(600)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unigen.serving.process.HEARTBEAT_INTERVAL", 0.05)
    monkeypatch.setattr("unigen.serving.process.PROCESS_CONTEXT", multiprocessing.get_context("forkserver"))
    multiprocessing.set_forkserver_preload(["unigen.serving.metrics", "unigen.serving.process"])


def with_engine(tmp_path: Path, kinds: str, test: Callable[[EngineProcess], Any], **options: Any) -> None:
    (tmp_path / "count").write_text("")

    async def run() -> None:
        source = {"count": str(tmp_path / "count"), "lives": kinds}
        async with EngineProcess(source, target=is_running, **options) as engine:
            engine._restart_delay = 0.01
            await asyncio.wait_for(test(engine), 120)

    asyncio.run(run())


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_failed_restart_is_retried(tmp_path: Path) -> None:
    """It fails to load, dies while loading, and succeeds; the statistics of the dead process are reset at once."""

    async def test(engine: EngineProcess) -> None:
        await engine.ready.wait()
        await until(lambda: engine.stats.num_running == 3)
        os.kill(engine._process.pid, signal.SIGKILL)
        await until(lambda: not engine.ready.is_set())
        assert engine.stats == Stats(0, 0, 0, 0, 0, 0.0)
        assert b"unigen_jobs_running 0.0" in Metrics(engine).render()
        await until(lambda: engine.reload_error is not None)
        assert "no memory" in str(engine.unavailable_reason) and engine.load_error is None
        with pytest.raises(ModelUnavailable, match="no memory"):
            await anext(engine.run_job(JOB))
        await engine.ready.wait()
        assert engine.num_starts == 4 and engine.unavailable_reason is None and engine.is_alive
        assert [type(event) async for event in engine.run_job(JOB)] == [Started, Finished]

    with_engine(tmp_path, "grd", test)


def test_failed_process_start_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: EngineProcess) -> None:
        await engine.ready.wait()
        start, tries = engine._start, []

        def fail() -> None:
            tries.append(1)
            if len(tries) < 3:
                raise OSError(12, "Cannot allocate memory")
            start()

        monkeypatch.setattr(engine, "_start", fail)
        os.kill(engine._process.pid, signal.SIGKILL)
        await until(lambda: not engine.ready.is_set())
        await engine.ready.wait()
        assert len(tries) == 3
        assert engine._restart_delay == pytest.approx(8 * 0.01)  # doubled each time

    with_engine(tmp_path, "", test)


def test_failed_first_load_is_not_retried(tmp_path: Path) -> None:
    async def test(engine: EngineProcess) -> None:
        await engine.load_attempted.wait()
        assert engine.load_error == "no memory" and engine.unavailable_reason == "no memory"
        await until(lambda: not engine._process.is_alive())
        await asyncio.sleep(0.2)
        assert engine.num_starts == 1

    with_engine(tmp_path, "r", test)


def test_is_alive_ends_after_the_unavailable_timeout(tmp_path: Path) -> None:
    async def test(engine: EngineProcess) -> None:
        await engine.ready.wait()
        assert engine.is_alive
        engine._restart_delay = 0.5  # the next one is refused: away for longer than the patience
        os.kill(engine._process.pid, signal.SIGKILL)
        await until(lambda: not engine.is_alive)
        await engine.ready.wait()
        assert engine.is_alive, "and it is alive again when the model is back"

    with_engine(tmp_path, "gr", test, unavailable_timeout=0.3)


@pytest.mark.parametrize(("kind", "options"), [("s", {"heartbeat_timeout": 0.5}), ("l", {"step_timeout": 0.5})])
def test_hanging_process_is_restarted(tmp_path: Path, kind: str, options: dict[str, float]) -> None:
    """It sends nothing, or stays in one step; its jobs fail."""

    async def test(engine: EngineProcess) -> None:
        await engine.ready.wait()
        engine._has_heartbeat = True  # as of a process that has sent one
        (event,) = [event async for event in engine.run_job(JOB)]
        assert isinstance(event, Error)
        await engine.ready.wait()
        assert engine.num_starts == 2
        assert [type(event) async for event in engine.run_job(JOB)] == [Started, Finished]

    with_engine(tmp_path, kind, test, **options)


def test_stopped_process_is_restarted(tmp_path: Path) -> None:
    async def test(engine: EngineProcess) -> None:
        await engine.ready.wait()
        await until(lambda: engine._has_heartbeat)
        os.kill(engine._process.pid, signal.SIGSTOP)
        await until(lambda: engine.num_starts == 2)
        await engine.ready.wait()

    with_engine(tmp_path, "", test, heartbeat_timeout=1.0)


def test_long_step_with_heartbeats_is_no_hang(tmp_path: Path) -> None:
    """A step of a diffusers pipeline may take minutes."""

    async def test(engine: EngineProcess) -> None:
        await engine.ready.wait()
        await until(lambda: engine._step_seconds > 0.5)
        assert engine.num_starts == 1 and engine.ready.is_set()

    with_engine(tmp_path, "l", test, heartbeat_timeout=5.0, step_timeout=600.0)


def test_images_of_a_finished_job_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without further requests: otherwise the server would reach its limit and reject the next ones."""
    decoder = ImageDecoder()
    monkeypatch.setattr(server, "ImageDecoder", lambda: decoder)
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_uri(Image.new("RGB", (40, 40)))}}]
    parts += [{"type": "text", "text": "what is it?"}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "modalities": ["text"]}

    async def test(engine: EngineProcess) -> None:
        await engine.ready.wait()
        engine.info = {"outputs": ["text"]}
        transport = httpx.ASGITransport(create_app(engine, ServerConfig(model_name="m")))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        gc.collect()
        assert decoder.held_pixels == 0

    asked = []
    read = decoder.decode

    async def noted(*given: Any) -> Any:
        found = await read(*given)
        asked.append(decoder.held_pixels)
        return found

    monkeypatch.setattr(decoder, "decode", noted)
    try:
        with_engine(tmp_path, "", test)
    finally:
        asyncio.run(decoder.__aexit__())
    assert asked == [1600]
