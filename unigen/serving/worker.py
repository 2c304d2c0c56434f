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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from unigen.document import Document, Preview
from unigen.generators.base import SAMPLING_OPTION_NAMES
from unigen.inference.inpainting import prepare_inpainting, random_mask
from unigen.inference.request import default_options
from unigen.serving.jobs import Error, Event, Finished, Job, Part, Ready, Rejected, Started, Stats
from unigen.utils.numbers import NonFiniteError


class _StopStringMatcher:
    """Finds a text in another that comes character by character, in steps as many as characters, however long it is
    (Knuth, Morris and Pratt). begun: how many of its characters the other ends with."""

    def __init__(self, text: str) -> None:
        self.text, self.begun = text, 0
        self._failure_table = [0]  # for each begin of the text, but the empty one: the longest one that it ends with
        for character in text[1:]:
            self._failure_table.append(self._next(self._failure_table[-1], character))

    def feed(self, character: str) -> bool:
        """Is it whole with this character?"""
        if self.begun == len(self.text):
            self.begun = self._failure_table[-1]
        self.begun = self._next(self.begun, character)
        return self.begun == len(self.text)

    def _next(self, begun: int, character: str) -> int:
        while begun and self.text[begun] != character:
            begun = self._failure_table[begun - 1]
        return begun + (self.text[begun] == character)


class StopStringFilter:
    """A text as it is shown: without blanks at its ends, and without what follows a stop.

    What may yet turn out to be the begin of a stop, or blanks at the end, is held back until more is known."""

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self.stops = [_StopStringMatcher(stop) for stop in stops]
        self.held, self.shown, self.stopped = "", False, False

    def feed(self, piece: str) -> str:
        """What of the text is sure to be shown now; nothing more after a stop."""
        if self.stopped:
            return ""
        if not self.held and not self.shown:
            piece = piece.lstrip()
        for i, character in enumerate(piece):
            match_lengths = [len(stop.text) for stop in self.stops if stop.feed(character)]
            if match_lengths:
                text = self.held + piece[: i + 1]
                self.held, self.stopped = text[: len(text) - max(match_lengths)], True
                return self.end()
        self.held += piece
        match_length = max((stop.begun for stop in self.stops), default=0)
        said = self.held[: len(self.held) - match_length].rstrip()
        self.held = self.held[len(said) :]
        self.shown |= bool(said)
        return said

    def end(self) -> str:
        """What is left when the text ends."""
        said, self.held, self.shown = self.held.rstrip(), "", False
        for stop in self.stops:
            stop.begun = 0
        return said


@dataclass
class _ActiveJob:
    """A job on its way, and what lays its picture into another one. best: of its candidates' answers, where it has
    some; heard: their parts and what each took, by its row."""

    job: Job
    words: StopStringFilter
    composite: Callable[[Image.Image], Image.Image]
    best: Callable[[list[Any]], Any] | None = None
    candidate_parts: dict[int, list[Any]] = field(default_factory=dict)
    candidate_usage: dict[int, Any] = field(default_factory=dict)

    def events(self, part: Any) -> Iterator[Event]:
        if isinstance(part, str):
            if said := self.words.feed(part):
                yield Part(said)
            return
        yield from self.rest()
        if isinstance(part, Preview):
            yield replace(part, image=self.composite(part.image))
        else:
            yield Part(self.composite(part))

    def chosen(self) -> Iterator[Event]:
        """The events of the best candidate; all that they took is of the answer."""
        assert self.best is not None
        rows = sorted(self.candidate_usage)
        answers = [self._joined(row) for row in rows]
        best = self.best(answers)
        yield from self.events(best)
        yield from self.rest()
        first, cut = (
            self.candidate_usage[rows[0]],
            self.candidate_usage[rows[answers.index(best)]].truncated and not self.words.stopped,
        )
        usages = list(self.candidate_usage.values())
        text, image = sum(usage.text_tokens for usage in usages), sum(usage.image_tokens for usage in usages)
        yield to_finished("length" if cut else "stop", replace(first, text_tokens=text, image_tokens=image))

    def _joined(self, row: int) -> Any:
        parts = self.candidate_parts.get(row, [])
        return "".join(parts).strip() if all(isinstance(part, str) for part in parts) else parts[0]

    def rest(self) -> Iterator[Event]:
        if said := self.words.end():
            yield Part(said)


def to_rejection(error: ValueError) -> Rejected | Error:
    """In one line. Numbers that are not finite are a fault of the model's and not of the job's."""
    line = " ".join(str(error).split())
    return Error(line, again=False) if isinstance(error, NonFiniteError) else Rejected(line)


def to_finished(reason: str, usage: Any) -> Finished:
    return Finished(reason, usage.prompt_tokens, usage.text_tokens, usage.image_tokens, usage.image_prompt_tokens)


