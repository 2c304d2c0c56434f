"""The worker: it holds a model and answers jobs, which join while others run and leave when they end or are dropped.

    receiver, sender: the end of a pipe and a `process.EventSender` (the server holds the other ends)
    run_worker(receiver, sender, {"name": "unigen-tiny"}, max_sequences=32)

A job that is not valid gets a `Rejected` in one line. A failure while jobs run together is an `Error` for each of them,
and the next ones are answered. Does not depend on: HTTP.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from PIL import Image

from unigen.document import Document, Preview
from unigen.inference.candidates import PreparedRequest, identity
from unigen.inference.protocol import BatchedEngine, InferenceEngine, is_batched
from unigen.inference.results import Usage
from unigen.serving.jobs import Error, Event, Finished, Job, Part, Ready, Rejected, ServedModelInfo, Started, Stats
from unigen.serving.stop_strings import StopStringFilter
from unigen.utils.numbers import NonFiniteError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    AnswerPart: TypeAlias = str | Image.Image | Preview


@dataclass
class _ActiveJob:
    """A job that is being answered."""

    job: Job
    """The job."""
    text_filter: StopStringFilter
    """The text of the answer, up to a stop string."""
    prepared: PreparedRequest | None = None
    """The sequences of the job; None where the engine is not batched."""
    candidate_parts: dict[int, list[Any]] = field(default_factory=dict)
    """Parts that each of several candidates has generated, by sequence id."""
    candidate_usage: dict[int, Usage] = field(default_factory=dict)
    """Token counts of each candidate that has ended, by sequence id."""

    @property
    def has_candidates(self) -> bool:
        """Whether the answer is the best of several candidates."""
        return self.prepared is not None and len(self.prepared.requests) > 1

    def events(self, part: AnswerPart) -> Iterator[Event]:
        """Yield the events of a generated part."""
        if isinstance(part, str):
            if text := self.text_filter.feed(part):
                yield Part(text)
            return
        yield from self.flush()
        composite = identity if self.prepared is None else self.prepared.composite
        if isinstance(part, Preview):
            yield replace(part, image=composite(part.image))
        else:
            yield Part(composite(part))

    def best_events(self, engine: BatchedEngine) -> Iterator[Event]:
        """Yield the events of the best candidate. Its usage counts the tokens of all candidates."""
        assert self.prepared is not None
        sequence_ids = sorted(self.candidate_usage)
        answers = [self._join_parts(sequence_id) for sequence_id in sequence_ids]
        (index,) = engine.select_best([self.prepared], [answers])
        yield from self.events(answers[index])
        yield from self.flush()
        usages = list(self.candidate_usage.values())
        truncated = self.candidate_usage[sequence_ids[index]].truncated and not self.text_filter.stopped
        total = replace(
            self.candidate_usage[sequence_ids[0]],
            text_tokens=sum(usage.text_tokens for usage in usages),
            image_tokens=sum(usage.image_tokens for usage in usages),
        )
        yield to_finished("length" if truncated else "stop", total)

    def _join_parts(self, sequence_id: int) -> str | Image.Image:
        parts = self.candidate_parts.get(sequence_id, [])
        return "".join(parts).strip() if all(isinstance(part, str) for part in parts) else parts[0]

    def flush(self) -> Iterator[Event]:
        """Yield the text that was held back, at the end of a text."""
        if text := self.text_filter.end():
            yield Part(text)


def to_rejection(error: ValueError) -> Rejected | Error:
    """Convert an error to an event with one line. Values that are not finite are the model's fault: an `Error`."""
    line = " ".join(str(error).split())
    return Error(line, retryable=False) if isinstance(error, NonFiniteError) else Rejected(line)


def to_finished(reason: str, usage: Usage) -> Finished:
    """Make the last event of an answer.

    Args:
        reason: "stop" or "length".
        usage: token counts of the answer.
    """
    return Finished(reason, usage.prompt_tokens, usage.text_tokens, usage.image_tokens, usage.image_prompt_tokens)


