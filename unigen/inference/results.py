"""Results of generations: the answer with its ids, codes, log-probabilities, latents, usage and settings.

    result = engine.generate_results(["two apples"], [0], record=Record(logprobs=True))[0]
    result.output                   # the PIL image that `engine.generate` gives
    result.token_ids                # the sampled ids
    result.logprobs                 # one log-probability for each of them

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
"""An image, a text, or for "interleaved" and "joint" a list of both."""
FinishReason = Literal["stop", "length"]
"""Why an answer ended: at a stop id, or at a limit of its length."""


@dataclass(frozen=True)
class Record:
    """What to record of a generation beside its ids and codes."""

    logprobs: bool = False
    """Log-probabilities of the ids."""
    latents: bool = False
    """The latents from which images are decoded."""
    trajectory: bool = False
    """Each x_t of a flow."""


RECORD_NOTHING = Record()


@dataclass(frozen=True)
class TrajectoryRecord:
    """The trajectory of one image from noise to data."""

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
    """Ids of the prompt that belong to images."""


@dataclass
class SequenceRecord:
    """Records of one sequence while it is generated."""

    token_ids: list[int] = field(default_factory=list)
    """Ids sampled so far, of finished segments."""
    codes: list[Tensor | None] = field(default_factory=list)
    """Of each image its codes (h, w), or (P,) of the generator's own tokenizer; None where it has none."""
    logprobs: list[float] = field(default_factory=list)
    """One for each id, where they are recorded."""
    latents: list[Tensor] = field(default_factory=list)
    """Of each image its latents (Z, h, w), where they are recorded."""
    trajectories: list[TrajectoryRecord] = field(default_factory=list)
    """Of each image its trajectory, where it is recorded."""
    usage: Usage | None = None
    """Set when the sequence ends."""


@dataclass(frozen=True)
class GenerationResult:
    """An answer with records of its generation. Fields that an engine does not know are empty or None."""

    output: Answer
    """The answer of `generate`: an image, a text, or a list of both."""
    document: Document
    """The prompt and the answer, to be read again or to be scored."""
    seed: int
    """Seed of the answer."""
    token_ids: list[int] = field(default_factory=list)
    """Sampled ids, segment after segment: text with the id that ended it, codes of an image in raster order, or codes
    of the generator's own tokenizer in their order."""
    codes: list[Tensor | None] = field(default_factory=list)
    """Of each image its codes (h, w), or (P,) of the generator's own tokenizer; None for latents."""
    logprobs: Tensor | None = None
    """Log-probabilities (T,), in nats, of the ids under the distribution that they were sampled from: after guidance,
    after masking of ids that are not allowed, after temperature, top-k and top-p. At temperature 0, where nothing is
    sampled, it is that of temperature 1. A masked generator reports the step that fixed the id; given ids have 0."""
    latents: list[Tensor] = field(default_factory=list)
    """Of each image its latents (Z, h, w)."""
    trajectories: list[TrajectoryRecord] = field(default_factory=list)
    """Of each image its trajectory from noise."""
    usage: Usage | None = None
    """Numbers of tokens."""
    finish_reason: FinishReason = "stop"
    """Why the answer ended."""
    settings: dict[str, object] = field(default_factory=dict)
    """Settings of the generation, by the options' names."""


@dataclass(frozen=True)
class Score:
    """Log-likelihood of the assistant's segments in a document."""

    total: float
    """Sum of the log-probabilities, in nats."""
    token_ids: list[int]
    """The scored ids."""
    logprobs: Tensor | None = None
    """Log-probabilities (T,), in nats, of the ids; None where they were not requested."""
