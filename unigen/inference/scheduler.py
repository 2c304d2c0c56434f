"""The scheduler of continuous batching, the only loop that calls the backbone to generate.

    scheduler = engine.new_scheduler()
    scheduler.add_request(engine.build_request("two apples", "image"))
    while scheduler:
        for request_id, part in scheduler.step(): ...
        scheduler.finished                          # request_id -> Usage, of requests that ended in this step
        scheduler.failed                            # request_id -> error, of requests that failed in this step

Each request is a sequence with one cache slot for every branch of guidance. In a step every sequence reads the input of
its generator, whatever it writes, and the backbone runs once for all sequences of similar length: a new prompt does not
make the others wait for padding. Sequences end on their own, and each has its own random generators, so that an image
does not depend on its batch.
Does not depend on: files, HTTP, chat templates, how any generator works, the API for users.
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
"""Number of padding positions that cost about as much as another pass of the backbone."""

Part = str | Image.Image | Preview
"""A piece of an answer: a piece of its text, a finished image, or a preview."""


class Scheduler:
    """Runs the requests of one model: they join between steps, and leave when they are done or aborted.

    Args:
        model: the model, in evaluation mode.
    """

    def __init__(self, model: UnifiedModel) -> None:
        self.model = model
        self.cache = model.backbone.new_cache(0, model.device)
        self._sequences: dict[int, SequenceState] = {}
        self._count = 0
        self.finished: dict[int, Usage] = {}
        """Usage of the requests that ended in the last step, by id."""
        self.failed: dict[int, NonFiniteError] = {}
        """Errors of the requests that failed in the last step, by id."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._sequences

    @torch.inference_mode()
    def add_request(self, request: Request) -> int:
        """Add a request.

        Args:
            request: a validated request.

        Returns:
            The request's id: requests are counted from 0.

        Raises:
            ValueError: it does not fit the context. Nothing is added then.
        """
        return self.add_sequence(self.new_sequence(request))

    def new_sequence(self, request: Request) -> SequenceState:
        """Build a sequence, for `add_sequence`.

        Args:
            request: a validated request.

        Raises:
            ValueError: it does not fit the context.
        """
        return segments.new_sequence(self.model, request)

    def add_sequence(self, sequence: SequenceState) -> int:
        """Add a sequence.

        Args:
            sequence: from `new_sequence`.

        Returns:
            The request's id.
        """
        sequence.request_id, self._count = self._count, self._count + 1
        self._sequences[sequence.request_id] = sequence
        return sequence.request_id

    @torch.inference_mode()
    def abort(self, request_id: int) -> None:
        """Stop a request; its slots are free at once.

        Args:
            request_id: id of the request.

        Raises:
            KeyError: it is not running.
        """
        self._resize_slots(self._sequences[request_id], 0)
        del self._sequences[request_id]

    def abort_all(self) -> None:
        """Stop all requests."""
        for request_id in list(self._sequences):
            self.abort(request_id)

    @property
    def num_completed(self) -> float:
        """Number of requests that have ended, plus the finished fractions of requests for one image."""
        return self._count - len(self._sequences) + sum(map(sequence_progress, self._sequences.values()))

    @property
    def num_cached_tokens(self) -> int:
        """Number of positions in the cache."""
        return int(self.cache.lengths.sum())

    def usage(self, request_id: int) -> Usage:
        """Usage of a running request so far.

        Args:
            request_id: id of the request.

        Raises:
            KeyError: it is not running.
        """
        sequence = self._sequences[request_id]
        writes_text = sequence.state is not None and not sequence.state.finished and self._writes_text(sequence)
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
        """Run one step of all sequences. Sequences that are done or failed are removed.

        A sequence whose logits or pixels are not finite fails alone; the others continue.

        Returns:
            (request id, piece of its answer), in the order in which the requests were added.
        """
        sequences = list(self._sequences.values())
        self._step_all(sequences)
        return self._postprocess(sequences)

    @torch.no_grad()
    def hidden_states(self, request: Request) -> torch.Tensor:
        """Hidden states of a prompt. No request may be running.

        Args:
            request: a validated request.

        Returns:
            Hidden states (S, D) of the prompt's positions, after the last norm.

        Raises:
            ValueError: the prompt does not fit the context.
            NonFiniteError: a state is not finite.
        """
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
        """Give a sequence a number of slots: one for each branch of guidance while it writes an image."""
        while len(sequence.slots) > num_slots:
            slot = sequence.slots.pop()
            sequence.hidden_states.pop(len(sequence.slots), None)
            moved_slot = self.cache.free(slot)
            for other in self._sequences.values():
                other.slots = [slot if number == moved_slot else number for number in other.slots]
        while len(sequence.slots) < num_slots:
            sequence.slots.append(self.cache.allocate())

    def _step_all(self, sequences: list[SequenceState]) -> None:
        """Run one step of each sequence's generator."""
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
        """Run the backbone once for these sequences, in the order of their slots: the cache is read without copies.

        Returns:
            By slot, the hidden states (L, D) of the positions that were read.
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
        """Inputs of all branches: pending ids with features of the prompt's images, then the generators' inputs."""
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
        """Step the sequences' generators; sequences of one generator are stepped together.

        Args:
            sequences: the sequences.
            step_inputs: of each the input of its generator.
            hidden_of: by slot, the hidden states (L, D) of the positions that were read.
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
        """By branch, the hidden states for the sequence's generator: those of its input, or of all positions that were
        read; without an input, of the prompt's last position."""
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
        """The pieces of answers of this step; sequences that are done or failed are removed."""
        self.finished, self.failed = {}, {}
        for sequence in sequences:
            if sequence.state and not sequence.state.finite:
                self.failed[sequence.request_id] = self._non_finite_error("scores")
        sequences = [sequence for sequence in sequences if sequence.request_id not in self.failed]
        ended = [(sequence, sequence.state) for sequence in sequences if sequence.state and sequence.state.finished]
        parts = [(sequence.request_id, part) for sequence, part in self._collect_outputs(ended, sequences)]
        for request_id in self.failed:
            self.cache.clear(self._sequences[request_id].slots)
            self.abort(request_id)
        for sequence, _ in ended:
            if sequence.state and sequence.state.finished and sequence.request_id not in self.failed:
                self.finished[sequence.request_id] = sequence.record.usage = self.usage(sequence.request_id)
                self.abort(sequence.request_id)
        return parts

    def _collect_outputs(
        self, ended: list[tuple[SequenceState, GenerationState]], sequences: list[SequenceState]
    ) -> Iterator[tuple[SequenceState, Part]]:
        """New text, previews that are due, and images of segments that ended, whose sequences then start the next
        segment."""
        for sequence in sequences:
            if self._writes_text(sequence):
                if delta := segments.text_delta(self.model, sequence):
                    yield sequence, delta
            elif sequence.request.num_previews and (preview := self._next_preview(sequence)):
                yield sequence, preview
        for sequence, state in ended:
            if not self._writes_text(sequence):
                yield from self._finished_image(sequence, state)
        for sequence, _ in ended:
            if sequence.request_id not in self.failed:
                segments.start_next_segment(self.model, sequence, self.cache)

    def _finished_image(self, sequence: SequenceState, state: GenerationState) -> Iterator[tuple[SequenceState, Part]]:
        """The image of a segment that ended, after the text that was written with it."""
        assert sequence.generator is not None
        try:
            image, codes_hw = segments.decode_image(self.model, sequence.generator, state)
        except NonFiniteError:
            self.failed[sequence.request_id] = self._non_finite_error("pixels")
            return
        if sequence.request.output == "joint":
            yield sequence, segments.joint_text(self.model, sequence)
        sequence.document.segments.append(Segment(image=image if codes_hw is None else codes_hw, role="assistant"))
        sequence.request.native_codes.append(state.native_codes)
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

    def _non_finite_error(self, description: str) -> NonFiniteError:
        return NonFiniteError(description, self.model.dtype)


