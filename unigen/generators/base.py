"""The contract of generators: how a segment is generated. The engine samples from it, the trainer computes its loss.

A segment is generated with one or more guidance branches of the same context. In each step the engine requests the
input of every branch (`prepare_step`), runs the backbone once for all rows, and gives the hidden states to the
generator (`step`). Training has the same two halves: `prepare` builds the inputs of the backbone where the generator
writes, `loss` compares the hidden states with the targets.

Shapes: B rows, L positions, P positions of an image, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan, Vocabulary
from unigen.options import GroupType, OptionSet
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions


@dataclass
class SegmentSpec:
    """One segment to be written."""

    begin_id: int
    """The id that opens it, read first by every branch."""
    sampling: SamplingOptions
    """How ids are sampled from logits."""
    guidance: Guidance
    """Guidance, whose branches read the segment side by side."""
    rng: torch.Generator
    """The segment's own random generator."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the codes of an image; None for text."""
    prefix_ids: tuple[int, ...] | None = None
    """All ids that are read first, where they are not `begin_id` alone."""
    row_end_ids: tuple[int, ...] = ()
    """Ids that stand after each row of an image, whatever is sampled."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a text: an end of turn, or the begin of an image."""
    max_tokens: int = 256
    """Ids of a text, at most."""
    options: OptionSet = field(default_factory=OptionSet)
    """The groups of options that the generator takes."""
    fixed_ids: Tensor | None = None
    """Ids (h, w) of given codes, which stay; -1 where the generator samples. None: it samples all."""
    text_ids: list[int] | None = None
    """Ids in the segment's own positions of text, where it has some; None where the generator samples those too."""
    context_ids: frozenset[int] = frozenset()
    """Ids of the context of a text. A repetition penalty counts them with the text's own."""
    record_logprobs: bool = False
    """Whether to record log-probabilities of the sampled ids (`GenerationState.logprobs`)."""
    record_trajectory: bool = False
    """Whether to record each x_t of a flow (`GenerationState.recorded_trajectory`)."""

    @property
    def prompt_ids(self) -> list[int]:
        """The ids that every branch reads first."""
        return [self.begin_id] if self.prefix_ids is None else list(self.prefix_ids)


@dataclass
class GenerationState:
    """The state of a segment that is being written."""

    spec: SegmentSpec
    """The segment."""
    pending_ids: list[int]
    """Ids that every branch reads in the next step."""
    ids: list[int] = field(default_factory=list)
    """Ids written so far."""
    text_ids: list[int] = field(default_factory=list)
    """Ids of the text that a finished segment opens with."""
    finished: bool = False
    """Whether the segment is finished."""
    finite: bool = True
    """False where logits are not finite: the segment must be given up, and its other fields mean nothing."""
    progress: tuple[int, int] = (0, 1)
    """Steps of an image taken so far, and steps in all, for generators that have previews: `Generator.decode` then
    takes a state that is not finished."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probabilities, in nats, of `drawn_ids` of a finished segment, where the segment records them."""

    @property
    def latents(self) -> Tensor | None:
        """Latents (Z, h, w) of a finished image; None where it has codes."""
        return None

    @property
    def recorded_trajectory(self) -> tuple[Tensor, Tensor] | None:
        """x_t (K, Z, h, w) and t (K,) of a finished image, from noise to data; None where they were not recorded."""
        return None

    @property
    def num_written(self) -> int:
        """Number of ids written so far, for segments that are written id by id."""
        return len(self.ids)

    @property
    def native_codes(self) -> Tensor | None:
        """Codes (P,) of a finished image in the generator's own tokenizer; None: its codes are the model's."""
        return None

    @property
    def drawn_ids(self) -> list[int]:
        """The sampled ids of a finished segment: ids of text with the id that ended it, codes of an image in raster
        order, or codes of the generator's own tokenizer."""
        if self.native_codes is not None:
            return [int(code) for code in self.native_codes.tolist()]
        if self.spec.grid is not None:
            return [*self.text_ids, *self.ids]
        return [*self.ids, *(id for id in self.pending_ids if id in self.spec.stop_token_ids)]


