"""The only loop that calls the backbone to generate: requests join, are batched, and leave.

    scheduler = engine.new_scheduler()
    scheduler.add_request(engine.request("two apples", "image"))
    while scheduler:
        for request_id, part in scheduler.step(): ...
        scheduler.finished                          # request_id -> Usage, of those that ended in this step
        scheduler.failed                            # request_id -> error, of those that were given up in it

Each request is a sequence with one cache slot for every branch of guidance. In a step every sequence reads what its
generator asks for, whatever it is writing, and the backbone runs once for all that read about as much: a prompt that
joins does not make the others wait for padding. Sequences end on their own, and each has its own randomness, so that a
picture does not depend on the batch it was made in.
Does not depend on: files, HTTP, how a chat is laid out, how any generator works, what users call.
Shapes: B branches of all sequences, L positions of a step, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image

from unigen.batch import InputSpan
from unigen.document import Preview, Segment
from unigen.generators.base import GenerationState, StepInput
from unigen.inference import segments
from unigen.inference.request import Request
from unigen.inference.results import Usage
from unigen.inference.sequence import SequenceState, record_segment, sequence_progress
from unigen.model.inputs import ModelInputs, PromptSpan, build_inputs
from unigen.model.unified import UnifiedModel
from unigen.utils.numbers import NonFiniteError

PADDING_COST = 64
"""Positions of padding that cost about as much as another pass of the backbone."""

Part = str | Image.Image | Preview
"""A piece of an answer: of its text, a finished picture, or a picture as it looks now."""


class Scheduler:
    """Requests on their way with one model: they join between steps, and leave when they are done or aborted."""

    def __init__(self, model: UnifiedModel) -> None:
        self.model = model
        self.cache = model.backbone.new_cache(0, model.device)
        self._sequences: dict[int, SequenceState] = {}
        self._count = 0
        self.finished: dict[int, Usage] = {}
        """What requests have taken that ended in the last step."""
        self.failed: dict[int, NonFiniteError] = {}
        """Errors of requests that were given up in the last step."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._sequences

    @torch.inference_mode()
    def add_request(self, request: Request) -> int:
        """Add a request.

        Returns:
            The request's id: requests are counted from 0.

        Raises:
            ValueError: it does not fit the context. Nothing is added then.
        """
        return self.add_sequence(self.new_sequence(request))

    def new_sequence(self, request: Request) -> SequenceState:
        """A sequence for a request, which `add_sequence` takes. Raises ValueError for what does not fit the context."""
        return segments.new_sequence(self.model, request)

    def add_sequence(self, sequence: SequenceState) -> int:
        """Add what `new_sequence` made; returns its id."""
        sequence.request_id, self._count = self._count, self._count + 1
        self._sequences[sequence.request_id] = sequence
        return sequence.request_id

    @torch.inference_mode()
    def abort(self, request_id: int) -> None:
        """Leave a request unfinished; its slots are free at once. Raises KeyError where it is not running."""
        self._resize_slots(self._sequences[request_id], 0)
        del self._sequences[request_id]

    def abort_all(self) -> None:
        for request_id in list(self._sequences):
            self.abort(request_id)

    @property
    def num_completed(self) -> float:
        """How many of the requests that were added have ended, and the finished shares of those that ask for one
        picture."""
        return self._count - len(self._sequences) + sum(map(sequence_progress, self._sequences.values()))

    @property
    def num_cached_tokens(self) -> int:
        """Positions that the cache holds."""
        return int(self.cache.lengths.sum())

    def usage(self, request_id: int) -> Usage:
        """What a request that is running has taken so far. Raises KeyError where it is not running."""
        sequence = self._sequences[request_id]
        writes_text = sequence.state is not None and not sequence.state.done and self._writes_text(sequence)
        text_tokens = len(sequence.state.ids) if sequence.state and writes_text else 0
        return Usage(
            prompt_tokens=sequence.prompt_tokens,
            text_tokens=sequence.num_text_tokens + text_tokens,
            image_tokens=sequence.num_images * sequence.request.grid[0] * sequence.request.grid[1],
            truncated=sequence.truncated,
            image_prompt_tokens=sequence.image_prompt_tokens,
        )

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Part]]:
        """One step of all sequences. Those that are done or failed are gone afterwards. A sequence fails alone, where
        its numbers are not finite; the others go on.

        Returns:
            (request id, piece of its answer), in the order in which the requests were added.
        """
        sequences = list(self._sequences.values())
        self._step_all(sequences)
        return self._postprocess(sequences)

    @torch.no_grad()
    def hidden_states(self, request: Request) -> torch.Tensor:
        """The hidden states (S, D) of a request's prompt after the last norm. Nothing else may be on its way."""
        sequence = self.new_sequence(request)
        assert sequence.generator is not None and sequence.state is not None and not self._sequences
        self._resize_slots(sequence, sequence.num_branches)
        hidden_of = self._run_backbone([sequence], [sequence.generator.prepare_step(sequence.state)])
        self._resize_slots(sequence, 0)
        if not bool(hidden_of[0].isfinite().all()):
            raise self._non_finite_error("states")
        return hidden_of[0]

    # ---------------------------------------------------------------- a step

    def _resize_slots(self, sequence: SequenceState, num_slots: int) -> None:
        """Give a sequence as many slots as it has branches: those of guidance while it writes a picture."""
        while len(sequence.slots) > num_slots:
            slot = sequence.slots.pop()
            sequence.hidden_states.pop(len(sequence.slots), None)
            moved_slot = self.cache.free(slot)
            for other in self._sequences.values():
                other.slots = [slot if one == moved_slot else one for one in other.slots]
        while len(sequence.slots) < num_slots:
            sequence.slots.append(self.cache.allocate())

    def _step_all(self, sequences: list[SequenceState]) -> None:
        """One step of each sequence's generator."""
        for sequence in sequences:
            self._resize_slots(sequence, sequence.num_branches)
        step_inputs = [
            sequence.generator.prepare_step(sequence.state)
            for sequence in sequences
            if sequence.generator and sequence.state
        ]
        lengths = [
            max(map(len, sequence.pending_ids)) + len(step_input.ids)
            for sequence, step_input in zip(sequences, step_inputs, strict=True)
        ]
        for bucket in bucket_rows(lengths, [sequence.num_branches for sequence in sequences]):
            bucket_sequences, bucket_inputs = [sequences[i] for i in bucket], [step_inputs[i] for i in bucket]
            if lengths[bucket[0]]:
                hidden_of = self._run_backbone(bucket_sequences, bucket_inputs)
            else:
                empty_LD = self.model.embed(torch.zeros(0, dtype=torch.int64, device=self.model.device))
                hidden_of = {slot: empty_LD for sequence in bucket_sequences for slot in sequence.slots}
            self._step_generators(bucket_sequences, bucket_inputs, hidden_of)

    def _run_backbone(self, sequences: list[SequenceState], step_inputs: list[StepInput]) -> dict[int, torch.Tensor]:
        """One pass of the backbone for these sequences, in the order of their slots: the cache is read without copies.

        Returns:
            By slot, the hidden states (L, D) of what was read.
        """
        lengths = [
            len(ids) + len(step_input.ids)
            for sequence, step_input in zip(sequences, step_inputs, strict=True)
            for ids in sequence.pending_ids
        ]
        slots = [slot for sequence in sequences for slot in sequence.slots]
        order = sorted(range(len(slots)), key=slots.__getitem__)
        inputs = self._build_inputs(sequences, step_inputs, max(lengths))
        embeds_BLD, attend_until_BL = inputs.embeds_BLD, inputs.attend_until_BL
        if order != list(range(len(order))):
            embeds_BLD, attend_until_BL = embeds_BLD[order], None if attend_until_BL is None else attend_until_BL[order]
        positions_BL, mask = self.cache.begin_step([slots[i] for i in order], max(lengths), attend_until_BL)
        hidden_BLD = self.model.cached_hidden_states(embeds_BLD, positions_BL, mask, self.cache)
        return {slots[i]: hidden_BLD[index, : lengths[i]] for index, i in enumerate(order)}

    def _build_inputs(self, sequences: list[SequenceState], step_inputs: list[StepInput], length: int) -> ModelInputs:
        """What all branches read: ids that are pending, with features of the prompt's pictures, then what the generator
        asks for."""
        padded_ids: list[list[int]] = []
        spans: list[InputSpan] = []
        for sequence, step_input in zip(sequences, step_inputs, strict=True):
            for branch, pending_ids in enumerate(sequence.pending_ids):
                row = len(padded_ids)
                step_ids = step_input.uncond_ids if branch and step_input.uncond_ids else step_input.ids
                padded_ids.append(pending_ids + step_ids + [0] * (length - len(pending_ids) - len(step_ids)))
                if sequence.prompt_spans[branch]:
                    start = int(self.cache.lengths[sequence.slots[branch]])
                    spans += prompt_spans(sequence.prompt_spans[branch], row, start, start + len(pending_ids))
                if prefix := self.model.template.bidirectional_prefix(pending_ids):
                    spans.append(InputSpan(row, slice(0, prefix), attend_until=prefix - 1))
                spans += step_spans(step_input, row, len(pending_ids))
        ids_BL = torch.tensor(padded_ids, device=self.model.device)
        return build_inputs(self.model, ids_BL, spans, mask_device=torch.device("cpu"))

    def _step_generators(
        self, sequences: list[SequenceState], step_inputs: list[StepInput], hidden_of: dict[int, torch.Tensor]
    ) -> None:
        """Step the sequences' generators, those of one generator together.

        Args:
            hidden_of: by slot, the hidden states (L, D) of what was read.
        """
        groups: dict[int, list[int]] = {}
        hidden: list[list[torch.Tensor]] = []
        for i, sequence in enumerate(sequences):
            hidden.append(self._hidden_for(sequence, [hidden_of[slot] for slot in sequence.slots], step_inputs[i]))
            groups.setdefault(id(sequence.generator), []).append(i)
        num_kept = [0] * len(sequences)
        for members in groups.values():
            generator = sequences[members[0]].generator
            assert generator is not None
            states = [state for i in members if (state := sequences[i].state) is not None]
            counts = generator.step(self.model, states, [hidden[i] for i in members])
            for i, count in zip(members, counts, strict=True):
                num_kept[i] = count
        for sequence, step_input, count in zip(sequences, step_inputs, num_kept, strict=True):
            self.cache.commit(sequence.slots, [len(ids) + count for ids in sequence.pending_ids])
            for branch, states_SD in sequence.hidden_states.items():
                sequence.hidden_states[branch] = states_SD[: len(states_SD) - len(step_input.ids) + count]
            sequence.pending_ids = [[] for _ in sequence.pending_ids]
            sequence.num_cached += count

    def _hidden_for(
        self, sequence: SequenceState, hidden: list[torch.Tensor], step_input: StepInput
    ) -> list[torch.Tensor]:
        """By branch, what the sequence's generator gets: the hidden states of what it asked for, or of all that was
        read; where it asked for nothing, of the prompt's last position."""
        assert sequence.generator is not None
        if self.model.generators[sequence.request.generator].needs_context:
            for branch, states_LD in enumerate(hidden):
                previous = [sequence.hidden_states[branch]] if branch in sequence.hidden_states else []
                sequence.hidden_states[branch] = torch.cat([*previous, states_LD])
        if sequence.generator.needs_context:
            return [sequence.hidden_states[branch] for branch, _ in enumerate(hidden)]
        num_positions = max(len(step_input.ids), 1)
        return [states_LD[len(states_LD) - num_positions :] for states_LD in hidden]

    # ---------------------------------------------------------------- after a step

    def _postprocess(self, sequences: list[SequenceState]) -> list[tuple[int, Part]]:
        """What this step made of these sequences' answers; those that are done leave."""
        self.finished, self.failed = {}, {}
        for sequence in sequences:
            if sequence.state and not sequence.state.finite:
                self.failed[sequence.request_id] = self._non_finite_error("scores")
        sequences = [sequence for sequence in sequences if sequence.request_id not in self.failed]
        ended = [(sequence, sequence.state) for sequence in sequences if sequence.state and sequence.state.done]
        parts = [(sequence.request_id, part) for sequence, part in self._collect_outputs(ended, sequences)]
        for request_id in self.failed:
            self.cache.clear(self._sequences[request_id].slots)
            self.abort(request_id)
        for sequence, _ in ended:
            if sequence.state and sequence.state.done and sequence.request_id not in self.failed:
                self.finished[sequence.request_id] = sequence.record.usage = self.usage(sequence.request_id)
                self.abort(sequence.request_id)
        return parts

    def _collect_outputs(
        self, ended: list[tuple[SequenceState, GenerationState]], sequences: list[SequenceState]
    ) -> Iterator[tuple[SequenceState, Part]]:
        """Text as it comes, previews that are due, and the pictures of segments that ended, which then go on."""
        for sequence in sequences:
            if self._writes_text(sequence):
                if delta := segments.text_delta(self.model, sequence):
                    yield sequence, delta
            elif sequence.request.previews and (preview := self._next_preview(sequence)):
                yield sequence, preview
        for sequence, state in ended:
            if not self._writes_text(sequence):
                yield from self._finished_image(sequence, state)
        for sequence, _ in ended:
            if sequence.request_id not in self.failed:
                segments.start_next_segment(self.model, sequence, self.cache)

    def _finished_image(self, sequence: SequenceState, state: GenerationState) -> Iterator[tuple[SequenceState, Part]]:
        """The picture of a segment that ended, after the text that was written with it."""
        assert sequence.generator is not None
        try:
            image, codes_hw = segments.decode_image(self.model, sequence.generator, state)
        except NonFiniteError:
            self.failed[sequence.request_id] = self._non_finite_error("pixels")
            return
        if sequence.request.output == "pair":
            yield sequence, segments.joint_text(self.model, sequence)
        sequence.document.segments.append(Segment(image=image if codes_hw is None else codes_hw, role="assistant"))
        sequence.request.written.append(state.native_codes)
        sequence.record.codes.append(codes_hw if state.native_codes is None else state.native_codes)
        record_segment(sequence, state)
        yield sequence, image

    def _next_preview(self, sequence: SequenceState) -> Preview | None:
        try:
            return segments.next_preview(self.model, sequence)
        except NonFiniteError:
            self.failed[sequence.request_id] = self._non_finite_error("pixels")
            return None

    def _writes_text(self, sequence: SequenceState) -> bool:
        return sequence.generator is not None and sequence.generator is self.model.generators.get("text")

    def _non_finite_error(self, what: str) -> NonFiniteError:
        return NonFiniteError(what, self.model.dtype)


