"""The process that holds a model and answers jobs: they join while others run, and leave when they end or are dropped.

    receiver, sender: the end of a pipe and a `process.EventSender` (the server holds the other ends)
    run_worker(receiver, sender, {"name": "unigen-tiny"}, slots=32)

Knows engines, jobs and pipes; does not depend on HTTP. What a job says wrong is a `Rejected` in one line; what goes
wrong while jobs run together is an `Error` for each of them, and the next ones are answered.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from PIL import Image

from unigen.document import Document, Preview
from unigen.inference.candidates import PreparedRequest, identity
from unigen.inference.protocol import BatchedEngine, InferenceEngine, is_batched
from unigen.inference.results import Usage
from unigen.serving.jobs import Error, Event, Finished, Job, Part, Ready, Rejected, ServedModelInfo, Started, Stats
from unigen.serving.stop_strings import StopStringFilter
from unigen.utils.numbers import NonFiniteError


@dataclass
class _ActiveJob:
    """A job on its way."""

    job: Job
    words: StopStringFilter
    """Its text as it is shown."""
    prepared: PreparedRequest | None = None
    """Its sequences, where it is batched."""
    candidate_parts: dict[int, list[Any]] = field(default_factory=dict)
    """What each of several candidates has generated, by its number in the batch."""
    candidate_usage: dict[int, Usage] = field(default_factory=dict)
    """How many tokens each of them took, by its number in the batch, when it has ended."""

    @property
    def has_candidates(self) -> bool:
        return self.prepared is not None and len(self.prepared.requests) > 1

    def events(self, part: str | Image.Image | Preview) -> Iterator[Event]:
        if isinstance(part, str):
            if said := self.words.feed(part):
                yield Part(said)
            return
        yield from self.rest()
        composite = identity if self.prepared is None else self.prepared.composite
        if isinstance(part, Preview):
            yield replace(part, image=composite(part.image))
        else:
            yield Part(composite(part))

    def best_events(self, engine: BatchedEngine) -> Iterator[Event]:
        """The events of the best candidate. The tokens of all candidates are the answer's."""
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

    def _join_parts(self, number: int) -> Any:
        parts = self.candidate_parts.get(number, [])
        return "".join(parts).strip() if all(isinstance(part, str) for part in parts) else parts[0]

    def rest(self) -> Iterator[Event]:
        if said := self.words.end():
            yield Part(said)


def to_rejection(error: ValueError) -> Rejected | Error:
    """In one line. Numbers that are not finite are a fault of the model's and not of the job's."""
    line = " ".join(str(error).split())
    return Error(line, again=False) if isinstance(error, NonFiniteError) else Rejected(line)


def to_finished(reason: str, usage: Usage) -> Finished:
    return Finished(reason, usage.prompt_tokens, usage.text_tokens, usage.image_tokens, usage.image_prompt_tokens)


