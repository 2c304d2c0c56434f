"""Next-token prediction in a random order: each image's codes are trained, and sampled, in a random order of their own.

    p(x) = prod_i p(x_o(i) | x_o(<i), o(1..i), context),   loss = - sum_i log p(..)      o drawn for every image

Pannatier et al. 2024 (sigma-GPT, arXiv 2404.09562), section 3: step i reads the code of the last step with its
position, and the position that comes next; its state predicts the code there (no shift). Given codes come first in the
order, so that any part of an image can be inpainted.
Does not depend on: templates, tokenizers, caches.

Shapes: M images, P codes of an image, B rows, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan
from unigen.generators.base import (
    BuildContext,
    GenerationState,
    GeneratorHead,
    GeneratorModel,
    SegmentSpec,
    StepInput,
)
from unigen.generators.next_token import combine_grouped, decode_ids, sample_grouped
from unigen.generators.options.inpainting import Inpainting
from unigen.options import GroupType
from unigen.samplers.options import CodeSampling, GuidanceOptions

Targets = tuple[Tensor, Tensor, Tensor]


@dataclass
class OrderState(GenerationState):
    """The state of an image that is being written."""

    order_P: Tensor = field(kw_only=True)
    """Positions in the order of writing, those of given codes first."""
    ordered_ids: list[int] = field(kw_only=True)
    """Ids so far, in that order."""
    input_LD: Tensor | None = None
    """Input embeddings of the next step; None before the first id."""

    @property
    def num_written(self) -> int:
        """See `GenerationState.num_written`."""
        return len(self.ordered_ids)


class RandomOrder(GeneratorHead):
    """The codes of one image in a random order.

    Args:
        grid: rows and columns of codes.
        width: width D of the backbone.
    """

    name = "random-order"
    tokenizer_kind = None
    trains_on_codes, needs_context = True, False
    options: tuple[GroupType, ...] = (GuidanceOptions, CodeSampling, Inpainting)
    OLD_KEYS: ClassVar[Mapping[str, str]] = {"place": "position_embedding", "next": "next_position_embedding"}
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.position_embedding = nn.Embedding(self.num_positions(), width)
        self.next_position_embedding = nn.Embedding(self.num_positions(), width)
        for embedding in (self.position_embedding, self.next_position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    @classmethod
    def from_context(cls, context: BuildContext) -> RandomOrder:
        """An untrained generator for a model.

        Args:
            context: sizes and ids of the model, the generator's own tokenizer and settings.
        """
        return cls(context.grid, context.width)

    def num_positions(self) -> int:
        """See `Generator.num_positions`."""
        return self.grid[0] * self.grid[1]

    def attend_until(self) -> list[int] | None:
        """See `Generator.attend_until`."""
        return None

    def embed_ordered(self, model: GeneratorModel, ids_MP: Tensor, order_MP: Tensor) -> Tensor:
        """Input embeddings (M, P, D) of all steps of P ordered codes.

        Args:
            model: embeds ids.
            ids_MP: the first P - 1 ids, in their order.
            order_MP: all P positions, in their order.
        """
        input_MPD = self.next_position_embedding(order_MP)
        previous_MPD = model.embed(ids_MP) + self.position_embedding(order_MP[:, :-1])
        return torch.cat((input_MPD[:, :1], input_MPD[:, 1:] + previous_MPD), 1)

    # ---------------------------------------------------------------- training

    def prepare(self, model: GeneratorModel, batch: Batch, rng: torch.Generator) -> tuple[list[InputSpan], Targets]:
        """See `Generator.prepare`."""
        rows_M1, positions_MP = batch.span_positions(batch.images_of(self.name))
        order_MP = torch.rand(positions_MP.shape, generator=rng).argsort(-1).to(positions_MP.device)
        ids_MP = batch.ids_BL[rows_M1, positions_MP].gather(-1, order_MP)
        if not len(ids_MP):
            return [], (rows_M1, positions_MP, ids_MP)
        input_MPD = self.embed_ordered(model, ids_MP[:, :-1], order_MP)
        return [InputSpan(rows_M1, positions_MP, input_MPD)], (rows_M1, positions_MP, ids_MP)

    def loss(self, model: GeneratorModel, batch: Batch, hidden_BLD: Tensor, targets: Targets) -> Tensor:
        """See `Generator.loss`."""
        rows_M1, positions_MP, ids_MP = targets
        if not len(ids_MP):
            return self.zero_loss(hidden_BLD)
        id_offset, stop = model.vocabulary.image_start, model.vocabulary.image_stop
        logits = model.logits(hidden_BLD[rows_M1, positions_MP].flatten(0, 1), id_offset, stop).float()
        return nn.functional.cross_entropy(logits, ids_MP.flatten() - id_offset, reduction="none")

    def num_targets(self, batch: Batch) -> int:
        """See `Generator.num_targets`."""
        return len(batch.images_of(self.name)) * self.num_positions()

    # ---------------------------------------------------------------- sampling

    def start(self, spec: SegmentSpec) -> GenerationState:
        """See `Generator.start`."""
        fixed_P = torch.full((self.num_positions(),), -1) if spec.fixed_ids is None else spec.fixed_ids.flatten().cpu()
        chance_P = torch.rand(self.num_positions(), generator=spec.rng)
        order_P = (chance_P + (fixed_P < 0)).argsort()  # given codes come first
        given_ids = [int(id) for id in fixed_P[order_P] if id >= 0]
        return OrderState(spec, [], order_P=order_P, ordered_ids=given_ids)

    def prepare_step(self, state: GenerationState) -> StepInput:
        """See `Generator.prepare_step`."""
        assert isinstance(state, OrderState)
        if state.input_LD is None:
            return StepInput([state.spec.begin_id])
        return StepInput([0] * len(state.input_LD), embeds=state.input_LD)

    def step(self, model: GeneratorModel, states: list[GenerationState], hidden: list[list[Tensor]]) -> list[int]:
        """See `Generator.step`: one code of each image whose begin token is read. All positions stay in the cache."""
        orders = [state for state in states if isinstance(state, OrderState)]
        last_hidden = {id(state): [branch[-1] for branch in h] for state, h in zip(orders, hidden, strict=True)}
        if active := [state for state in orders if state.input_LD is not None]:
            self._sample_codes(model, active, [last_hidden[id(state)] for state in active])
        for state in orders:
            count, num_cached = len(state.ordered_ids), 0 if state.input_LD is None else len(state.ordered_ids)
            state.finished = count == self.num_positions()
            if state.finished:
                raster_P = state.order_P.argsort()
                state.ids = torch.tensor(state.ordered_ids)[raster_P].tolist()
                if state.spec.record_logprobs:
                    fixed_logprobs = [0.0] * (count - len(state.logprobs))  # given codes come first
                    state.logprobs = torch.tensor([*fixed_logprobs, *state.logprobs])[raster_P].tolist()
            else:
                device = self.position_embedding.weight.device
                ids_1P = torch.tensor([state.ordered_ids], dtype=torch.int64, device=device)
                state.input_LD = self.embed_ordered(model, ids_1P, state.order_P[None, : count + 1].to(device))[
                    0, num_cached:
                ]
        return [len(branches[0]) for branches in hidden]

    def _sample_codes(self, model: GeneratorModel, states: list[OrderState], last: list[list[Tensor]]) -> None:
        id_offset = model.vocabulary.image_start
        logits = model.logits(
            torch.stack([s for branches in last for s in branches]), id_offset, model.vocabulary.image_stop
        )
        guided_BV = combine_grouped(logits, [state.spec.guidance for state in states])
        for rows, codes in sample_grouped(guided_BV, list(states)):
            for row, code in zip(rows, codes, strict=True):
                states[row].ordered_ids.append(id_offset + code)

    def decode(self, model: GeneratorModel, states: list[GenerationState]) -> Tensor:
        """See `Generator.decode`."""
        return decode_ids(model, states)


GENERATOR = RandomOrder