def prompt_spans(spans: list[PromptSpan], row: int, start: int, stop: int) -> list[InputSpan]:
    """The spans of a prompt that stand in its positions `start` to `stop`, which row `row` of a step reads first."""
    return [
        InputSpan(row, slice(span.start - start, span.stop - start), span.features_PD)
        for span in spans
        if start <= span.start and span.stop <= stop
    ]


def step_spans(step_input: StepInput, row: int, start: int) -> list[InputSpan]:
    """What a generator asks for, from position `start` of row `row` on."""
    spans, stop = [], start + len(step_input.ids)
    if step_input.embeds is not None:
        spans.append(InputSpan(row, slice(stop - len(step_input.embeds), stop), step_input.embeds))
    if step_input.attend_until:
        spans.append(InputSpan(row, slice(start, stop), attend_until=torch.tensor(step_input.attend_until) + start))
    return spans


def bucket_rows(lengths: list[int], branches: list[int]) -> list[list[int]]:
    """Group rows that one pass of the backbone reads together. Rows go apart where padding would cost more than
    `PADDING_COST` positions, and where there is nothing to read.

    Args:
        lengths: positions that each row reads.
        branches: how many sequences of the batch each row takes.

    Returns:
        Row numbers, pass by pass.
    """
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
    return [sorted(rows) for rows in [*passes, order[begin:]]]