class _BaseWorker:
    """A queue of jobs with their ids, and the count and time of the engine's steps."""

    def __init__(self) -> None:
        self.pending_jobs: deque[tuple[int, Job]] = deque()
        self.steps, self.step_seconds = 0, 0.0

    def submit(self, job_id: int, job: Job) -> None:
        """Add a job to the queue."""
        self.pending_jobs.append((job_id, job))

    def abort(self, job_id: int) -> None:
        """Drop a job, whether it waits or runs."""
        self.pending_jobs = deque(entry for entry in self.pending_jobs if entry[0] != job_id)


class BatchedWorker(_BaseWorker):
    """Answers with a batched engine: all jobs that there are slots for, in one batch.

    Args:
        engine: the engine.
        max_sequences: number of sequences in the cache. A job takes one for each candidate and each branch of guidance.
    """

    def __init__(self, engine: BatchedEngine, max_sequences: int) -> None:
        super().__init__()
        self.engine, self.max_sequences, self.scheduler = engine, max_sequences, engine.new_scheduler()
        self.next_job: tuple[int, _ActiveJob] | None = None
        """A job that is prepared and waits for slots, with its id."""
        self.active_jobs: dict[int, tuple[int, int, _ActiveJob]] = {}
        """By sequence id: job id, slots, and the job."""

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return bool(self.active_jobs or self.pending_jobs or self.next_job)

    def abort(self, job_id: int) -> None:
        """Drop a job, whether it waits or runs, with all its sequences."""
        super().abort(job_id)
        if self.next_job and self.next_job[0] == job_id:
            self.next_job = None
        self._abort_sequences(job_id)

    def _abort_sequences(self, job_id: int) -> None:
        for sequence_id in [key for key, (owner, *_) in self.active_jobs.items() if owner == job_id]:
            self.scheduler.abort(sequence_id)
            del self.active_jobs[sequence_id]

    def step(self) -> Iterator[tuple[int, Event]]:
        """Admit jobs and do one step of the batch.

        Yields:
            Events, each with the id of its job.
        """
        yield from self._admit()
        if not self.active_jobs:
            return
        start = time.perf_counter()
        try:
            parts = self.scheduler.step()
        except Exception as error:
            traceback.print_exc()
            failed = [job_id for job_id, *_ in self.active_jobs.values()]
            self.scheduler.abort_all()
            self.active_jobs, self.scheduler = {}, self.engine.new_scheduler()
            yield from ((job_id, Error(f"{type(error).__name__} while it was answered")) for job_id in failed)
            return
        self.steps, self.step_seconds = self.steps + 1, self.step_seconds + time.perf_counter() - start
        yield from self._failure_events()
        for sequence_id, part in parts:
            job_id, _, answer = self.active_jobs.get(sequence_id, (None, 0, None))
            if job_id is None or answer is None:
                continue
            if answer.has_candidates:
                answer.candidate_parts.setdefault(sequence_id, []).append(part)
                continue
            for event in answer.events(part):
                yield job_id, event
            if answer.text_filter.stopped:
                usage = self.scheduler.finished.get(sequence_id) or self.scheduler.usage(sequence_id)
                yield job_id, to_finished("stop", usage)
                del self.active_jobs[sequence_id]
                if sequence_id in self.scheduler:
                    self.scheduler.abort(sequence_id)
        for sequence_id, usage in self.scheduler.finished.items():
            if sequence_id in self.active_jobs:
                job_id, _, answer = self.active_jobs.pop(sequence_id)
                if answer.has_candidates:
                    answer.candidate_usage[sequence_id] = usage
                    if not any(owner == job_id for owner, *_ in self.active_jobs.values()):
                        yield from self._best_candidate_events(job_id, answer)
                    continue
                for event in answer.flush():
                    yield job_id, event
                yield job_id, to_finished("length" if usage.truncated else "stop", usage)

    def _failure_events(self) -> Iterator[tuple[int, Event]]:
        """Yield an error for each job with a failed sequence; its other sequences are dropped."""
        for sequence_id, error in self.scheduler.failed.items():
            if sequence_id in self.active_jobs:
                job_id = self.active_jobs[sequence_id][0]
                for other_id in [key for key, (owner, *_) in self.active_jobs.items() if owner == job_id]:
                    del self.active_jobs[other_id]
                    if other_id in self.scheduler:
                        self.scheduler.abort(other_id)
                print(f"unigen: {error}", file=sys.stderr)
                yield job_id, Error(str(error), retryable=False)

    def _best_candidate_events(self, job_id: int, answer: _ActiveJob) -> Iterator[tuple[int, Event]]:
        try:
            events = list(answer.best_events(self.engine))
        except NonFiniteError as error:
            events = [to_rejection(error)]
        except Exception as error:
            traceback.print_exc()
            events = [Error(f"{type(error).__name__} while candidates were compared")]
        yield from ((job_id, event) for event in events)

    def stats(self) -> Stats:
        """Return what the worker is doing."""
        num_sequences = sum(count for _, count, _ in self.active_jobs.values())
        num_waiting = len(self.pending_jobs) + (self.next_job is not None)
        num_running = len({job_id for job_id, *_ in self.active_jobs.values()})
        return Stats(
            num_running, num_waiting, num_sequences, self.scheduler.num_cached_tokens, self.steps, self.step_seconds
        )

    def _admit(self) -> Iterator[tuple[int, Event]]:
        """Start jobs in the order of their arrival, as long as there are slots; yield an event for each."""
        while self.next_job or self.pending_jobs:
            if not self.next_job:
                job_id, job = self.pending_jobs.popleft()
                try:
                    self.next_job = job_id, self._prepare(job)
                except ValueError as error:
                    yield job_id, to_rejection(error)
                    continue
                except Exception as error:
                    traceback.print_exc()
                    yield job_id, Error(f"{type(error).__name__} before it was answered")
                    continue
            job_id, answer = self.next_job
            assert answer.prepared is not None
            requests = answer.prepared.requests
            branches = 1 if answer.job.output == "text" else requests[0].guidance.num_branches
            num_sequences = branches * len(requests) + sum(count for _, count, _ in self.active_jobs.values())
            if self.active_jobs and num_sequences > self.max_sequences:
                return
            self.next_job = None
            try:
                for request in requests:
                    self.active_jobs[self.scheduler.add_request(request)] = job_id, branches, answer
            except ValueError as error:
                self._abort_sequences(job_id)
                yield job_id, to_rejection(error)
                continue
            except Exception as error:  # such as a GPU without memory for the images of the job
                traceback.print_exc()
                self._abort_sequences(job_id)
                yield job_id, Error(f"{type(error).__name__} before it was answered")
                continue
            candidates = {"candidates": len(requests)} if answer.has_candidates else {}
            yield job_id, Started(answer.prepared.settings | candidates)

    def _prepare(self, job: Job) -> _ActiveJob:
        """Prepare the sequences of a job, one for each candidate. ValueError for a job that is not valid."""
        options = job.options | ({"previews": job.num_previews} if job.num_candidates == 1 else {})
        prepared = self.engine.prepare(
            job.prompt,
            job.output,
            candidates=job.num_candidates,
            image=job.base_image,
            mask=job.mask,
            variation=job.variation,
            **options,
        )
        return _ActiveJob(job, StopStringFilter(job.stop), prepared)