class _BaseWorker:
    """Jobs that wait for an engine, by number, and what it has done."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.waiting: deque[tuple[int, Job]] = deque()
        self.steps, self.seconds = 0, 0.0

    def ask(self, number: int, job: Job) -> None:
        self.waiting.append((number, job))

    def drop(self, number: int) -> None:
        self.waiting = deque(entry for entry in self.waiting if entry[0] != number)


class BatchedWorker(_BaseWorker):
    """Answers with an `Engine`: all jobs that there are slots for, in one batch. slots: sequences in the cache, of
    which a job with guidance takes one a branch."""

    def __init__(self, engine: Any, slots: int) -> None:
        super().__init__(engine)
        self.slots, self.running = slots, engine.running()
        self.next: tuple[int, list[Any], _ActiveJob] | None = None  # checked, and waits for slots
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
            self.answers, self.running = {}, self.engine.running()
            yield from ((number, Error(f"{type(error).__name__} while it was answered")) for number in failed)
            return
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - start
        yield from self._failure_events()
        for row, part in parts:
            number, _, answer = self.answers.get(row, (None, 0, None))
            if number is None or answer is None:
                continue
            if answer.best:
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
                if answer.best:
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
            events = list(answer.chosen())
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
                    self.next = (number, *self._build_requests(job))
                except ValueError as error:
                    yield number, to_rejection(error)
                    continue
                except Exception as error:
                    traceback.print_exc()
                    yield number, Error(f"{type(error).__name__} before it was answered")
                    continue
            number, requests, answer = self.next
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
            chosen = {"candidates": len(requests)} if answer.best else {}
            yield number, Started(self._settings(requests[0]) | chosen)

    def _build_requests(self, job: Job) -> tuple[list[Any], _ActiveJob]:
        """The requests of the job's candidates, mostly of one."""
        options, composite = job.options, lambda picture: picture
        if job.around is not None:
            around: Any = job.around
            mask: Any = job.mask
            if job.vary is not None:
                around, mask = random_mask(self.engine.model, around, job.vary, options.get("seed", 0))
            remaining_options = {name: value for name, value in options.items() if name != "generator"}
            options, composite = prepare_inpainting(
                self.engine.model, around, mask, options.get("generator"), remaining_options
            )
        if job.candidates == 1:
            request = self.engine.request(job.prompt, job.output, previews=job.previews, **options)
            return [request], _ActiveJob(job, StopStringFilter(job.stop), composite)
        document, requests = self.engine.rivals(job.prompt, job.output, job.candidates, **options)

        def best(answers: list[Any]) -> Any:
            return self.engine.best([document], job.output, [answers])[0]

        return requests, _ActiveJob(job, StopStringFilter(job.stop), composite, best)

    def _settings(self, request: Any) -> dict[str, Any]:
        """As users name them; of what makes pictures only where there may be some."""
        said: dict[str, Any] = {"seed": request.seed}
        if request.output != "image":
            said["text"] = {"temperature": request.text.temperature, "top_p": request.text.top_p}
            if request.text.repetition_penalty != 1:
                said["text"]["repetition_penalty"] = request.text.repetition_penalty
            said["max_tokens"] = request.max_tokens
        if request.output != "text":
            defaults, scales = default_options(self.engine.model, request.generator), request.guidance.scales
            said |= {"generator": request.generator, "guidance": scales[0] if len(scales) == 1 else list(scales)}
            options = {name: getattr(request.image, name) for name in SAMPLING_OPTION_NAMES}
            options |= {
                name: getattr(request, name) or defaults.get(name) for name in ("steps", "sampler", "accelerate")
            }
            options |= {"guidance_kind": request.guidance.guider}
            takes = self.engine.model.generators[request.generator].takes
            said |= {name: value for name, value in options.items() if name in takes and value is not None}
        return said


class SequentialWorker(_BaseWorker):
    """Answers with what is no `Engine`, a pipeline or a pair: one job after the other, each by its stream."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.now: tuple[int, Iterator[Any], _ActiveJob] | None = None
        self.usual: dict[str, Any] = getattr(getattr(engine, "painter", engine), "sampling", {})

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
            if job.vary is not None:
                yield number, Rejected("this model does not vary pictures: say what to draw")
                return
            self.now = number, self._parts(job), _ActiveJob(job, StopStringFilter(job.stop), lambda picture: picture)
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
        defaults = {} if job.output == "text" else dict(self.usual)
        if job.output != "image" and hasattr(self.engine, "text_options"):
            text = self.engine.text_options(job.options)
            defaults["text"] = {name: value for name, value in text.items() if name != "max_tokens"}
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
        from unigen.inference.engine import Engine

        engine = loading.load(**source)
        worker: Any = BatchedWorker(engine, slots) if isinstance(engine, Engine) else SequentialWorker(engine)
        sender.send((None, Ready(engine.info() | {"outputs": list(engine.outputs)})))
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
