"""Next-token prediction: text, and images in raster order over discrete codes (LlamaGen, Liquid, Chameleon).

    p(x) = prod_i p(x_i | x_<i, context),   loss = - sum_i log p(x_i | x_<i, context)   over the joint vocabulary

`Text` writes text and ends at one of the segment's stops. `NextToken` writes exactly h x w codes; ids between the rows
are read along with them and never sampled. An image is therefore complete or absent, and text has no image id.
Does not depend on: templates, tokenizers, caches.
Shapes: B rows, L positions, D width, T targets, V ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeGuard

import torch
from torch import Tensor

from unigen.batch import Batch, InputSpan, Vocabulary
from unigen.generators import jacobi
from unigen.generators.base import (
    BuildContext,
    GenerationState,
    Generator,
    GeneratorModel,
    SegmentSpec,
    StepInput,
)
from unigen.generators.options.acceleration import Acceleration
from unigen.options import GroupType
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions, apply_repetition_penalty, log_probabilities, sample
from unigen.samplers.options import CodeSampling, GuidanceOptions, TextSampling


def decode_ids(model: GeneratorModel, states: list[GenerationState]) -> Tensor:
    """Codes of segments whose ids are codes of the model's image tokenizer in raster order.

    Args:
        model: the model.
        states: N segments of one grid.

    Returns:
        Codes (N, h, w).
    """
    grid = states[0].spec.grid
    assert grid is not None
    return model.vocabulary.image_codes(torch.tensor([state.ids for state in states])).unflatten(1, grid)


class CausalGenerator(ABC):
    """Base class of text and of codes in raster order: each id is read as it is and predicted from the one before."""

    cache_reusable, trains_on_codes, needs_context = True, True, False
    guided_loss = None
    is_text, is_causal = False, True
    forbidden_ids: Sequence[int] = ()
    text_length = 0
    conditions: frozenset[str] = frozenset()
    tokenizer_kind: str | None = None
    options: tuple[GroupType, ...] = (GuidanceOptions, CodeSampling)
    defaults: Mapping[str, object] = MappingProxyType({})

    def attend_until(self) -> list[int] | None:
        """See `Generator.attend_until`."""
        return None

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], Tensor]:
        """See `Generator.prepare`."""
        return [], self.target_mask(batch)

    @abstractmethod
    def target_mask(self, batch: Batch) -> Tensor:
        """Mask (B, L), True at the ids to be predicted.

        Args:
            batch: packed rows with all ids.
        """

    def vocab_slice(self, vocabulary: Vocabulary) -> slice:
        """The ids over which a target's softmax is taken: all of the head's.

        Args:
            vocabulary: the model's.
        """
        return slice(0, None)

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, targets: Tensor) -> Tensor:
        """See `Generator.loss`: -log p (T,) of each id to be predicted, from the state before it."""
        rows, positions = targets.nonzero(as_tuple=True)
        table = self.vocab_slice(model.vocabulary)
        logits_TV = model.logits(hidden_BLD[rows, positions - 1], table.start, table.stop).float()
        return torch.nn.functional.cross_entropy(
            logits_TV, batch.ids_BL[rows, positions] - table.start, reduction="none"
        )

    def num_targets(self, batch: Batch) -> Tensor:
        """See `Generator.num_targets`."""
        return self.target_mask(batch).sum()

    def prepare_step(self, state: GenerationState) -> StepInput:
        """See `Generator.prepare_step`."""
        return StepInput(state.pending_ids)

    def decode(self, model: GeneratorModel, states: list[GenerationState]) -> Tensor:
        """See `Generator.decode`."""
        return decode_ids(model, states)


def is_causal(generator: Generator) -> TypeGuard[CausalGenerator]:
    """Whether a generator is causal: each id is read as it is and predicted from the one before.

    Args:
        generator: any.
    """
    return generator.is_causal


class Text(CausalGenerator):
    """Text until one of the segment's stops.

    Args:
        forbidden: special ids that are never written.
    """

    name = "text"
    is_text = True
    options: tuple[GroupType, ...] = (TextSampling,)

    def __init__(self, forbidden: Sequence[int]) -> None:
        self.forbidden_ids = forbidden
        """Special ids of the text table that are never written, except a segment's stops."""

    def num_positions(self) -> int:
        """See `Generator.num_positions`."""
        return 0

    def target_mask(self, batch: Batch) -> Tensor:
        """See `CausalGenerator.target_mask`."""
        return batch.loss_BL & ~batch.image_mask()

    def start(self, spec: SegmentSpec) -> GenerationState:
        """See `Generator.start`."""
        return GenerationState(spec, pending_ids=[spec.begin_id])

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """See `Generator.step`."""
        last_hidden_BD = torch.stack([branches[0][-1] for branches in hidden])
        vocabulary = model.vocabulary
        logits_BV = model.logits(last_hidden_BD, 0, vocabulary.text_size)
        logits_BV[:, vocabulary.image_start : vocabulary.image_stop] = -torch.inf  # codes among the ids of text
        for row, state in enumerate(states):
            forbidden = [i for i in self.forbidden_ids if i not in state.spec.stop_token_ids]
            logits_BV[row, forbidden] = -torch.inf
            if (penalty := state.spec.sampling.repetition_penalty) != 1:
                apply_repetition_penalty(logits_BV[row], {*state.spec.context_ids, *state.ids}, penalty)
        for rows, ids in sample_grouped(logits_BV, states):
            for row, id in zip(rows, ids, strict=True):
                state = states[row]
                state.pending_ids = [id]
                if id in state.spec.stop_token_ids:
                    state.finished = True
                else:
                    state.ids.append(id)
                    state.finished = len(state.ids) >= state.spec.max_tokens
        return [len(branches[0]) for branches in hidden]


