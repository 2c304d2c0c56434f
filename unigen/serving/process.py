"""The model's process seen from the server: jobs in, their events out, one life after another.

    async with EngineProcess({"name": "unigen-tiny"}) as engine:
        await engine.ready.wait()
        async for event in engine.answer(job): ...

Leaving the loop drops the job within a step. A process that dies, or sends no heartbeat, or stays in one step for
longer than any answer may take, fails the jobs that it had and is started again, as often as is needed, with pauses
between; what it has started ends with it.
Knows pipes and processes; does not depend on HTTP, and what a job asks for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from unigen.serving.jobs import Error, Event, Finished, Heartbeat, Job, Ready, Rejected, Started, Stats

log = logging.getLogger("unigen.serving")

MAX_RESTART_DELAY = 30.0
"""Seconds at most before a process that died is started again; the first pause is one second, each next twice as long
until a job has been answered."""
START_METHOD = "spawn"
HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats."""
MAX_STARTUP_TICKS = 600
"""After which a process that has just been started must have sent its first heartbeat: it imports what it needs."""
EMPTY_STATS = Stats(0, 0, 0, 0, 0, 0.0)


class EventSender:
    """The pipe to the server, for the thread that answers and the one that sends heartbeats. step: when the step began
    that the model is in, None between steps."""

    def __init__(self, pipe: Any) -> None:
        self.step: float | None = None
        self._pipe, self._lock = pipe, threading.Lock()

    def send(self, message: Any) -> None:
        with self._lock:
            self._pipe.send(message)

    def send_heartbeats(self) -> None:
        """Heartbeats until the server is gone."""
        try:
            while True:
                step = self.step
                self.send((None, Heartbeat(0.0 if step is None else time.monotonic() - step)))
                time.sleep(HEARTBEAT_INTERVAL)
        except OSError:
            pass