class SequentialWorker(_BaseWorker):
    """Answers with an engine that is not batched, such as a pipeline or a composed model: one job after the other.

    Args:
        engine: the engine, whose `stream` gives the answers.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        super().__init__()
        self.engine = engine
        self.active_job: tuple[int, Iterator[AnswerPart], _ActiveJob] | None = None
        """The job that runs: its id, the parts of its answer, and the job."""

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return bool(self.active_job or self.pending_jobs)

    def abort(self, job_id: int) -> None:
        """Drop a job, whether it waits or runs."""
        super().abort(job_id)
        if self.active_job and self.active_job[0] == job_id:
            self.active_job = None

    def step(self) -> Iterator[tuple[int, Event]]:
        """Generate the next part of the job that runs, or start the next job.

        Yields:
            Events, each with the id of its job.
        """
        if not self.busy:  # the jobs have been dropped
            return
        if not self.active_job:
            job_id, job = self.pending_jobs.popleft()
            if job.num_candidates != 1:
                yield job_id, Rejected("this model cannot compare candidates: leave them out")
                return
            if job.variation is not None:
                yield job_id, Rejected("this model does not vary pictures: say what to draw")
                return
            self.active_job = job_id, self._generate(job), _ActiveJob(job, StopStringFilter(job.stop))
            yield job_id, Started(self._reported_settings(job))
        job_id, parts, answer = self.active_job
        start = time.perf_counter()
        try:
            part = next(parts, None)
        except ValueError as error:
            self.active_job = None
            yield job_id, to_rejection(error)
            return
        except Exception as error:
            traceback.print_exc()
            self.active_job = None
            yield job_id, Error(f"{type(error).__name__} while it was answered")
            return
        self.steps, self.step_seconds = self.steps + 1, self.step_seconds + time.perf_counter() - start
        for event in answer.flush() if part is None else answer.events(part):
            yield job_id, event
        if part is None or answer.text_filter.stopped:
            self.active_job = None
            yield job_id, Finished("stop")

    def stats(self) -> Stats:
        """Return what the worker is doing."""
        num_running = int(self.active_job is not None)
        return Stats(num_running, len(self.pending_jobs), num_running, 0, self.steps, self.step_seconds)

    def _reported_settings(self, job: Job) -> dict[str, Any]:
        """Return the options of a job with the engine's defaults, as far as these are known."""
        defaults = {} if job.output == "text" else self.engine.default_options("image", job.options)
        if job.output != "image":
            options = {key: job.options[key] for key in ("temperature", "top_p") if job.options.get(key) is not None}
            defaults["text"] = self.engine.default_options("text", options) | options
        return defaults | job.options

    def _generate(self, job: Job) -> Iterator[Any]:
        """Yield the parts of the answer. The options of the job are checked when the first is taken."""
        if job.base_image is None:
            yield from self.engine.stream(job.prompt, output=job.output, **job.options)
        else:
            yield self.engine.inpaint(job.base_image, prompt_text(job.prompt), job.mask, **job.options)


