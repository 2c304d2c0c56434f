"""The worker: it holds a model and answers jobs, which join while others run and leave when they end or are dropped.

    receiver, sender: the end of a pipe and a `process.EventSender` (the server holds the other ends)
    run_worker(receiver, sender, {"name": "unigen-tiny"}, slots=32)

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
    words: StopStringFilter
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
            if text := self.words.feed(part):
                yield Part(text)
            return
        yield from self.rest()
        composite = identity if self.prepared is None else self.prepared.composite
        if isinstance(part, Preview):
            yield replace(part, image=composite(part.image))
        else:
            yield Part(composite(part))

    def best_events(self, engine: BatchedEngine) -> Iterator[Event]:
        """Yield the events of the best candidate. Its usage counts the tokens of all candidates."""
        assert self.prepared is not None
        numbers = sorted(self.candidate_usage)
        answers = [self._join_parts(number) for number in numbers]
        (index,) = engine.select_best([self.prepared], [answers])
        yield from self.events(answers[index])
        yield from self.rest()
        usages = list(self.candidate_usage.values())
        truncated = self.candidate_usage[numbers[index]].truncated and not self.words.stopped
        total = replace(
            self.candidate_usage[numbers[0]],
            text_tokens=sum(usage.text_tokens for usage in usages),
            image_tokens=sum(usage.image_tokens for usage in usages),
        )
        yield to_finished("length" if truncated else "stop", total)

    def _join_parts(self, number: int) -> str | Image.Image:
        parts = self.candidate_parts.get(number, [])
        return "".join(parts).strip() if all(isinstance(part, str) for part in parts) else parts[0]

    def rest(self) -> Iterator[Event]:
        """Yield the text that was held back, at the end of a text."""
        if text := self.words.end():
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
        self.waiting: deque[tuple[int, Job]] = deque()
        self.steps, self.seconds = 0, 0.0

    def ask(self, number: int, job: Job) -> None:
        """Add a job to the queue."""
        self.waiting.append((number, job))

    def drop(self, number: int) -> None:
        """Drop a job, whether it waits or runs."""
        self.waiting = deque(entry for entry in self.waiting if entry[0] != number)


class BatchedWorker(_BaseWorker):
    """Answers with a batched engine: all jobs that there are slots for, in one batch.

    Args:
        engine: the engine.
        slots: number of sequences in the cache. A job takes one for each candidate and each branch of guidance.
    """

    def __init__(self, engine: BatchedEngine, slots: int) -> None:
        super().__init__()
        self.engine, self.slots, self.running = engine, slots, engine.new_scheduler()
        self.next: tuple[int, _ActiveJob] | None = None
        """A job that is prepared and waits for slots, with its id."""
        self.answers: dict[int, tuple[int, int, _ActiveJob]] = {}
        """By sequence id: job id, slots, and the job."""

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return bool(self.answers or self.waiting or self.next)

    def drop(self, number: int) -> None:
        """Drop a job, whether it waits or runs, with all its sequences."""
        super().drop(number)
        if self.next and self.next[0] == number:
            self.next = None
        self._abort_sequences(number)

    def _abort_sequences(self, number: int) -> None:
        for row in [row for row, (job, *_) in self.answers.items() if job == number]:
            self.running.abort(row)
            del self.answers[row]

    def step(self) -> Iterator[tuple[int, Event]]:
        """Admit jobs and do one step of the batch.

        Yields:
            Events, each with the id of its job.
        """
        yield from self._admit()
        if not self.answers:
            return
        start = time.perf_counter()
        try:
            parts = self.running.step()
        except Exception as error:
            traceback.print_exc()
            failed = [number for number, *_ in self.answers.values()]
            self.running.abort_all()
            self.answers, self.running = {}, self.engine.new_scheduler()
            yield from ((number, Error(f"{type(error).__name__} while it was answered")) for number in failed)
            return
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - start
        yield from self._failure_events()
        for row, part in parts:
            number, _, answer = self.answers.get(row, (None, 0, None))
            if number is None or answer is None:
                continue
            if answer.has_candidates:
                answer.candidate_parts.setdefault(row, []).append(part)
                continue
            for event in answer.events(part):
                yield number, event
            if answer.words.stopped:
                usage = self.running.finished.get(row) or self.running.usage(row)
                yield number, to_finished("stop", usage)
                del self.answers[row]
                if row in self.running:
                    self.running.abort(row)
        for row, usage in self.running.finished.items():
            if row in self.answers:
                number, _, answer = self.answers.pop(row)
                if answer.has_candidates:
                    answer.candidate_usage[row] = usage
                    if not any(job == number for job, *_ in self.answers.values()):
                        yield from self._best_candidate_events(number, answer)
                    continue
                for event in answer.rest():
                    yield number, event
                yield number, to_finished("length" if usage.truncated else "stop", usage)

    def _failure_events(self) -> Iterator[tuple[int, Event]]:
        """Yield an error for each job with a failed sequence; its other sequences are dropped."""
        for row, error in self.running.failed.items():
            if row in self.answers:
                number = self.answers[row][0]
                for sequence_id in [index for index, (job, *_) in self.answers.items() if job == number]:
                    del self.answers[sequence_id]
                    if sequence_id in self.running:
                        self.running.abort(sequence_id)
                print(f"unigen: {error}", file=sys.stderr)
                yield number, Error(str(error), retryable=False)

    def _best_candidate_events(self, number: int, answer: _ActiveJob) -> Iterator[tuple[int, Event]]:
        try:
            events = list(answer.best_events(self.engine))
        except NonFiniteError as error:
            events = [to_rejection(error)]
        except Exception as error:
            traceback.print_exc()
            events = [Error(f"{type(error).__name__} while candidates were compared")]
        yield from ((number, event) for event in events)

    def load(self) -> Stats:
        """Return what the worker is doing."""
        rows = sum(slots for _, slots, _ in self.answers.values())
        waiting = len(self.waiting) + (self.next is not None)
        running = len({number for number, *_ in self.answers.values()})
        return Stats(running, waiting, rows, self.running.num_cached_tokens, self.steps, self.seconds)

    def _admit(self) -> Iterator[tuple[int, Event]]:
        """Start jobs in the order of their arrival, as long as there are slots; yield an event for each."""
        while self.next or self.waiting:
            if not self.next:
                number, job = self.waiting.popleft()
                try:
                    self.next = number, self._prepare(job)
                except ValueError as error:
                    yield number, to_rejection(error)
                    continue
                except Exception as error:
                    traceback.print_exc()
                    yield number, Error(f"{type(error).__name__} before it was answered")
                    continue
            number, answer = self.next
            assert answer.prepared is not None
            requests = answer.prepared.requests
            branches = 1 if answer.job.output == "text" else requests[0].guidance.num_branches
            if (
                self.answers
                and branches * len(requests) + sum(slots for _, slots, _ in self.answers.values()) > self.slots
            ):
                return
            self.next = None
            try:
                for request in requests:
                    self.answers[self.running.add_request(request)] = number, branches, answer
            except ValueError as error:
                self._abort_sequences(number)
                yield number, to_rejection(error)
                continue
            except Exception as error:  # such as a GPU without memory for the images of the job
                traceback.print_exc()
                self._abort_sequences(number)
                yield number, Error(f"{type(error).__name__} before it was answered")
                continue
            candidates = {"candidates": len(requests)} if answer.has_candidates else {}
            yield number, Started(answer.prepared.settings | candidates)

    def _prepare(self, job: Job) -> _ActiveJob:
        """Prepare the sequences of a job, one for each candidate. ValueError for a job that is not valid."""
        options = job.options | ({"previews": job.previews} if job.candidates == 1 else {})
        prepared = self.engine.prepare(
            job.prompt,
            job.output,
            candidates=job.candidates,
            image=job.around,
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
        self.now: tuple[int, Iterator[AnswerPart], _ActiveJob] | None = None
        """The job that runs: its id, the parts of its answer, and the job."""

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return bool(self.now or self.waiting)

    def drop(self, number: int) -> None:
        """Drop a job, whether it waits or runs."""
        super().drop(number)
        if self.now and self.now[0] == number:
            self.now = None

    def step(self) -> Iterator[tuple[int, Event]]:
        """Generate the next part of the job that runs, or start the next job.

        Yields:
            Events, each with the id of its job.
        """
        if not self.busy:  # the jobs have been dropped
            return
        if not self.now:
            number, job = self.waiting.popleft()
            if job.candidates != 1:
                yield number, Rejected("this model cannot compare candidates: leave them out")
                return
            if job.variation is not None:
                yield number, Rejected("this model does not vary pictures: say what to draw")
                return
            self.now = number, self._parts(job), _ActiveJob(job, StopStringFilter(job.stop))
            yield number, Started(self._settings(job))
        number, parts, answer = self.now
        start = time.perf_counter()
        try:
            part = next(parts, None)
        except ValueError as error:
            self.now = None
            yield number, to_rejection(error)
            return
        except Exception as error:
            traceback.print_exc()
            self.now = None
            yield number, Error(f"{type(error).__name__} while it was answered")
            return
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - start
        for event in answer.rest() if part is None else answer.events(part):
            yield number, event
        if part is None or answer.words.stopped:
            self.now = None
            yield number, Finished("stop")

    def load(self) -> Stats:
        """Return what the worker is doing."""
        return Stats(int(bool(self.now)), len(self.waiting), int(bool(self.now)), 0, self.steps, self.seconds)

    def _settings(self, job: Job) -> dict[str, Any]:
        """Return the options of a job with the engine's defaults, as far as these are known."""
        defaults = {} if job.output == "text" else self.engine.default_options("image", job.options)
        if job.output != "image":
            options = {key: job.options[key] for key in ("temperature", "top_p") if job.options.get(key) is not None}
            defaults["text"] = self.engine.default_options("text", options) | options
        return defaults | job.options

    def _parts(self, job: Job) -> Iterator[Any]:
        """Yield the parts of the answer. The options of the job are checked when the first is taken."""
        if job.around is None:
            yield from self.engine.stream(job.prompt, output=job.output, **job.options)
        else:
            yield self.engine.inpaint(job.around, prompt_text(job.prompt), job.mask, **job.options)


