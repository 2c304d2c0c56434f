"""The worker in the model's process: dropped jobs, failures before an answer, freed jobs."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from unigen.document import Document
from unigen.inference.engine import Engine
from unigen.serving.jobs import Error, Finished, Job, Part, Ready, Started, Stats
from unigen.serving.process import EventSender
from unigen.serving.worker import BatchedWorker, SequentialWorker, run_worker


class Pipeline:
    """An engine in the place of a pipeline: it repeats each prompt."""

    outputs, batched = ("text",), False

    def default_options(self, output: str, given: dict[str, Any]) -> dict[str, Any]:
        return {}

    def info(self) -> dict[str, Any]:
        return {}

    def stream(self, prompt: Document, **_: Any) -> Iterator[Any]:
        yield prompt.segments[-1].text


@pytest.mark.parametrize("waits", [False, True])
def test_job_can_be_dropped_when_nothing_waits(waits: bool) -> None:
    worker = SequentialWorker(Pipeline())
    if waits:
        worker.submit(0, Job(Document.of("a"), "text"))
    worker.abort(0)
    assert not list(worker.step()) and not worker.busy
    worker.submit(1, Job(Document.of("b"), "text"))
    assert [type(event) for _, event in worker.step()] == [Started, Part]


@pytest.fixture
def worker_pipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The server's ends of the pipes of a worker that runs the fake engine in a thread."""
    monkeypatch.setattr("unigen.loading.load", lambda **_: Pipeline())
    (receiver, asks), (heard, tells) = multiprocessing.Pipe(duplex=False), multiprocessing.Pipe(duplex=False)
    thread = threading.Thread(target=run_worker, args=(receiver, EventSender(tells), {}, 1), daemon=True)
    thread.start()
    assert isinstance(heard.recv()[1], Ready)
    yield asks, heard
    asks.close()
    thread.join(60)
    assert not thread.is_alive()


def until(heard: Any, kind: type) -> list[tuple[int | None, Any]]:
    """The events up to the first one of this type."""
    events: list[Any] = []
    while not events or not isinstance(events[-1][1], kind):
        assert heard.poll(60), events
        events.append(heard.recv())
    return events


def test_disconnect_does_not_end_the_worker(worker_pipes: Any) -> None:
    """Its job has finished when the message comes that drops it."""
    send, heard = worker_pipes
    send.send((0, None))
    until(heard, Stats)
    send.send((1, Job(Document.of("a"), "text")))
    assert {number for number, _ in until(heard, Finished)} == {1}


def test_finished_job_is_freed(worker_pipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    submit = SequentialWorker.submit

    def noted(self: SequentialWorker, job_id: int, job: Job) -> None:
        asked.append(weakref.ref(job))
        submit(self, job_id, job)

    monkeypatch.setattr(SequentialWorker, "submit", noted)
    send, heard = worker_pipes
    send.send((0, Job(Document.of([Image.new("RGB", (4, 4)), "a"]), "text")))
    until(heard, Finished)
    until(heard, Stats)  # said after the step that ended it
    gc.collect()
    assert len(asked) == 1 and asked[0]() is None


def test_failure_before_an_answer_affects_its_job_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For example on a GPU without memory for its images, at any of its candidates: their sequences are aborted, others
    continue."""
    worker = BatchedWorker(engine, 8)
    worker.submit(0, Job(Document.of("a dog"), "text", {"max_tokens": 4}))
    list(worker.step())
    rows, add = set(worker.active_jobs), worker.scheduler.add_request
    left = [None, RuntimeError("CUDA out of memory")]

    def fail(request: Any) -> int:
        if error := left.pop(0):
            raise error
        return add(request)

    monkeypatch.setattr(worker.scheduler, "add_request", fail)
    worker.submit(1, Job(Document.of("a horse"), "image", num_candidates=2))
    events = [event for number, event in worker.step() if number == 1]
    assert [type(event) for event in events] == [Error] and "RuntimeError" in events[0].message
    assert "CUDA out of memory" in capfd.readouterr().err
    assert set(worker.active_jobs) <= rows and len(worker.scheduler) == len(worker.active_jobs)
    monkeypatch.setattr(worker.scheduler, "add_request", add)
    worker.submit(2, Job(Document.of("a horse"), "text", {"max_tokens": 4}))
    while worker.busy:
        events += [event for number, event in worker.step() if number == 2]
    assert isinstance(events[-1], Finished)
