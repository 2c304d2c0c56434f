"""What a generator is: one way of writing a segment. The engine drives it, the trainer asks it for its loss.

A span is one segment being written, by one or more branches (for guidance) of the same context. In each step the engine
asks what every branch reads now, runs the backbone once for all rows, and lets the generator advance. Training mirrors
it: `prepare` lays out what the backbone reads where the generator writes, `loss` compares what it then says.

Shapes: B rows, L positions, P positions of a picture, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan, Vocabulary
from unigen.options import GroupType, OptionSet
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions


@dataclass
class SegmentSpec:
    """One segment to be written.

    begin: the id that opens it, read first by every branch; opening: all ids that are, where they are not this one
    alone. grid: rows and columns of an image; row_end: ids that stand after each row, whatever is drawn. stops: ids
    that end a text (an end of turn, or the begin of an image). rng: the span's own randomness. options: the
    groups of options that the generator takes. fixed: ids (h, w) of codes that are given and stay, -1 where the
    generator writes. text_ids: what stands in the span's own
    positions of text, where it has some; None where the generator writes those too. before: ids that stand before a
    text, which a penalty on repetition counts with its own.
    """

    begin: int
    sampling: SamplingOptions
    guidance: Guidance
    rng: torch.Generator
    grid: tuple[int, int] | None = None
    opening: tuple[int, ...] | None = None
    row_end: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    max_tokens: int = 256
    options: OptionSet = field(default_factory=OptionSet)
    fixed: Tensor | None = None
    text_ids: list[int] | None = None
    before: frozenset[int] = frozenset()
    record_logprobs: bool = False
    """Whether log-probabilities of the drawn ids are kept (`GenerationState.logprobs`)."""
    record_trajectory: bool = False
    """Whether each x_t of a flow is kept (`GenerationState.recorded_trajectory`)."""

    @property
    def head(self) -> list[int]:
        """The ids that are read first."""
        return [self.begin] if self.opening is None else list(self.opening)


@dataclass
class GenerationState:
    """A segment on its way."""

    span: SegmentSpec
    """What is to be written."""
    pending_ids: list[int]
    """What every branch reads in the next step."""
    ids: list[int] = field(default_factory=list)
    """Ids that have been written."""
    text_ids: list[int] = field(default_factory=list)
    """Of a finished segment, the text that it opens with."""
    done: bool = False
    """Is it finished?"""
    finite: bool = True
    """False where the model's numbers are not finite: the segment has to be given up, and the rest means nothing."""
    progress: tuple[int, int] = (0, 1)
    """Steps of an image that are taken, and of how many, where a generator can show what there is of it:
    `Generator.decode` then takes the state before it is done."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probabilities, nats, of `drawn_ids` of a finished segment, where the segment records them."""

    @property
    def latents(self) -> Tensor | None:
        """The latents (Z, h, w) of a finished image, where it has some."""
        return None

    @property
    def recorded_trajectory(self) -> tuple[Tensor, Tensor] | None:
        """x_t (K, Z, h, w) and t (K,) of a finished image, from noise to data, where they were recorded."""
        return None

    @property
    def num_written(self) -> int:
        """Ids written so far, of those that are written one by one."""
        return len(self.ids)

    @property
    def native_codes(self) -> Tensor | None:
        """The codes (P,) of a finished image, where they are not the model's own."""
        return None

    @property
    def drawn_ids(self) -> list[int]:
        """What was drawn of a finished segment: ids of text with the id that ended it, codes of an image in raster
        order, or codes of the generator's own tokenizer."""
        if self.native_codes is not None:
            return [int(code) for code in self.native_codes.tolist()]
        if self.span.grid is not None:
            return [*self.text_ids, *self.ids]
        return [*self.ids, *(id for id in self.pending_ids if id in self.span.stops)]


@dataclass
class StepInput:
    """What every branch of a segment reads in one step. No ids: a step without the backbone."""

    ids: list[int]
    """Ids (L,)."""
    embeds: Tensor | None = None
    """Embeddings that stand for the last of the ids."""
    attend_until: list[int] | None = None
    """The last of these positions that each of them sees; None is causal."""
    uncond_ids: list[int] | None = None
    """As many ids, which all branches but the first read instead."""


@dataclass(frozen=True)
class BuildContext:
    """What a generator is made for."""

    grid: tuple[int, int]
    """Rows and columns of the codes by which a model reads pictures."""
    mask_id: int
    """The id that stands for a code to be written."""
    width: int
    """Width of the backbone."""
    tokenizer: Any = None
    """The generator's own image tokenizer, where it has one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its own settings, as its `config` gave them."""
    special_ids: tuple[int, ...] = ()
    """Ids that no text holds."""


class GeneratorModel(Protocol):
    """What a generator may use of the model."""

    vocabulary: Vocabulary

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (...) -> what the backbone reads for them (..., D)."""
        ...

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Hidden states (..., D) -> scores of the ids from `start` up to `stop` (..., stop - start)."""
        ...


GuidedLoss = Callable[[Sequence[tuple[Tensor, Any]], Guidance, float], Tensor]
"""Losses (T,) from hidden states (B, L, D) and targets of each branch, guidance, and temperature."""