def prompt_spans(spans: list[PromptSpan], row: int, start: int, stop: int) -> list[InputSpan]:
    """The spans of image features of a prompt that one row of a step reads.

    Args:
        spans: of the whole prompt.
        row: index of the row, which reads positions of the prompt first.
        start: first of these positions.
        stop: the position after the last.
    """
    return [
        InputSpan(row, slice(span.start - start, span.stop - start), span.features_PD)
        for span in spans
        if start <= span.start and span.stop <= stop
    ]


def step_spans(step_input: StepInput, row: int, start: int) -> list[InputSpan]:
    """The spans of a generator's input.

    Args:
        step_input: the input.
        row: index of the row that reads it.
        start: its first position in the row.
    """
    spans, stop = [], start + len(step_input.ids)
    if step_input.embeds is not None:
        spans.append(InputSpan(row, slice(stop - len(step_input.embeds), stop), step_input.embeds))
    if step_input.attend_until:
        spans.append(InputSpan(row, slice(start, stop), attend_until=torch.tensor(step_input.attend_until) + start))
    return spans


def bucket_rows(lengths: list[int], branches: list[int]) -> list[list[int]]:
    """Group sequences that one pass of the backbone reads together.

    Sequences are separated where padding would cost more than `PADDING_COST` positions, and where there is nothing to
    read.

    Args:
        lengths: number of positions that each sequence reads.
        branches: number of rows of the batch that each sequence takes.

    Returns:
        Indices of sequences, pass by pass.
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
