"""What a generation gives beside its answer: ids, codes, log-probabilities, latents, usage, settings.

    result = engine.generate_results(["two apples"], [0], record=Record(logprobs=True))[0]
    result.output                   # the PIL image that `engine.generate` gives
    result.token_ids                # what was drawn
    result.logprobs                 # one number for each of them

Imports no torch, so that a process without a model can unpickle results. Does not depend on: engines, models.
Shapes: T ids, h x w codes of an image, P codes of a generator's own tokenizer, K steps, Z latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from unigen.document import Document

Answer: TypeAlias = "Image | str | list[Image | str]"
"""An image, a text, or for "interleaved" and "pair" a list of both."""
FinishReason = Literal["stop", "length"]
"""Why an answer ended: by itself, or at a limit of its length."""


@dataclass(frozen=True)
class Record:
    """What to keep of a generation beside its ids and codes."""

    logprobs: bool = False
    """Log-probabilities of the ids."""
    latents: bool = False
    """The latents from which images are decoded."""
    trajectory: bool = False
    """Each x_t of a flow."""


RECORD_NOTHING = Record()


@dataclass(frozen=True)
class TrajectoryRecord:
    """The path of one image from noise to data."""

    x_t: Tensor
    """States (K + 1, Z, h, w), from noise to data."""
    t: Tensor
    """Times (K + 1,) of these states, falling from 1 to 0."""


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took."""

    prompt_tokens: int
    """Ids read as the prompt."""
    text_tokens: int
    """Ids of text written."""
    image_tokens: int
    """Codes of images written."""
    truncated: bool
    """Whether the text ended at the limit of the request or of the model's context."""
    image_prompt_tokens: int
    """Of the prompt's ids, those of images."""


@dataclass
class SequenceRecord:
    """What is recorded of one sequence while it is generated."""

    token_ids: list[int] = field(default_factory=list)
    """Ids drawn so far, in the segments that have ended."""
    codes: list[Tensor | None] = field(default_factory=list)
    """Of each image its codes (h, w), or (P,) of the generator's own tokenizer; None where it has none."""
    logprobs: list[float] = field(default_factory=list)
    """One for each id, where they are recorded."""
    latents: list[Tensor] = field(default_factory=list)
    """Of each image its latents (Z, h, w), where they are recorded."""
    trajectories: list[TrajectoryRecord] = field(default_factory=list)
    """Of each image its path, where it is recorded."""
    usage: Usage | None = None
    """Set when the sequence ends."""


@dataclass(frozen=True)
class GenerationResult:
    """An answer and how it came about. What an engine does not know is empty or None."""

    output: Answer
    """What `generate` gives: an image, a text, or a list of both."""
    document: Document
    """The prompt and the answer, to be read again or to be scored."""
    seed: int
    """The seed of its randomness."""
    token_ids: list[int] = field(default_factory=list)
    """Ids drawn, segment after segment: text with the id that ended it, codes of an image in raster order, or codes of
    the generator's own tokenizer in their order."""
    codes: list[Tensor | None] = field(default_factory=list)
    """Of each image its codes (h, w), or (P,) of the generator's own tokenizer; None for latents."""
    logprobs: Tensor | None = None
    """Log-probabilities (T,), nats, of the ids under the distribution that they were drawn from: after guidance, after
    what is not allowed at a place is left out, after temperature, top-k and top-p. At temperature 0, where nothing is
    drawn, it is that of temperature 1. A masked generator reports the step that fixed the id; given ids have 0."""
    latents: list[Tensor] = field(default_factory=list)
    """Of each image its latents (Z, h, w)."""
    trajectories: list[TrajectoryRecord] = field(default_factory=list)
    """Of each image its path from noise."""
    usage: Usage | None = None
    """How many tokens it took."""
    finish_reason: FinishReason = "stop"
    """Why it ended."""
    settings: dict[str, object] = field(default_factory=dict)
    """How it was made, by the options' names."""


@dataclass(frozen=True)
class Score:
    """How likely a model finds what the assistant says in a document."""

    total: float
    """Nats, of all of it."""
    token_ids: list[int]
    """The ids that were scored."""
    logprobs: Tensor | None = None
    """Log-probabilities (T,), nats, of the ids, where they were asked for."""