def prompt_text(document: Document) -> str:
    """Join the texts of a document by spaces."""
    return " ".join(segment.text for segment in document.segments if segment.text)


def run_worker(receiver: Connection, sender: Any, source: dict[str, Any], max_sequences: int) -> None:
    """Load a model, and answer jobs until the other end of the pipe is closed.

    A model that cannot be loaded is a `Rejected` without a job id.

    Args:
        receiver: jobs with their ids; None instead of a job drops it.
        sender: a `process.EventSender`, which takes events with the ids of their jobs.
        source: keywords of `unigen.load`.
        max_sequences: number of sequences that are generated at a time.
    """
    try:
        from unigen import loading

        engine = loading.load(**source)
        worker = BatchedWorker(engine, max_sequences) if is_batched(engine) else SequentialWorker(engine)
        sender.send((None, Ready(cast(ServedModelInfo, {**engine.info(), "outputs": list(engine.outputs)}))))
    except ValueError as error:
        sender.send((None, Rejected(" ".join(str(error).split()))))
        return
    last_stats_time = time.monotonic()
    try:
        while True:
            receiver.poll(0 if worker.busy else None)  # without a job, wait for one
            while receiver.poll():
                job_id, job = receiver.recv()
                if job is None:
                    worker.abort(job_id)
                else:
                    worker.submit(job_id, job)
                del job  # else its images are held until the next job comes
            sender.step = time.monotonic()
            for job_id, event in worker.step():
                sender.send((job_id, event))
            sender.step = None
            if not worker.busy or time.monotonic() - last_stats_time > 0.25:
                sender.send((None, worker.stats()))
                last_stats_time = time.monotonic()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    finally:
        sys.stderr.flush()
        receiver.close()
