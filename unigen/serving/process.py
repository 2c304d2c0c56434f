"""The model's process as the server sees it: jobs go in, their events come out, and it is restarted when it dies.

    async with EngineProcess({"name": "unigen-tiny"}) as engine:
        await engine.ready.wait()
        async for event in engine.run_job(job): ...

Leaving the loop drops the job within one step. A process that dies, sends no heartbeat, or stays in one step for longer
than an answer may take fails its jobs and is restarted, as often as needed, with pauses between the starts. Processes
that it has started end with it.

Does not depend on: HTTP, the contents of a job.
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
from collections.abc import AsyncGenerator, Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import TypeAlias, TypeVarTuple

from unigen.serving.jobs import Error, Event, Finished, Heartbeat, Job, Ready, Rejected, ServedModelInfo, Started, Stats

log = logging.getLogger("unigen.serving")

MAX_RESTART_DELAY = 30.0
"""Seconds at most before a process that died is restarted. The first pause is one second, and each next one is twice as
long until a job has started."""
PROCESS_CONTEXT: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats."""
MAX_STARTUP_TICKS = 600
"""Heartbeat intervals within which a new process must send its first heartbeat: it imports packages before."""
EMPTY_STATS = Stats(0, 0, 0, 0, 0, 0.0)
Ts = TypeVarTuple("Ts")
JobMessage: TypeAlias = tuple[int, Job | None]
"""A job with its id; None instead of the job drops it."""
EventMessage: TypeAlias = tuple[int | None, Event]
"""An event with the id of its job; None for an event of the process."""


class EventSender:
    """The pipe to the server, shared by the thread that runs the model and the one that sends heartbeats.

    Args:
        pipe: the end of the process.
    """

    def __init__(self, pipe: Connection) -> None:
        self.step: float | None = None
        """`time.monotonic` when the model's present step began; None between steps."""
        self._pipe, self._lock = pipe, threading.Lock()

    def send(self, message: EventMessage) -> None:
        """Send one event.

        Raises:
            OSError: the server is gone.
        """
        with self._lock:
            self._pipe.send(message)

    def send_heartbeats(self) -> None:
        """Send heartbeats until the server is gone."""
        try:
            while True:
                started_at = self.step
                self.send((None, Heartbeat(0.0 if started_at is None else time.monotonic() - started_at)))
                time.sleep(HEARTBEAT_INTERVAL)
        except OSError:
            pass


def _worker_main(jobs: Connection, events: Connection, load_options: Mapping[str, object], max_sequences: int) -> None:
    """Run the worker in the new process, which alone imports what models need.

    It may start further processes, as vLLM does for several GPUs. They form a process group, which is killed when the
    server ends, in whatever way it ends.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles interrupts and closes the pipe
    os.environ["TQDM_DISABLE"] = "1"  # no progress bars in a log
    multiprocessing.current_process().daemon = False  # a daemon may not start processes
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    sender = EventSender(events)
    threading.Thread(target=sender.send_heartbeats, daemon=True).start()
    from unigen.serving.worker import run_worker

    run_worker(jobs, sender, dict(load_options), max_sequences)


def _exit_with_parent(parent: BaseProcess) -> None:
    parent.join()
    os.killpg(0, signal.SIGKILL)


class QueueFull(Exception):
    """As many jobs wait as may wait.

    Args:
        retry_after: seconds after which to try again.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__("the server is busy: ask again later")
        self.retry_after = retry_after


class ModelUnavailable(Exception):
    """The model is being loaded, for the first time or again."""