class _BaseWorker:
    """Jobs that wait for an engine, by number, and what it has done."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Job]] = deque()
        self.steps, self.seconds = 0, 0.0

    def ask(self, number: int, job: Job) -> None:
        self.waiting.append((number, job))

    def drop(self, number: int) -> None:
        self.waiting = deque(entry for entry in self.waiting if entry[0] != number)


class BatchedWorker(_BaseWorker):
    """Answers with a batched engine: all jobs that there are slots for, in one batch. slots: sequences in the cache, of
    which a job with guidance takes one a branch."""

    def __init__(self, engine: BatchedEngine, slots: int) -> None:
        super().__init__()
        self.engine, self.slots, self.running = engine, slots, engine.new_scheduler()
        self.next: tuple[int, _ActiveJob] | None = None  # checked, and waits for slots
        self.answers: dict[int, tuple[int, int, _ActiveJob]] = {}  # by number in the batch: number of the job, slots

    @property
    def busy(self) -> bool:
        return bool(self.answers or self.waiting or self.next)

    def drop(self, number: int) -> None:
        super().drop(number)
        if self.next and self.next[0] == number:
            self.next = None
        self._abort_sequences(number)

    def _abort_sequences(self, number: int) -> None:
        for row in [row for row, (job, *_) in self.answers.items() if job == number]:
            self.running.abort(row)
            del self.answers[row]

    def step(self) -> Iterator[tuple[int, Event]]:
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
        """Failures of the jobs of which a row had to be given up; their other rows are dropped."""
        for row, error in self.running.failed.items():
            if row in self.answers:
                number = self.answers[row][0]
                for sequence_id in [at for at, (job, *_) in self.answers.items() if job == number]:
                    del self.answers[sequence_id]
                    if sequence_id in self.running:
                        self.running.abort(sequence_id)
                print(f"unigen: {error}", file=sys.stderr)
                yield number, Error(str(error), again=False)

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
        rows = sum(slots for _, slots, _ in self.answers.values())
        waiting = len(self.waiting) + (self.next is not None)
        running = len({number for number, *_ in self.answers.values()})
        return Stats(running, waiting, rows, self.running.num_cached_tokens, self.steps, self.seconds)

    def _admit(self) -> Iterator[tuple[int, Event]]:
        """Jobs in the order in which they came, as long as there are slots."""
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
            need = 1 if answer.job.output == "text" else requests[0].guidance.branches
            if self.answers and need * len(requests) + sum(slots for _, slots, _ in self.answers.values()) > self.slots:
                return
            self.next = None
            try:
                for request in requests:
                    self.answers[self.running.add_request(request)] = number, need, answer
            except ValueError as error:
                self._abort_sequences(number)
                yield number, to_rejection(error)
                continue
            except Exception as error:  # such as a GPU without memory for its pictures
                traceback.print_exc()
                self._abort_sequences(number)
                yield number, Error(f"{type(error).__name__} before it was answered")
                continue
            chosen = {"candidates": len(requests)} if answer.has_candidates else {}
            yield number, Started(answer.prepared.settings | chosen)

    def _prepare(self, job: Job) -> _ActiveJob:
        """The job's sequences, one a candidate."""
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
    """Answers with an engine that is not batched, a pipeline or a composed model: one job after the other, each by its
    stream."""

    def __init__(self, engine: InferenceEngine) -> None:
        super().__init__()
        self.engine = engine
        self.now: tuple[int, Iterator[Any], _ActiveJob] | None = None

    @property
    def busy(self) -> bool:
        return bool(self.now or self.waiting)

    def drop(self, number: int) -> None:
        super().drop(number)
        if self.now and self.now[0] == number:
            self.now = None

    def step(self) -> Iterator[tuple[int, Event]]:
        if not self.busy:  # what was asked has been dropped
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
        return Stats(int(bool(self.now)), len(self.waiting), int(bool(self.now)), 0, self.steps, self.seconds)

    def _settings(self, job: Job) -> dict[str, Any]:
        """What pictures and text are drawn with, as far as it is known."""
        defaults = {} if job.output == "text" else self.engine.default_options("image", job.options)
        if job.output != "image":
            given = {name: job.options[name] for name in ("temperature", "top_p") if job.options.get(name) is not None}
            defaults["text"] = self.engine.default_options("text", given) | given
        return defaults | job.options

    def _parts(self, job: Job) -> Iterator[Any]:
        """The parts of the answer; its options are checked when the first is taken."""
        if job.around is None:
            yield from self.engine.stream(job.prompt, output=job.output, **job.options)
        else:
            yield self.engine.inpaint(job.around, prompt_text(job.prompt), job.mask, **job.options)


def prompt_text(document: Document) -> str:
    """The words of a document."""
    return " ".join(segment.text for segment in document.segments if segment.text)


def run_worker(receiver: Any, sender: Any, source: dict[str, Any], slots: int) -> None:
    """Load a model and answer until the other end is closed. source: of `unigen.load`. A model that cannot be loaded is
    a `Rejected` for no job."""
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
            receiver.poll(0 if worker.busy else None)  # wait where there is nothing to do
            while receiver.poll():
                number, job = receiver.recv()
                if job is None:
                    worker.drop(number)
                else:
                    worker.ask(number, job)
                del job  # else its pictures are held until the next one comes
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
