"""The state of one answer that is being generated, and what it has taken so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from unigen.document import Document
from unigen.generators.base import GenerationState, Generator
from unigen.inference.request import Request
from unigen.inference.results import SequenceRecord, TrajectoryRecord
from unigen.model.inputs import PromptSpan
from unigen.model.template import IMAGE_OUTPUTS


@dataclass
class SequenceState:
    """One answer on its way. Segments are written one after another; each branch of guidance reads in a cache slot of
    its own."""

    request: Request
    document: Document
    """The prompt and the segments that are finished."""
    request_id: int = -1
    """The scheduler's number of the request."""
    slots: list[int] = field(default_factory=list)
    """Cache slots, one for each branch."""
    pending_ids: list[list[int]] = field(default_factory=list)
    """By branch, the ids that it reads before what the generator reads."""
    generator: Generator | None = None
    """Writes the current segment."""
    state: GenerationState | None = None
    """The current segment."""
    num_segments: int = 0
    """Segments that were begun."""
    num_images: int = 0
    """Segments that ended as pictures."""
    num_text_tokens: int = 0
    """Ids of the texts that have ended."""
    num_cached: int = 0
    """Positions of the current segment that the cache holds."""
    streamed_text: str = ""
    """Text of the current segment that was given out."""
    preview_milestones: int = 0
    """How many of the times for a preview of the current picture have passed."""
    num_previews: int = 0
    """Previews of the current picture that were given out."""
    prompt_tokens: int = 0
    """Ids of the prompt."""
    image_prompt_tokens: int = 0
    """Ids of the prompt that stand for pictures."""
    truncated: bool = False
    """Did the last text end at its limit?"""
    prompt_spans: list[list[PromptSpan]] = field(default_factory=list)
    """By branch, the positions of its prompt that read features of pictures."""
    context_ids: set[int] = field(default_factory=set)
    """Ids of the prompt and of the segments that have ended: a penalty on repetition counts them."""
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    """By branch, the hidden states (S, D) of all that was read, where a generator needs them."""
    record: SequenceRecord = field(default_factory=SequenceRecord)
    """What is kept of the answer for its `GenerationResult`."""

    @property
    def num_branches(self) -> int:
        return len(self.pending_ids)


def record_segment(sequence: SequenceState, state: GenerationState) -> None:
    """Keep what a segment that has ended drew, and what else the request records of it."""
    record, wanted = sequence.record, sequence.request.record
    record.token_ids += state.drawn_ids
    record.logprobs += state.logprobs
    if wanted.latents and state.latents is not None:
        record.latents.append(state.latents.cpu())
    if state.recorded_trajectory is not None:
        record.trajectories.append(TrajectoryRecord(*state.recorded_trajectory))


def sequence_progress(sequence: SequenceState) -> float:
    """The share of a request for one picture that is written, in [0, 1]; 0 where that is not known."""
    if sequence.state is None or sequence.request.output not in IMAGE_OUTPUTS:
        return 0.0
    steps_done, steps = sequence.state.progress
    if not steps_done:  # written code by code
        height, width = sequence.request.grid
        steps_done, steps = sequence.state.num_written, height * width
    return min(steps_done / steps, 1.0)