def prompt_text(document: Document) -> str:
    """Join the texts of a document by spaces."""
    return " ".join(segment.text for segment in document.segments if segment.text)


def run_worker(receiver: Connection, sender: Any, source: dict[str, Any], slots: int) -> None:
    """Load a model, and answer jobs until the other end of the pipe is closed.

    A model that cannot be loaded is a `Rejected` without a job id.

    Args:
        receiver: jobs with their ids; None instead of a job drops it.
        sender: a `process.EventSender`, which takes events with the ids of their jobs.
        source: keywords of `unigen.load`.
        slots: number of sequences that are generated at a time.
    """
    try:
        from unigen import loading

        engine = loading.load(**source)
        worker = BatchedWorker(engine, slots) if is_batched(engine) else SequentialWorker(engine)
        sender.send((None, Ready(cast(ServedModelInfo, {**engine.info(), "outputs": list(engine.outputs)}))))
    except ValueError as error:
        sender.send((None, Rejected(" ".join(str(error).split()))))
        return
    last_stats_time = time.monotonic()
    try:
        while True:
            receiver.poll(0 if worker.busy else None)  # without a job, wait for one
            while receiver.poll():
                number, job = receiver.recv()
                if job is None:
                    worker.drop(number)
                else:
                    worker.ask(number, job)
                del job  # else its images are held until the next job comes
            sender.step = time.monotonic()
            for number, event in worker.step():
                sender.send((number, event))
            sender.step = None
            if not worker.busy or time.monotonic() - last_stats_time > 0.25:
                sender.send((None, worker.load()))
                last_stats_time = time.monotonic()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    finally:
        sys.stderr.flush()
        receiver.close()