class NextToken(CausalGenerator):
    """The codes of one image in raster order; guidance combines the logits of its branches.

    Args:
        grid: rows and columns of codes.
        row_end: number of ids that stand after each row.
    """

    name = "next-token"
    options: tuple[GroupType, ...] = (GuidanceOptions, CodeSampling, Acceleration)

    def __init__(self, grid: tuple[int, int], row_end: int = 0) -> None:
        self.grid, self.row_end = grid, row_end

    @classmethod
    def from_context(cls, context: BuildContext) -> NextToken:
        """An untrained generator for a model.

        Args:
            context: sizes and ids of the model, the generator's own tokenizer and settings.
        """
        return cls(context.grid)

    def num_positions(self) -> int:
        """See `Generator.num_positions`."""
        return self.grid[0] * (self.grid[1] + self.row_end)

    def target_mask(self, batch: Batch) -> Tensor:
        """See `CausalGenerator.target_mask`."""
        return batch.loss_BL & batch.image_mask(self.name)

    def vocab_slice(self, vocabulary: Vocabulary) -> slice:
        """See `CausalGenerator.vocab_slice`."""
        return (
            slice(vocabulary.image_start, vocabulary.image_stop)
            if vocabulary.separate_head
            else super().vocab_slice(vocabulary)
        )

    def start(self, spec: SegmentSpec) -> GenerationState:
        """See `Generator.start`."""
        assert spec.grid is not None
        method = spec.options[Acceleration].accelerate
        return (
            GenerationState(spec, spec.prompt_ids)
            if method is None
            else jacobi.SpeculativeState(spec, spec.prompt_ids, method=method)
        )

    def prepare_step(self, state: GenerationState) -> StepInput:
        """See `Generator.prepare_step`."""
        if isinstance(state, jacobi.SpeculativeState):
            return jacobi.prepare_step(state)
        return StepInput(state.pending_ids)

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """See `Generator.step`."""
        ordinary_rows = [row for row, state in enumerate(states) if not isinstance(state, jacobi.SpeculativeState)]
        num_read = [len(state.pending_ids) for state in states]
        for row, state in enumerate(states):
            if isinstance(state, jacobi.SpeculativeState):
                num_read[row] = jacobi.step(model, state, hidden[row])
        if not ordinary_rows:
            return num_read
        states, hidden = [states[row] for row in ordinary_rows], [hidden[row] for row in ordinary_rows]
        offset = model.vocabulary.image_start
        flat = torch.stack([branch[-1] for branches in hidden for branch in branches])
        logits_NV = model.logits(flat, offset, model.vocabulary.image_stop).float()
        guided_BV = combine_grouped(logits_NV, [state.spec.guidance for state in states])
        for rows, ids in sample_grouped(guided_BV, states):
            for row, code in zip(rows, ids, strict=True):
                state = states[row]
                assert state.spec.grid is not None
                height, width = state.spec.grid
                state.ids.append(offset + code)
                row_complete = len(state.ids) % width == 0
                state.pending_ids = [offset + code, *(state.spec.row_end_ids if row_complete else ())]
                state.finished = len(state.ids) == height * width
        return num_read


def combine_grouped(logits_NV: Tensor, guidances: list[Guidance]) -> Tensor:
    """Guided logits (B, V) of B rows. Where all rows have the same guidance, they are combined in one operation.

    Args:
        logits_NV: logits (N, V) of the branches of all rows, row after row, the strongest condition of each first.
        guidances: the guidance of each row.
    """
    if len(set(guidances)) == 1:
        return guidances[0].combine(logits_NV.unflatten(0, (len(guidances), -1)).unbind(1))
    split = logits_NV.split([guidance.num_branches for guidance in guidances])
    return torch.stack([guidance.combine(part) for guidance, part in zip(guidances, split, strict=True)])


def sample_grouped(logits_BV: Tensor, states: list[GenerationState]) -> list[tuple[list[int], list[int]]]:
    """Sample an id for each row; rows with the same sampling options are sampled together.

    Args:
        logits_BV: logits of the rows.
        states: of the rows. Log-probabilities are added where a segment records them, and `finite` becomes False where
            logits are not finite.

    Returns:
        Of each group its row numbers and their ids; an id is 0 where logits are not finite.
    """
    groups: dict[SamplingOptions, list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(state.spec.sampling, []).append(row)
    result = []
    for sampling, rows in groups.items():
        some_BV = logits_BV if len(groups) == 1 else logits_BV[rows]
        ids_B = sample(some_BV, sampling, [states[row].spec.rng for row in rows])
        ids = ids_B.tolist()
        for row, id in zip(rows, ids, strict=True):
            states[row].finite &= id >= 0
        if any(states[row].spec.record_logprobs for row in rows):
            logprobs = log_probabilities(some_BV, sampling, ids_B.clamp(min=0)).tolist()
            for row, logprob in zip(rows, logprobs, strict=True):
                states[row].logprobs.append(logprob)
        result.append((rows, [max(id, 0) for id in ids]))
    return result


GENERATOR = NextToken