class Generator(Protocol):
    """A way of writing a segment."""

    name: str
    """As users write it, and its file."""
    tokenizer_kind: str | None
    """The kind of the image tokenizer that is part of it ("multiscale", "kl"); None where it writes the codes by which
    the model reads."""
    cache_reusable: bool
    """Does the cache hold a finished picture as later segments read it? Else the engine reads it again."""
    options: tuple[GroupType, ...]
    """The groups of options of a request that it takes."""
    defaults: Mapping[str, object]
    """Its own defaults of them, where those are not the declared ones."""
    conditions: frozenset[str]
    """The kinds of conditions of a document (`unigen.document.Condition`) that it takes."""
    trains_on_codes: bool
    """Are the ids of a picture in training codes of the model's image tokenizer? Else it is laid out from pixels."""
    is_text: bool
    """Whether it writes text, and not pictures."""
    forbidden_ids: Sequence[int]
    """Ids of the text table that it never writes, except a segment's stops."""
    is_causal: bool
    """Whether each of its ids is read as it is and predicted by the one before."""
    text_length: int
    """How many positions of text a picture's span opens with."""
    needs_context: bool
    """Does `step` want the states of all that was read before, not only of what was asked?"""

    @property
    def guided_loss(self) -> GuidedLoss | None:
        """`loss` of what is drawn with guidance at a temperature; None where the generator has none."""
        ...

    def num_positions(self) -> int:
        """How many positions a picture takes after its begin token."""
        ...

    def attend_until(self) -> list[int] | None:
        """The last of a picture's positions that each of them sees, the first being 0; None is causal. Of more numbers
        than it has positions, as many are of what stands before it as of what stands after."""
        ...

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], Any]:
        """Lay out what the backbone reads where this generator writes.

        Args:
            model: the model in training.
            batch: packed rows whose ids are known.
            rng: the randomness of masks, orders, times and noise.

        Returns:
            Spans of vectors that are read in place of ids, and the targets for `loss`.
        """
        ...

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, targets: Any) -> Tensor:
        """What each target costs, (T,), as many for one picture as for another, picture after picture: nats, for a flow
        squared errors."""
        ...

    def num_targets(self, batch: Batch) -> Tensor | int:
        """How many targets `loss` will have, known before the pictures are encoded."""
        ...

    def start(self, span: SegmentSpec) -> GenerationState:
        """The state of a segment of which nothing is written yet."""
        ...

    def prepare_step(self, state: GenerationState) -> StepInput:
        """What every branch reads in the next step."""
        ...

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """`hidden[i][b]`: (L, D), what branch b of state i has for what it asked to read (for the prompt's last id
        where it asked for nothing), or with `needs_context` for all that it has read. Returns how many of the positions
        asked for stay in the cache, for each state."""
        ...

    def decode(self, model: GeneratorModel, states: list[GenerationState]) -> Tensor:
        """Of finished images: codes int64 (N, h, w) of the model's image tokenizer, or pixels float (N, 3, H, W). Of
        those that are not, where the state's `progress` tells how far it is: what they would be as it looks now."""
        ...


class GeneratorHead(nn.Module):
    """What generators with weights share: an image tokenizer of their own where they have one, frozen whatever the
    mode, and learning from pixels."""

    name: str
    tokenizer_kind: str | None
    cache_reusable, trains_on_codes, is_text, is_causal = False, False, False, False
    guided_loss: GuidedLoss | None = None
    uses_positions = True
    """Do pictures take positions of the sequence? Where they do not, `num_positions` is 0 whatever the settings."""
    forbidden_ids: Sequence[int] = ()
    text_length = 0
    defaults: Mapping[str, object] = MappingProxyType({})
    conditions: frozenset[str] = frozenset()
    io_layers: tuple[nn.Module, ...] = ()
    """Layers that are no hidden matrices, for optimizers that tell."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.tokenizer is not None:
            self.tokenizer.eval()
        return self

    def config(self) -> dict[str, Any]:
        """The `BuildContext.settings` that build it again."""
        return {}

    def zero_loss(self, hidden_BLD: Tensor) -> Tensor:
        """The costs (0,) of no picture, of which all weights have gradients of zero: a batch may hold none."""
        trainable_params = [p.flatten()[:0] for p in self.parameters() if p.requires_grad]
        return torch.cat([hidden_BLD[:0].flatten().float(), *trainable_params])

    def target_pixels(self, batch: Batch, device: torch.device) -> Tensor:
        """The batch's pictures that this generator writes. ValueError where they are codes of another tokenizer."""
        pixels = batch.images[batch.images_of(self.name)] if batch.images is not None else None
        if pixels is None or not pixels.is_floating_point():
            raise ValueError(
                f"{self.name} learns from pixels, or its own codes: give the pictures of its documents as pictures"
            )
        return pixels.to(device)

    def encode_targets(self, batch: Batch, device: torch.device) -> Tensor:
        """The same, by the generator's own tokenizer; or the codes (M, P) in which it drew them."""
        if batch.images is not None and batch.images.ndim == 2:
            return batch.images[batch.images_of(self.name)].to(device)
        return self.tokenizer.encode(self.target_pixels(batch, device))
