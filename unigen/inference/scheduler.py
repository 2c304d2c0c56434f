"""The only loop that calls the backbone to generate: requests on their way, that join, are batched, and leave.

    running = engine.running()
    running.add(engine.request("two apples", "image"))
    while running:
        for number, part in running.step(): ...
        running.ended                               # number -> Usage, of those that ended in this step
        running.failed                              # number -> error, of those that had to be given up in it

Each request is a row of the batch with one cache slot for every branch of guidance. In a step every active row reads
what its generator asks for, whatever it is writing, and the backbone runs once for all that read about as much: a
prompt that joins does not make the others wait for padding. Rows end on their own, and a row's randomness is its own,
so that a picture does not depend on the batch it was made in.
Does not depend on: files, HTTP, how a chat is laid out, how any generator works, what users call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from unigen.document import Document, Preview, Segment
from unigen.generators.base import GenerationState, Generator, SegmentSpec, StepInput
from unigen.generators.next_token import Text
from unigen.inference.request import Request
from unigen.media.pixels import to_images
from unigen.model.unified import UnifiedModel
from unigen.samplers.guidance import Guidance
from unigen.samplers.seeds import make_rng
from unigen.utils.numbers import NonFiniteError

MAX_CHARS_PER_POSITION = 16
"""Of a text for each position of the context, above which it is not split into tokens: a token of words has fewer."""
PADDING_COST = 64
"""Positions of padding that cost about as much as another pass of the backbone."""


@dataclass
class Row:
    """One answer on its way. `number`: among those that are. `unread[b]`: ids that branch b reads before what the
    generator asks for. `spans`: how many were begun, `images`: how many of them have ended as pictures, `said`: ids of
    text in those that have ended. `kept`: how many positions of the span the cache holds. `shown`: the text of the span
    that was given out. `features`: of pictures in the prompt that are not read as codes. `states`: by branch, those of
    all that was read (S, D), where a generator wants them.
    `shares`: how many of the times for a preview have passed, and `previews`: how many were shown, of the picture.
    `asked`: ids of the prompt, `seen` of them of pictures; `cut`: did the last text end at its limit? `before`: ids of
    the prompt and of the texts that have ended."""

    request: Request
    document: Document
    number: int = -1
    slots: list[int] = field(default_factory=list)
    pending_ids: list[list[int]] = field(default_factory=list)
    state: GenerationState | None = None
    generator: Generator | None = None
    spans: int = 0
    images: int = 0
    said: int = 0
    kept: int = 0
    shown: str = ""
    shares: int = 0
    previews: int = 0
    asked: int = 0
    seen: int = 0
    cut: bool = False
    features: torch.Tensor | None = None
    before: set[int] = field(default_factory=set)
    states: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def branches(self) -> int:
        return len(self.pending_ids)


@dataclass(frozen=True)
class Usage:
    """What a request took: ids read as its prompt, ids of text and codes of pictures written. cut: its text ended at
    the limit of the request or of the model's context, and not by itself. seen: of the ids read, those of pictures."""

    read: int
    text: int
    image: int
    cut: bool
    seen: int