@dataclass
class StepInput:
    """Input of every branch of a segment in one step. Without ids the step does not run the backbone."""

    ids: list[int]
    """Ids (L,)."""
    embeds: Tensor | None = None
    """Embeddings (at most L, D) that replace those of the last ids."""
    attend_until: list[int] | None = None
    """Of each of these positions the last one that it attends to, from 0; None is causal."""
    uncond_ids: list[int] | None = None
    """Ids (L,) that all branches but the first read instead of `ids`; None: they read the same."""


@dataclass(frozen=True)
class BuildContext:
    """The model for which a generator is built."""

    grid: tuple[int, int]
    """Rows and columns of the codes of the model's image tokenizer."""
    mask_id: int
    """The id of a masked code."""
    width: int
    """Width D of the backbone."""
    tokenizer: Any = None
    """The generator's own image tokenizer; None where it has none."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """The generator's own settings, as returned by its `config`."""
    special_ids: tuple[int, ...] = ()
    """Ids that do not occur in text."""


class GeneratorModel(Protocol):
    """The part of the model that generators use."""

    vocabulary: Vocabulary
    """Ids of text and of codes."""

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings.

        Args:
            ids: ids (...).

        Returns:
            Embeddings (..., D).
        """
        ...

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of a part of the vocabulary.

        Args:
            hidden: hidden states (..., D).
            start: first id.
            stop: the id after the last; None is the end of the vocabulary.

        Returns:
            Logits (..., stop - start).
        """
        ...


GuidedLoss = Callable[[Sequence[tuple[Tensor, Any]], Guidance, float], Tensor]
"""A function from hidden states (B, L, D) and targets of each branch, guidance and temperature to losses (T,)."""


class Generator(Protocol):
    """A method of generating a segment: its inputs, sampling and loss."""

    name: str
    """Name for users, such as "next-token"; its file is next_token.py."""
    tokenizer_kind: str | None
    """The kind of the image tokenizer that is part of it ("multiscale", "kl"); None where it writes codes of the
    model's image tokenizer."""
    cache_reusable: bool
    """Whether the cache holds a finished image as later segments read it. If not, the engine reads it again."""
    options: tuple[GroupType, ...]
    """The groups of options of a request that it takes."""
    defaults: Mapping[str, object]
    """Its own defaults of options, where they differ from the declared ones."""
    conditions: frozenset[str]
    """The kinds of conditions of a document (`unigen.document.Condition`) that it takes."""
    trains_on_codes: bool
    """Whether it is trained on the codes of the model's image tokenizer. If not, it is trained on pixels."""
    is_text: bool
    """Whether it writes text, and not images."""
    forbidden_ids: Sequence[int]
    """Ids of the text table that it never writes, except a segment's stops."""
    is_causal: bool
    """Whether each id is read as it is and predicted from the position before."""
    text_length: int
    """Number of positions of text with which an image's segment opens."""
    needs_context: bool
    """Whether `step` takes the hidden states of everything that was read, not only those of the step."""

    @property
    def guided_loss(self) -> GuidedLoss | None:
        """`loss` under guidance and a temperature; None where the generator has none."""
        ...

    def num_positions(self) -> int:
        """Number P of positions that an image takes after its begin token."""
        ...

    def attend_until(self) -> list[int] | None:
        """The attention mask inside an image.

        Returns:
            Of each position of the image, counted from 0, the last one that it attends to; None is causal. A longer
            list has equally many entries for positions before the image and after it.
        """
        ...

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], Any]:
        """Build the inputs of the backbone for an image of this generator.

        Args:
            model: the model in training.
            batch: packed rows with all ids.
            rng: random generator of masks, orders, times and noise.

        Returns:
            Spans of embeddings that replace those of ids, and the targets for `loss`.
        """
        ...

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, targets: Any) -> Tensor:
        """The loss of each target.

        Args:
            model: the model in training.
            batch: the batch of `prepare`.
            hidden_BLD: hidden states of the backbone.
            targets: those of `prepare`.

        Returns:
            Losses (T,), equally many for each image, image after image: in nats, for a flow squared errors.
        """
        ...

    def num_targets(self, batch: Batch) -> Tensor | int:
        """Number T of targets that `loss` will have, known before the images are encoded.

        Args:
            batch: packed rows with all ids.
        """
        ...

    def start(self, spec: SegmentSpec) -> GenerationState:
        """The initial state of a segment.

        Args:
            spec: the segment to be written.
        """
        ...

    def prepare_step(self, state: GenerationState) -> StepInput:
        """The input of every branch in the next step.

        Args:
            state: of a segment that is not done.
        """
        ...

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """Advance segments by one step.

        Args:
            model: the model.
            states: segments of this generator, changed in place.
            hidden: `hidden[i][b]` (L, D), the hidden states of branch b of state i at the positions of its `StepInput`;
                with no ids in it those of the prompt's last id, with `needs_context` those of everything that was read.

        Returns:
            For each state the number of positions of the step that stay in the cache.
        """
        ...

    def decode(self, model: GeneratorModel, states: list[GenerationState]) -> Tensor:
        """The images of segments.

        Args:
            model: the model.
            states: finished segments, or segments with `progress`, which are decoded as they look now.

        Returns:
            Codes int64 (N, h, w) of the model's image tokenizer, or pixels float (N, 3, H, W).
        """
        ...


