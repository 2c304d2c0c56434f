"""What a generator is: one way of writing a segment. The engine drives it, the trainer asks it for its loss.

A span is one segment being written, by one or more branches (for guidance) of the same context. In each step the engine
asks what every branch reads now, runs the backbone once for all rows, and lets the generator advance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import Sampling
from unigen.sequence import Batch, Vocabulary


@dataclass
class Span:
    """One segment to be written.

    begin: the id that opens it, read first by every branch. grid: rows and columns of an image. stops: ids that end a
    text (an end of turn, or the begin of an image). rng: the span's own randomness.
    """

    begin: int
    sampling: Sampling
    guidance: Guidance
    rng: torch.Generator
    grid: tuple[int, int] | None = None
    stops: tuple[int, ...] = ()
    max_tokens: int = 256


@dataclass
class State:
    """A span on its way. ids: what has been written; pending: what every branch reads in the next step."""

    span: Span
    pending: list[int]
    ids: list[int] = field(default_factory=list)
    done: bool = False


class Model(Protocol):
    """What a generator may use of the model."""

    vocabulary: Vocabulary

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor: ...


class Generator(Protocol):
    """`name` as users write it. The engine keeps as many of the read positions as `advance` says for each state."""

    name: str

    def loss(self, model: Model, batch: Batch, hidden_BLD: Tensor) -> tuple[Tensor, Tensor]: ...

    def start(self, span: Span) -> State: ...

    def ask(self, state: State) -> list[int]: ...

    def advance(self, model: Model, states: list[State], hidden: list[list[Tensor]]) -> list[int]:
        """hidden[i][b]: (L, D), what branch b of state i has for the ids it asked to read. Returns the kept counts."""
        ...