class Scheduler:
    """Requests on their way with one model: they join between steps, and leave when they are done or dropped."""

    def __init__(self, model: UnifiedModel) -> None:
        self.model = model
        self.cache = model.backbone.new_cache(0, model.device)
        self._sequences: dict[int, Row] = {}
        self._count = 0
        self.ended: dict[int, Usage] = {}
        self.failed: dict[int, NonFiniteError] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, number: int) -> bool:
        return number in self._sequences

    @torch.inference_mode()
    def add(self, request: Request) -> int:
        """The request's number, from 0 on. Raises ValueError for what cannot fit the context; nothing is added then."""
        return self.join(self.row(request))

    def join(self, row: Row) -> int:
        """The same of a row that `row` made."""
        row.number, self._count = self._count, self._count + 1
        self._sequences[row.number] = row
        return row.number

    @property
    def finished(self) -> float:
        """How many of the requests that were added have ended, and of those that ask for one picture their shares."""
        return self._count - len(self._sequences) + sum(map(_request_progress, self._sequences.values()))

    def clear(self) -> None:
        """Drop all that are running."""
        for number in list(self._sequences):
            self.drop(number)

    @property
    def positions(self) -> int:
        """How many the cache holds."""
        return int(self.cache.lengths.sum())

    @torch.inference_mode()
    def drop(self, number: int) -> None:
        """Leave a request unfinished; its slots are free at once. KeyError where it is not running."""
        self._resize_slots(self._sequences[number], 0)
        del self._sequences[number]

    def _resize_slots(self, row: Row, branches: int) -> None:
        """Give a row as many slots as it has branches: those of guidance while it writes a picture."""
        while len(row.slots) > branches:
            slot = row.slots.pop()
            row.states.pop(len(row.slots), None)
            moved_slot = self.cache.leave(slot)
            for sequence in self._sequences.values():
                sequence.slots = [slot if one == moved_slot else one for one in sequence.slots]
        while len(row.slots) < branches:
            row.slots.append(self.cache.take())

    def usage(self, number: int) -> Usage:
        """What a request that is running has taken so far. KeyError where it is not running."""
        sequence = self._sequences[number]
        text = (
            sequence.state.ids
            if sequence.state and isinstance(sequence.generator, Text) and not sequence.state.done
            else []
        )
        codes = sequence.images * sequence.request.grid[0] * sequence.request.grid[1]
        return Usage(sequence.asked, sequence.said + len(text), codes, sequence.cut, sequence.seen)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Any]]:
        """One step of all: (number, piece of text or picture) of what it made. Those that are done or failed are gone
        afterwards. A row fails alone, where its numbers are not finite; the others go on."""
        sequences = list(self._sequences.values())
        self._write(sequences)
        return self._postprocess(sequences)

    @torch.no_grad()
    def states(self, request: Request) -> torch.Tensor:
        """What the backbone makes of a request's prompt, states (S, D). Nothing else may be on its way."""
        sequence = self.row(request)
        assert sequence.generator is not None and sequence.state is not None and not self._sequences
        self._resize_slots(sequence, sequence.branches)
        hidden_of = self._run_backbone([sequence], [sequence.generator.ask(sequence.state)])
        self._resize_slots(sequence, 0)
        if not bool(hidden_of[0].isfinite().all()):
            raise self._non_finite_error("states")
        return hidden_of[0]

    # ---------------------------------------------------------------- a step

    def _write(self, rows: list[Row]) -> None:
        """One step of each row's generator."""
        for sequence in rows:
            self._resize_slots(sequence, sequence.branches)
        step_inputs = [
            sequence.generator.ask(sequence.state) for sequence in rows if sequence.generator and sequence.state
        ]
        lengths = [
            max(map(len, sequence.pending_ids)) + len(step_input.ids)
            for sequence, step_input in zip(rows, step_inputs, strict=True)
        ]
        for bucket in bucket_rows(lengths, [sequence.branches for sequence in rows]):
            bucket_sequences, reads = [rows[i] for i in bucket], [step_inputs[i] for i in bucket]
            if lengths[bucket[0]]:
                hidden_of = self._run_backbone(bucket_sequences, reads)
            else:
                empty_LD = self.model.embed(torch.zeros(0, dtype=torch.int64, device=self.model.device))
                hidden_of = {slot: empty_LD for sequence in bucket_sequences for slot in sequence.slots}
            self._step_generators(bucket_sequences, reads, hidden_of)

    def _run_backbone(self, rows: list[Row], asked: list[StepInput]) -> dict[int, torch.Tensor]:
        """One pass of the backbone for these rows, in the order of their slots, which are read as they lie: the states
        (L, D) of each slot."""
        lengths = [
            len(ids) + len(step_input.ids)
            for sequence, step_input in zip(rows, asked, strict=True)
            for ids in sequence.pending_ids
        ]
        slots = [slot for sequence in rows for slot in sequence.slots]
        order = sorted(range(len(slots)), key=slots.__getitem__)
        embeds_BLD, attend_until_BL = self._build_inputs(rows, asked, max(lengths))
        if order != list(range(len(order))):
            embeds_BLD, attend_until_BL = embeds_BLD[order], None if attend_until_BL is None else attend_until_BL[order]
        positions_BL, mask = self.cache.begin([slots[i] for i in order], max(lengths), attend_until_BL)
        hidden_BLD = self.model.cached_hidden_states(embeds_BLD, positions_BL, mask, self.cache)
        return {slots[i]: hidden_BLD[index, : lengths[i]] for index, i in enumerate(order)}

    def _step_generators(self, rows: list[Row], asked: list[StepInput], hidden_of: dict[int, torch.Tensor]) -> None:
        """Let the rows' generators go on, by the states (L, D) of each slot."""
        groups: dict[int, list[int]] = {}
        hidden: list[list[torch.Tensor]] = []
        for i, sequence in enumerate(rows):
            hidden.append(self._told(sequence, [hidden_of[slot] for slot in sequence.slots], len(asked[i].ids)))
            groups.setdefault(id(sequence.generator), []).append(i)
        num_kept = [0] * len(rows)
        for members in groups.values():
            generator = rows[members[0]].generator
            assert generator is not None
            states = [rows[i].state for i in members]
            counts = generator.advance(self.model, states, [hidden[i] for i in members])  # type: ignore[arg-type]
            for i, count in zip(members, counts, strict=True):
                num_kept[i] = count
        for sequence, step_input, count in zip(rows, asked, num_kept, strict=True):
            self.cache.keep(sequence.slots, [len(ids) + count for ids in sequence.pending_ids])
            for branch, states_LD in sequence.states.items():
                sequence.states[branch] = states_LD[: len(states_LD) - len(step_input.ids) + count]
            sequence.pending_ids = [[] for _ in sequence.pending_ids]
            sequence.kept += count

    def _build_inputs(
        self, rows: list[Row], asked: list[StepInput], length: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What all branches read, (B, length, D), and how far each position sees, None where all are causal."""
        branches = [
            (ids, step_input, step_input.blind if b and step_input.blind else step_input.ids)
            for sequence, step_input in zip(rows, asked, strict=True)
            for b, ids in enumerate(sequence.pending_ids)
        ]
        padded = [ids + own + [0] * (length - len(ids) - len(own)) for ids, _, own in branches]
        ids_BL = torch.tensor(padded, device=self.model.device)
        sequences = [sequence for sequence in rows for _ in sequence.pending_ids]
        if any(sequence.features is not None for sequence in rows):
            feature_index_BL = ids_BL - self.model.vocabulary.size
            embeds_BLD = self.model.embed(ids_BL.clamp(max=self.model.vocabulary.size - 1))
            for b, sequence in enumerate(sequences):
                if sequence.features is not None:
                    is_feature_L = feature_index_BL[b] >= 0
                    embeds_BLD[b, is_feature_L] = sequence.features[feature_index_BL[b, is_feature_L]].to(embeds_BLD)
        else:
            embeds_BLD = self.model.embed(ids_BL)
        attend_until_BL = None
        prefixes = [self.model.template.bidirectional_prefix(ids) for ids, _, _ in branches]
        if any(prefixes) or any(step_input.attend_until for step_input in asked):
            attend_until_BL = torch.arange(length).repeat(len(branches), 1)
        for b, (ids, step_input, _) in enumerate(branches):
            spec = slice(len(ids), len(ids) + len(step_input.ids))
            if step_input.embeds is not None:
                embeds_BLD[b, spec.stop - len(step_input.embeds) : spec.stop] = step_input.embeds
            if attend_until_BL is not None:
                attend_until_BL[b, : prefixes[b]] = prefixes[b] - 1
            if attend_until_BL is not None and step_input.attend_until:
                attend_until_BL[b, spec] = torch.tensor(step_input.attend_until) + len(ids)
        return embeds_BLD, attend_until_BL

    def _told(self, row: Row, states: list[torch.Tensor], asked: int) -> list[torch.Tensor]:
        """What the row's generator gets of each branch: the states of what it asked for, or of all that was read."""
        assert row.generator is not None
        if self.model.generators[row.request.generator].needs_context:
            for branch, states_LD in enumerate(states):
                previous = [row.states[branch]] if branch in row.states else []
                row.states[branch] = torch.cat([*previous, states_LD])
        if row.generator.needs_context:
            return [row.states[branch] for branch, _ in enumerate(states)]
        return [states_LD[len(states_LD) - max(asked, 1) :] for states_LD in states]  # the prompt's last, if none

    def _postprocess(self, rows: list[Row]) -> list[tuple[int, Any]]:
        """What this step made of these rows' answers; those that are done leave."""
        self.ended, self.failed = {}, {}
        for sequence in rows:
            if sequence.state and not sequence.state.finite:
                self.failed[sequence.number] = self._non_finite_error("scores")
        rows = [sequence for sequence in rows if sequence.number not in self.failed]
        finished = [sequence for sequence in rows if sequence.state and sequence.state.done]
        parts = [(sequence.number, part) for sequence, part in self._parts(finished, rows)]
        for number in self.failed:
            self.cache.clear(self._sequences[number].slots)
            self.drop(number)
        for sequence in finished:
            if sequence.state and sequence.state.done and sequence.number not in self.failed:
                self.ended[sequence.number] = self.usage(sequence.number)
                self.drop(sequence.number)
        return parts

    def _parts(self, ended: list[Row], rows: list[Row]) -> Iterator[tuple[Row, Any]]:
        """Text as it comes, previews that are due, and the pictures of the spans that ended, which then go on."""
        text = self.model.generators.get("text")
        for sequence in rows:
            if sequence.generator is text and sequence.state is not None:
                piece = self._text_delta(sequence)
                if piece:
                    yield sequence, piece
            elif sequence.request.previews and (preview := self._preview(sequence)):
                yield sequence, preview
        for sequence in ended:
            generator, state = sequence.generator, sequence.state
            if generator is None or generator is text or state is None:
                continue
            try:
                image, codes_hw = self._picture(generator, state)
            except NonFiniteError:
                self.failed[sequence.number] = self._non_finite_error("pixels")
                continue
            if sequence.request.output == "pair":
                yield sequence, self._joint_text(sequence)
            sequence.document.segments.append(Segment(image=image if codes_hw is None else codes_hw, role="assistant"))
            sequence.request.written.append(state.native_codes)
            yield sequence, image
        for sequence in ended:
            if sequence.number not in self.failed:
                self._start_next_segment(sequence, drew=sequence.generator is not text)

    def _non_finite_error(self, what: str) -> NonFiniteError:
        return NonFiniteError(what, self.model.dtype)

    def _picture(self, generator: Generator, state: GenerationState) -> tuple[Image.Image, torch.Tensor | None]:
        """A span's picture, and its codes (h, w) where the model reads them as such. One by one: how a convolution
        rounds depends on how many there are."""
        with self.model.decode_autocast():
            decoded = generator.pictures(self.model, [state])
            if decoded.is_floating_point():
                return to_images(decoded.float())[0], None
            return self.model.decode_images(decoded)[0], decoded[0]

    def _preview(self, row: Row) -> Preview | None:
        """The row's picture as it looks now, where so much more of it is done that it is to be shown."""
        generator, state = row.generator, row.state
        assert generator is not None and state is not None
        steps_done, steps = state.progress
        milestone = steps_done * (row.request.previews + 1) // steps
        if state.done or milestone <= row.shares:
            return None
        row.shares, row.previews = milestone, row.previews + 1
        try:
            return Preview(self._picture(generator, state)[0], row.images, row.previews - 1)
        except NonFiniteError:
            self.failed[row.number] = self._non_finite_error("pixels")
            return None

    def _start_next_segment(self, row: Row, drew: bool) -> None:
        """Begin the next span of a row whose span has ended, or leave the row done.

        A picture that the cache does not hold as later segments read it is taken back and read again.
        """
        state, request = row.state, row.request
        assert state is not None
        if drew:
            row.images += 1
            if request.output == "interleaved":
                template = self.model.template
                layout = template.layout(request.grid)
                if row.generator is not None and row.generator.cache_reusable:
                    row.pending_ids = [list(state.pending_ids)]
                else:
                    self.cache.keep(row.slots[:1], [-row.kept])
                    if 0 in row.states:
                        row.states[0] = row.states[0][: len(row.states[0]) - row.kept]
                    request.document = row.document = self.model.encode_document(row.document)
                    codes_hw = row.document.segments[-1].image
                    assert isinstance(codes_hw, torch.Tensor), "encode_document gives codes"
                    ids_hw = self.model.vocabulary.image_ids(codes_hw)
                    row.pending_ids = [
                        [template.begin_ids[template.context_generator], *layout.opening, *layout.to_ids(ids_hw)]
                    ]
                row.pending_ids[0] += layout.closing
                row.before.update((*state.span.head, *layout.closing))
                self._start_text(row, row.pending_ids[0].pop())
        else:
            if state.ids:
                text = self.model.template.decode(state.ids)
                row.document.segments.append(Segment(text=text, role="assistant"))
                row.said += len(state.ids)
                row.before.update(state.ids)
            row.cut = not state.pending_ids or state.pending_ids[0] not in state.span.stops
            if state.pending_ids and state.pending_ids[0] in self._image_begin_ids:
                row.pending_ids = [[]]
                self._start_image(row)

    # ---------------------------------------------------------------- rows and their spans

    def row(self, request: Request) -> Row:
        """A row for a request, its first span begun. Raises ValueError for what cannot fit the context."""
        self._check_length(request.document)
        request.document = self.model.encode_document(request.document)
        sequence = Row(request, request.document)
        sequence.features = self.model.image_features(sequence.document)
        uncond = request.output == "pair" and not self._prefix_text_ids(sequence)
        tokens = self.model.template.prompt(sequence.document, output=request.output, branch=uncond)
        ids, sequence.seen = self.model.token_ids(tokens), sum(stop - start for start, stop in tokens.spans)
        num_positions = 1 if request.output == "text" else self._image_length(request)
        sequence.pending_ids, sequence.asked, sequence.before = [ids], len(ids), set(ids)
        if request.output in ("image", "pair"):
            self._start_image(sequence)
        num_positions += max(len(branch) for branch in sequence.pending_ids)
        if num_positions > self.model.max_length:
            raise ValueError(
                f"the prompt needs {num_positions} positions, the model has {self.model.max_length}: shorten it"
            )
        if request.output not in ("image", "pair"):
            self._start_text(sequence, sequence.pending_ids[0].pop())
        return sequence

    def _check_length(self, document: Document) -> None:
        """Refuse what is far too long before its texts are split into tokens and its pictures encoded."""
        context, step_inputs = self.model.max_length, self.model.image_tokenizer.grid
        if (characters := document.characters()) > MAX_CHARS_PER_POSITION * context:
            raise ValueError(
                f"the prompt has {characters:,} characters, the model reads {context:,} positions: shorten it"
            )
        pictures, sight = len(document.images()), self.model.sight
        if sight is not None:
            min_tokens = sight.positions
        else:
            min_tokens = 1 if self.model.template.variable_size else step_inputs[0] * step_inputs[1]
        if pictures * min_tokens > context:
            raise ValueError(
                f"the prompt has {pictures} pictures, the model reads {context:,} positions: leave some out"
            )

    def _image_length(self, request: Request) -> int:
        """Positions that a picture needs, written and read back."""
        layout, name = self.model.template.layout(request.grid), request.generator
        has_begin_token = name in self.model.template.begin_ids
        own = 0 if name == "next-token" else self.model.generators[name].positions() + 2 * has_begin_token
        return max(len(layout) - (not has_begin_token), own)

    @property
    def _image_begin_ids(self) -> list[int]:
        """Whichever way of writing the text announces, the picture is written as the request says."""
        return [id for name, id in self.model.template.begin_ids.items() if name in self.model.generators]

    def _rng(self, row: Row) -> torch.Generator:
        """Each span draws from a generator of its own, made of the request's seed and the span's number."""
        row.spans += 1
        request = row.request
        return make_rng(request.seed, *([request.candidate_index] if request.candidate_index else []), row.spans)

    def _start_image(self, row: Row) -> None:
        """The main branch goes on in its slot; the blind one is read anew, with the pictures made so far."""
        request = row.request
        if request.guidance.branches > 1:
            prompt = self.model.template.prompt
            row.pending_ids = [row.pending_ids[0]]
            for branch in range(1, request.guidance.branches):
                row.pending_ids.append(self.model.token_ids(prompt(row.document, output=request.output, branch=branch)))
        row.generator = self.model.generators[request.generator]
        begin = self.model.template.begin_ids.get(request.generator)  # None where the prompt opens the picture
        layout = self.model.template.layout(request.grid)
        fixed = request.fixed
        if fixed is not None:
            fixed = torch.where(fixed < 0, fixed, self.model.vocabulary.image_ids(fixed))
        spec = SegmentSpec(begin or 0, request.image, request.guidance, self._rng(row), request.grid, fixed=fixed)
        spec.opening, spec.row_end = () if begin is None else (begin, *layout.opening), layout.row_end
        spec.steps, spec.sampler, spec.accelerate = request.steps, request.sampler, request.accelerate
        spec.text_ids = self._prefix_text_ids(row)
        row.state, row.kept = row.generator.start(spec), 0
        row.shares = row.previews = 0

    def _prefix_text_ids(self, row: Row) -> list[int] | None:
        """The ids of the text that a picture's span opens with; None where it has none, or is to write it."""
        template, generator = self.model.template, row.request.generator
        if generator not in template.text_lengths or not any((s.text or "").strip() for s in row.document.segments):
            return None
        return template.prefix_text_ids(row.document, generator)

    def _joint_text(self, row: Row) -> str:
        """What stands in the text of a finished span, up to its end."""
        assert row.state is not None
        ids = row.state.text
        ends = [n for n, id in enumerate(ids) if id in self.model.template.stop_token_ids]
        return self.model.template.decode(ids[: ends[0]] if ends else ids)

    def _start_text(self, row: Row, begin: int) -> None:
        """Text may end in a picture while the answer may have more of them and the context has room for one."""
        request = row.request
        template = self.model.template
        row.shown = ""
        positions_used = len(template.prompt(row.document, output=request.output)) + 1
        positions_left = self.model.max_length - positions_used - 1
        stops = list(template.stop_token_ids)
        picture = self._image_length(request) + 1
        if request.output == "interleaved" and row.images < request.max_images and positions_left > picture:
            stops += self._image_begin_ids
            positions_left -= picture
        limit = max(1, min(request.max_tokens - row.said, positions_left))
        row.generator = self.model.generators["text"]
        spec = SegmentSpec(begin, request.text, Guidance((1.0,)), self._rng(row), stops=tuple(stops), max_tokens=limit)
        if request.text.repetition_penalty != 1:
            spec.before = frozenset(row.before)
        row.state = row.generator.start(spec)

    def _text_delta(self, row: Row) -> str:
        """What the row's text has gained since it was last shown; an unfinished character waits for its last byte."""
        assert row.state is not None
        text = self.model.template.decode(row.state.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not row.state.done:
            return ""
        new = text[len(row.shown) :]
        row.shown = text
        return new


def _request_progress(row: Row) -> float:
    """The share of a request for one picture that is written, in [0, 1]; 0 where that is not known."""
    if row.state is None or row.request.output not in ("image", "pair"):
        return 0.0
    steps_done, steps = row.state.progress
    if not steps_done:  # written code by code, in an order of their own some
        steps_done, steps = len(getattr(row.state, "written", row.state.ids)), row.request.grid[0] * row.request.grid[1]
    return min(steps_done / steps, 1.0)


def bucket_rows(lengths: list[int], branches: list[int]) -> list[list[int]]:
    """Rows that one pass reads together: others where padding would cost more than `PADDING_COST` positions, and where
    there is nothing to read."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    passes, begin = [], 0
    for index in range(1, len(order)):
        remaining = sum(branches[i] for i in order[index:])
        saved_positions = lengths[order[begin]] - lengths[order[index]]
        if (saved_positions * remaining > PADDING_COST and 2 * saved_positions > lengths[order[begin]]) or (
            saved_positions and not lengths[order[index]]
        ):
            passes.append(order[begin:index])
            begin = index
    return [sorted(sequences) for sequences in [*passes, order[begin:]]]