class GeneratorHead(nn.Module):
    """Base class of generators with weights. It holds the generator's own image tokenizer, which is always frozen and
    in evaluation mode, and encodes pixels for training.

    Args:
        tokenizer: the generator's own image tokenizer; None where it has none.
    """

    name: str
    """See `Generator.name`."""
    tokenizer_kind: str | None
    """See `Generator.tokenizer_kind`."""
    cache_reusable, trains_on_codes, is_text, is_causal = False, False, False, False
    guided_loss: GuidedLoss | None = None
    """See `Generator.guided_loss`."""
    uses_positions = True
    """Whether images take positions of the sequence. If not, `num_positions` is 0 whatever the settings."""
    forbidden_ids: Sequence[int] = ()
    """See `Generator.forbidden_ids`."""
    text_length = 0
    """See `Generator.text_length`."""
    defaults: Mapping[str, object] = MappingProxyType({})
    """See `Generator.defaults`."""
    conditions: frozenset[str] = frozenset()
    """See `Generator.conditions`."""
    io_layers: tuple[nn.Module, ...] = ()
    """Input and output layers, which optimizers for hidden matrices (Muon) leave to another."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but the tokenizer, which stays in evaluation mode.

        Args:
            mode: True for training, False for evaluation.
        """
        super().train(mode)
        if self.tokenizer is not None:
            self.tokenizer.eval()
        return self

    def config(self) -> dict[str, object]:
        """The `BuildContext.settings` from which `from_context` builds this generator again."""
        return {}

    def zero_loss(self, hidden_BLD: Tensor) -> Tensor:
        """Losses (0,) of a batch without images. All weights get gradients of zero from them.

        Args:
            hidden_BLD: hidden states of the backbone.
        """
        trainable_params = [p.flatten()[:0] for p in self.parameters() if p.requires_grad]
        return torch.cat([hidden_BLD[:0].flatten().float(), *trainable_params])

    def target_pixels(self, batch: Batch, device: torch.device) -> Tensor:
        """Pixels (M, 3, H, W) of the batch's images of this generator.

        Args:
            batch: packed rows.
            device: device of the result.

        Raises:
            ValueError: the images are codes of another tokenizer.
        """
        pixels = batch.images[batch.images_of(self.name)] if batch.images is not None else None
        if pixels is None or not pixels.is_floating_point():
            raise ValueError(
                f"{self.name} learns from pixels, or its own codes: give the pictures of its documents as pictures"
            )
        return pixels.to(device)

    def encode_targets(self, batch: Batch, device: torch.device) -> Tensor:
        """Codes or latents of the batch's images of this generator.

        Args:
            batch: packed rows. Its images are pixels, or codes (M, P) of the generator's own tokenizer.
            device: device of the result.

        Returns:
            What the tokenizer's `encode` gives, or the given codes (M, P).

        Raises:
            ValueError: the images are codes of another tokenizer.
        """
        if batch.images is not None and batch.images.ndim == 2:
            return batch.images[batch.images_of(self.name)].to(device)
        return self.tokenizer.encode(self.target_pixels(batch, device))