def _worker_main(jobs: Any, events: Any, *arguments: Any) -> None:
    """In the new process, which alone loads what models need. It may start others, as vLLM does for several GPUs; they
    are a group, which ends with the server, however that ends."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the server, which closes the pipe
    os.environ["TQDM_DISABLE"] = "1"  # bars have no place in a log
    multiprocessing.current_process().daemon = False  # else it could start none
    threading.Thread(target=_exit_with_parent, args=(multiprocessing.parent_process(),), daemon=True).start()
    sender = EventSender(events)
    threading.Thread(target=sender.send_heartbeats, daemon=True).start()
    from unigen.serving.worker import run_worker

    run_worker(jobs, sender, *arguments)


def _exit_with_parent(parent: Any) -> None:
    parent.join()
    os.killpg(0, signal.SIGKILL)


class QueueFull(Exception):
    """All that may wait are waiting. seconds: after which to ask again."""

    def __init__(self, seconds: int) -> None:
        super().__init__("the server is busy: ask again later")
        self.seconds = seconds


class ModelUnavailable(Exception):
    """The model is being started (again)."""


class EngineProcess:
    """The model's process.

    Args:
        source: of `unigen.load`.
        slots: sequences that are generated at a time.
        most: jobs that may run and wait.
        silence: seconds without a heartbeat after which the process is taken to hang.
        longest_step: seconds of one step after which it is taken to hang; None is any.
        patience: seconds without a model, since its process ended, after which `alive` is false.
        target: what the process runs.
    """

    def __init__(
        self,
        source: dict[str, Any],
        slots: int = 32,
        most: int = 128,
        *,
        silence: float = 30.0,
        longest_step: float | None = None,
        patience: float = 300.0,
        target: Callable[..., None] = _worker_main,
    ) -> None:
        self.source, self.slots, self.most = source, slots, most
        self.silence, self.longest_step, self.patience, self.target = silence, longest_step, patience, target
        self.info: dict[str, Any] = {}
        self.ready, self.load_attempted = asyncio.Event(), asyncio.Event()
        self.load_error: str | None = None
        """Why the model could not be loaded at first; then it is not tried again."""
        self.reload_error: str | None = None
        """Why it could not be loaded again, where it could not; that is tried again."""
        self.load = EMPTY_STATS
        self.starts = 0
        self._job_ids = itertools.count()
        self._jobs: dict[int, asyncio.Queue[Event]] = {}
        self._restart_delay, self._mean_job_seconds = 1.0, 1.0
        self._closing = False
        self._process: Any = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._restart_task: asyncio.Task[None] | None = None
        self._down_since: float | None = None
        self._is_running, self._silent_ticks, self._has_heartbeat, self._step_seconds = (
            False,
            0,
            False,
            0.0,
        )  # silent: ticks without a message

    async def __aenter__(self) -> EngineProcess:
        self._loop = asyncio.get_running_loop()
        self._start()
        self._watch_task = self._loop.create_task(self._watch())
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._closing = True
        self._watch_task.cancel()
        if self._restart_task:
            self._restart_task.cancel()
        process = self._process
        self._outbox.put(None)
        await asyncio.to_thread(process.join, 5)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)
        self._kill_group()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def down(self) -> str | None:
        """Why nothing can be answered now; None where it can."""
        if self.ready.is_set():
            return None
        retry_message = f"the model could not be loaded again ({self.reload_error}): that is tried again"
        return self.load_error or (retry_message if self.reload_error else "the model is being loaded: ask again soon")

    @property
    def alive(self) -> bool:
        """Is the model there, or may it still come back? No longer `patience` seconds after its process ended."""
        return self._down_since is None or self._loop.time() - self._down_since < self.patience

    async def answer(self, job: Job) -> AsyncGenerator[Event, None]:
        """The job's events, the last one `Finished`, `Rejected` or `Error`. Raises `QueueFull` and
        `ModelUnavailable`."""
        if self.down is not None:
            raise ModelUnavailable(self.down)
        if len(self._jobs) >= self.most:
            raise QueueFull(max(1, round(self._mean_job_seconds * len(self._jobs) / self.slots)))
        number, events = next(self._job_ids), asyncio.Queue[Event]()
        self._jobs[number] = events
        start, is_final = self._loop.time(), False
        self._outbox.put((number, job))
        try:
            while not is_final:
                event = await events.get()
                is_final = isinstance(event, (Finished, Rejected, Error))
                yield event
            if isinstance(event, Finished):
                self._mean_job_seconds += 0.1 * (self._loop.time() - start - self._mean_job_seconds)
        finally:
            if self._jobs.pop(number, None) and not is_final:
                self._outbox.put((number, None))

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        (jobs, jobs_end), (events, events_end) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        self._process = context.Process(
            target=self.target, args=(jobs, events_end, self.source, self.slots), daemon=True
        )
        self._process.start()
        self.starts += 1
        self._is_running, self._silent_ticks, self._has_heartbeat, self._step_seconds = True, 0, False, 0.0
        jobs.close()
        events_end.close()
        self._outbox = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(jobs_end, self._outbox), daemon=True).start()
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    @staticmethod
    def _write(asks: Any, outbox: queue.SimpleQueue[Any]) -> None:
        """In a thread of its own, since a pipe that is full makes one wait: jobs, until None or the process is gone."""
        with asks:
            try:
                while (message := outbox.get()) is not None:
                    asks.send(message)
                    del message  # else its pictures are held until the next job comes
            except OSError:
                pass

    def _read(self, events: Any) -> None:
        """In a thread of its own: what the process says, until it is gone."""
        with events:
            while True:
                try:
                    number, event = events.recv()
                except (EOFError, OSError):
                    break
                self._call_in_loop(self._heard, number, event)
        self._call_in_loop(self._on_exit)

    def _call_in_loop(self, what: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the loop is closed
            pass

    def _heard(self, number: int | None, event: Event) -> None:
        self._silent_ticks = 0
        if isinstance(event, Heartbeat):
            self._has_heartbeat, self._step_seconds = True, event.step
        elif isinstance(event, Ready):
            self.info, self.reload_error, self._down_since = event.info, None, None
            self.ready.set()
            self.load_attempted.set()
        elif isinstance(event, Stats):
            self.load = event
        elif number is None:
            assert isinstance(event, Rejected)
            if self.load_attempted.is_set():
                self.reload_error = event.message
                log.error("the model could not be loaded again: %s", event.message)
            else:
                self.load_error = event.message
                self.load_attempted.set()
        elif number in self._jobs:
            self._jobs[number].put_nowait(event)
            if isinstance(event, Started):
                self._restart_delay = 1.0

    def _on_exit(self) -> None:
        self.ready.clear()
        self._is_running, self.load = False, EMPTY_STATS
        self._outbox.put(None)
        if self._down_since is None:
            self._down_since = self._loop.time()
        for events in self._jobs.values():
            events.put_nowait(Error("the model's process ended while it answered: ask again"))
        if self._closing or self.load_error:
            return
        self._kill_group()
        log.error(
            "the model's process ended (code %s); started again in %.0f s", self._process.exitcode, self._restart_delay
        )
        self._restart_task = self._loop.create_task(self._restart())

    def _kill_group(self) -> None:
        """End what the process has started and left."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # there is nothing, or only what has ended
            pass

    async def _restart(self) -> None:
        while not self._closing:
            await asyncio.sleep(self._restart_delay)
            self._restart_delay = min(2 * self._restart_delay, MAX_RESTART_DELAY)
            try:
                self._start()
                return
            except OSError as error:  # no memory or no process to be had now
                self.reload_error = str(error)
                log.error(
                    "the model's process cannot be started: %s; tried again in %.0f s", error, self._restart_delay
                )

    async def _watch(self) -> None:
        """End a process that hangs. Counted in ticks of the server's own, which may have been stopped itself."""
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL)
            if not self._is_running:
                continue
            self._silent_ticks += 1
            limit = self.silence / HEARTBEAT_INTERVAL if self._has_heartbeat else MAX_STARTUP_TICKS
            if self._silent_ticks > limit:
                self._kill(f"has sent no heartbeat for {self._silent_ticks * HEARTBEAT_INTERVAL:.0f} s")
            elif self.longest_step is not None and self._step_seconds > self.longest_step:
                self._kill(f"has been in one step for {self._step_seconds:.0f} s")

    def _kill(self, why: str) -> None:
        log.error("the model's process %s: it is ended", why)
        self._is_running = False
        self._kill_group()
        self._process.kill()
