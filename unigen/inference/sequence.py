"""The state of one answer that is being generated, and its usage so far."""

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
    """State of one answer. Segments are written one after another; each branch of guidance has its own cache slot."""

    request: Request
    """The validated request."""
    document: Document
    """The prompt and the finished segments."""
    request_id: int = -1
    """The scheduler's number of the request."""
    slots: list[int] = field(default_factory=list)
    """Cache slots, one for each branch."""
    pending_ids: list[list[int]] = field(default_factory=list)
    """By branch, the ids that it reads before the generator's input."""
    generator: Generator | None = None
    """The generator of the current segment."""
    state: GenerationState | None = None
    """State of the current segment."""
    num_segments: int = 0
    """Number of segments started so far."""
    num_images: int = 0
    """Number of finished images."""
    num_text_tokens: int = 0
    """Number of ids of finished texts."""
    num_cached: int = 0
    """Positions of the current segment in the cache."""
    streamed_text: str = ""
    """Text of the current segment that was streamed."""
    preview_milestones: int = 0
    """Number of due times for a preview of the current image that have passed."""
    num_previews: int = 0
    """Number of previews of the current image so far."""
    prompt_tokens: int = 0
    """Number of ids of the prompt."""
    image_prompt_tokens: int = 0
    """Number of ids of the prompt that belong to images."""
    truncated: bool = False
    """Whether the last text ended at its limit."""
    prompt_spans: list[list[PromptSpan]] = field(default_factory=list)
    """By branch, the spans of its prompt that read features of images."""
    context_ids: set[int] = field(default_factory=set)
    """Ids of the prompt and of finished segments: a repetition penalty counts them."""
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    """By branch, the hidden states (S, D) of all positions that were read, where a generator needs them."""
    record: SequenceRecord = field(default_factory=SequenceRecord)
    """Records of the answer for its `GenerationResult`."""

    @property
    def num_branches(self) -> int:
        """Number of branches of guidance."""
        return len(self.pending_ids)


def record_segment(sequence: SequenceState, state: GenerationState) -> None:
    """Add a finished segment to the sequence's records.

    Args:
        sequence: changed in place.
        state: of the segment.
    """
    record, requested_record = sequence.record, sequence.request.record
    record.token_ids += state.drawn_ids
    record.logprobs += state.logprobs
    if requested_record.latents and state.latents is not None:
        record.latents.append(state.latents.cpu())
    if state.recorded_trajectory is not None:
        record.trajectories.append(TrajectoryRecord(*state.recorded_trajectory))


def sequence_progress(sequence: SequenceState) -> float:
    """The finished fraction in [0, 1] of a request for one image; 0 where it is unknown.

    Args:
        sequence: any.
    """
    if sequence.state is None or sequence.request.output not in IMAGE_OUTPUTS:
        return 0.0
    steps_done, steps = sequence.state.progress
    if not steps_done:  # written code by code
        height, width = sequence.request.grid
        steps_done, steps = sequence.state.num_written, height * width
    return min(steps_done / steps, 1.0)