class EngineProcess:
    """The model's process.

    Args:
        load_options: keywords of `unigen.load`.
        max_sequences: sequences that are generated at a time.
        max_jobs: jobs that may run and wait.
        heartbeat_timeout: seconds without a heartbeat after which the process counts as hanging.
        step_timeout: seconds of one step after which the process counts as hanging; None is unlimited.
        unavailable_timeout: seconds after the end of the process after which `is_alive` is false without a new model.
        target: what the process runs.
    """

    def __init__(
        self,
        load_options: Mapping[str, object],
        max_sequences: int = 32,
        max_jobs: int = 128,
        *,
        heartbeat_timeout: float = 30.0,
        step_timeout: float | None = None,
        unavailable_timeout: float = 300.0,
        target: Callable[[Connection, Connection, Mapping[str, object], int], None] = _worker_main,
    ) -> None:
        self.load_options, self.max_sequences, self.max_jobs = load_options, max_sequences, max_jobs
        self.heartbeat_timeout, self.step_timeout = heartbeat_timeout, step_timeout
        self.unavailable_timeout, self.target = unavailable_timeout, target
        self.info: ServedModelInfo = {}
        self.ready, self.load_attempted = asyncio.Event(), asyncio.Event()
        self.load_error: str | None = None
        """Why the model could not be loaded at first; then it is not tried again."""
        self.reload_error: str | None = None
        """Why the model could not be loaded again after its process ended; that is tried again."""
        self.stats = EMPTY_STATS
        self.num_starts = 0
        self._job_ids = itertools.count()
        self._jobs: dict[int, asyncio.Queue[Event]] = {}
        self._restart_delay, self._mean_job_seconds = 1.0, 1.0
        self._closing = False
        self._process: BaseProcess | None = None
        self._outbox: queue.SimpleQueue[JobMessage | None] = queue.SimpleQueue()
        self._restart_task: asyncio.Task[None] | None = None
        self._down_since: float | None = None
        self._is_running, self._has_heartbeat, self._step_seconds = False, False, 0.0
        self._silent_ticks = 0  # heartbeat intervals since the last message

    async def __aenter__(self) -> EngineProcess:
        self._loop = asyncio.get_running_loop()
        self._start()
        self._watch_task = self._loop.create_task(self._watch())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._closing = True
        self._watch_task.cancel()
        if self._restart_task:
            self._restart_task.cancel()
        process = self._process
        assert process is not None
        self._outbox.put(None)
        await asyncio.to_thread(process.join, 5)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)
        self._kill_group()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def unavailable_reason(self) -> str | None:
        """Why no job can run now; None where it can."""
        if self.ready.is_set():
            return None
        if self.load_error:
            return self.load_error
        if self.reload_error:
            return f"the model could not be loaded again ({self.reload_error}): that is tried again"
        return "the model is being loaded: ask again soon"

    @property
    def is_alive(self) -> bool:
        """Whether the model is loaded or may still come back.

        False once `unavailable_timeout` seconds have passed since its process ended.
        """
        return self._down_since is None or self._loop.time() - self._down_since < self.unavailable_timeout

    async def run_job(self, job: Job) -> AsyncGenerator[Event, None]:
        """Run a job.

        Yields:
            Its events, the last one `Finished`, `Rejected` or `Error`. Closing the generator drops the job.

        Raises:
            QueueFull: `max_jobs` jobs run and wait.
            ModelUnavailable: the model is not loaded.
        """
        if self.unavailable_reason is not None:
            raise ModelUnavailable(self.unavailable_reason)
        if len(self._jobs) >= self.max_jobs:
            raise QueueFull(max(1, round(self._mean_job_seconds * len(self._jobs) / self.max_sequences)))
        job_id, events = next(self._job_ids), asyncio.Queue[Event]()
        self._jobs[job_id] = events
        start, is_final = self._loop.time(), False
        self._outbox.put((job_id, job))
        try:
            while not is_final:
                event = await events.get()
                is_final = isinstance(event, (Finished, Rejected, Error))
                yield event
            if isinstance(event, Finished):
                self._mean_job_seconds += 0.1 * (self._loop.time() - start - self._mean_job_seconds)
        finally:
            if self._jobs.pop(job_id, None) and not is_final:
                self._outbox.put((job_id, None))

    def _start(self) -> None:
        (jobs, jobs_end), (events, events_end) = PROCESS_CONTEXT.Pipe(duplex=False), PROCESS_CONTEXT.Pipe(duplex=False)
        arguments = (jobs, events_end, self.load_options, self.max_sequences)
        self._process = PROCESS_CONTEXT.Process(target=self.target, args=arguments, daemon=True)
        self._process.start()
        self.num_starts += 1
        self._is_running, self._has_heartbeat, self._step_seconds, self._silent_ticks = True, False, 0.0, 0
        jobs.close()
        events_end.close()
        self._outbox = queue.SimpleQueue()
        threading.Thread(target=self._send_jobs, args=(jobs_end, self._outbox), daemon=True).start()
        threading.Thread(target=self._receive_events, args=(events,), daemon=True).start()

    @staticmethod
    def _send_jobs(pipe: Connection, outbox: queue.SimpleQueue[JobMessage | None]) -> None:
        """Send jobs until None comes or the process is gone; in a thread of its own, since a full pipe blocks."""
        with pipe:
            try:
                while (message := outbox.get()) is not None:
                    pipe.send(message)
                    del message  # else its images are held until the next job comes
            except OSError:
                pass

    def _receive_events(self, pipe: Connection) -> None:
        """Receive the process's events until it is gone; in a thread of its own."""
        with pipe:
            while True:
                try:
                    job_id, event = pipe.recv()
                except (EOFError, OSError):
                    break
                self._call_in_loop(self._on_event, job_id, event)
        self._call_in_loop(self._on_exit)

    def _call_in_loop(self, callback: Callable[[*Ts], None], *arguments: *Ts) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed
            pass

    def _on_event(self, job_id: int | None, event: Event) -> None:
        self._silent_ticks = 0
        if isinstance(event, Heartbeat):
            self._has_heartbeat, self._step_seconds = True, event.step_seconds
        elif isinstance(event, Ready):
            self.info, self.reload_error, self._down_since = event.info, None, None
            self.ready.set()
            self.load_attempted.set()
        elif isinstance(event, Stats):
            self.stats = event
        elif job_id is None:
            assert isinstance(event, Rejected)
            if self.load_attempted.is_set():
                self.reload_error = event.message
                log.error("the model could not be loaded again: %s", event.message)
            else:
                self.load_error = event.message
                self.load_attempted.set()
        elif job_id in self._jobs:
            self._jobs[job_id].put_nowait(event)
            if isinstance(event, Started):
                self._restart_delay = 1.0

    def _on_exit(self) -> None:
        self.ready.clear()
        self._is_running, self.stats = False, EMPTY_STATS
        self._outbox.put(None)
        if self._down_since is None:
            self._down_since = self._loop.time()
        for events in self._jobs.values():
            events.put_nowait(Error("the model's process ended while it answered: ask again"))
        if self._closing or self.load_error:
            return
        self._kill_group()
        exit_code = self._process and self._process.exitcode
        log.error("the model's process ended (code %s); started again in %.0f s", exit_code, self._restart_delay)
        self._restart_task = self._loop.create_task(self._restart())

    def _kill_group(self) -> None:
        """Kill the processes that the process has started and left."""
        assert self._process is not None and self._process.pid is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # the group is empty or has ended
            pass

    async def _restart(self) -> None:
        while not self._closing:
            await asyncio.sleep(self._restart_delay)
            self._restart_delay = min(2 * self._restart_delay, MAX_RESTART_DELAY)
            try:
                self._start()
                return
            except OSError as error:  # no memory or no process is available now
                self.reload_error = str(error)
                log.error(
                    "the model's process cannot be started: %s; tried again in %.0f s", error, self._restart_delay
                )

    async def _watch(self) -> None:
        """Kill a process that hangs. Silence is counted in ticks of the server, which may itself have been stopped."""
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL)
            if not self._is_running:
                continue
            self._silent_ticks += 1
            max_ticks = self.heartbeat_timeout / HEARTBEAT_INTERVAL if self._has_heartbeat else MAX_STARTUP_TICKS
            if self._silent_ticks > max_ticks:
                self._kill(f"has sent no heartbeat for {self._silent_ticks * HEARTBEAT_INTERVAL:.0f} s")
            elif self.step_timeout is not None and self._step_seconds > self.step_timeout:
                self._kill(f"has been in one step for {self._step_seconds:.0f} s")

    def _kill(self, reason: str) -> None:
        log.error("the model's process %s: it is ended", reason)
        self._is_running = False
        self._kill_group()
        assert self._process is not None
        self._process.kill()
