"""Masked prediction: all codes of an image at once, the surest first (MaskGIT, Show-o).

    loss = - E_r mean over the masked i of log p(x_i | what is not masked, context),   ceil(P cos(pi r / 2)) of P masked

Chang et al. 2022 (arXiv 2202.04200), section 3. Inside the image every position sees every other, and the state at a
masked position predicts that position's own code (no shift). A picture is written in few steps: all masked codes are
drawn, those of highest confidence stay, and the share still masked falls along the cosine. Codes that are given from
the start stay as they are, so any part of a picture can be painted anew.
The file refuses to know: templates, tokenizers, caches.

Shapes: M images, P codes of an image, B rows, L positions, D width, V codes of the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unigen.generators.base import CODES, Frame, Model, Read, Span, State
from unigen.generators.next_token import pictures_of_ids
from unigen.samplers.logits import race, warp
from unigen.sequence import Batch

STEPS = 12
CHOICE = 2.0
"""Choice temperature: of the Gumbel noise on the confidences, times 1 - (step + 1) / steps, 0 in the last step."""

Targets = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class MaskedState(State):
    """ids_P: -1 where a code is still to be written. unknown: how many those were at the start."""

    ids_P: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    unknown: int = 0
    step: int = 0


def still_masked(unknown: int, left: int, step: int, steps: int) -> int:
    """How many codes stay masked after `step` (from 0) of `steps`: the cosine's share, at least one code being written.

    unknown: masked at the start; left: masked before this step.
    """
    if step + 1 >= steps:
        return 0
    return max(0, min(left - 1, max(1, math.floor(unknown * math.cos(math.pi / 2 * (step + 1) / steps)))))


class Masked:
    """The codes of one image by masked prediction."""

    name = "masked"
    own: str | None = None
    clean, codes, wants_context = False, True, False
    takes: tuple[str, ...] = (*CODES, "steps", "fixed")

    def __init__(
        self, grid: tuple[int, int], mask: int, steps: int = STEPS, choice_temperature: float = CHOICE
    ) -> None:
        """mask: the id that stands for a masked code."""
        self.grid, self.mask, self.steps = grid, mask, steps
        self.choice_temperature = choice_temperature

    @classmethod
    def of(cls, frame: Frame) -> Masked:
        return cls(frame.grid, frame.mask)

    def positions(self) -> int:
        return self.grid[0] * self.grid[1]

    def reach(self) -> list[int] | None:
        return [self.positions() - 1] * self.positions()

    # ---------------------------------------------------------------- training

    def prepare(self, model: Model, batch: Batch, embeds_BLD: Tensor, rng: torch.Generator) -> tuple[Tensor, Targets]:
        rows_M1, at_MP = batch.places(batch.written_by(self.name))
        ids_MP = batch.ids_BL[rows_M1, at_MP]
        count, codes = at_MP.shape
        ratio_M1 = torch.cos(math.pi / 2 * torch.rand(count, 1, generator=rng))
        order_MP = torch.rand(count, codes, generator=rng).argsort(-1).argsort(-1)
        masked_MP = (order_MP < (codes * ratio_M1).ceil().clamp(min=1)).to(ids_MP.device)
        read_MPD = model.embed(ids_MP.masked_fill(masked_MP, self.mask)).to(embeds_BLD.dtype)
        return embeds_BLD.index_put((rows_M1, at_MP), read_MPD), (rows_M1, at_MP, ids_MP, masked_MP)

    def loss(self, model: Model, batch: Batch, hidden_BLD: Tensor, targets: Targets) -> tuple[Tensor, int]:
        """The mean over each image's masked codes, summed over images, and the number of images."""
        rows_M1, at_MP, ids_MP, masked_MP = targets
        first, stop = model.vocabulary.text_size, model.vocabulary.size
        logits = model.logits(hidden_BLD[rows_M1, at_MP][masked_MP], first, stop).float()
        nats = torch.nn.functional.cross_entropy(logits, ids_MP[masked_MP] - first, reduction="none")
        share_MP = (1 / masked_MP.sum(-1, keepdim=True)).expand(masked_MP.shape)
        return (nats * share_MP[masked_MP]).sum(), len(masked_MP)

    def count(self, batch: Batch) -> int:
        return len(batch.written_by(self.name))

    # ---------------------------------------------------------------- sampling

    def start(self, span: Span) -> State:
        ids_P = torch.full((self.positions(),), -1) if span.fixed is None else span.fixed.flatten().cpu().clone()
        return MaskedState(span, [], ids_P=ids_P, unknown=int((ids_P < 0).sum()))

    def ask(self, state: State) -> Read:
        assert isinstance(state, MaskedState)
        codes = self.positions()
        read_P = torch.where(state.ids_P < 0, self.mask, state.ids_P)
        return Read([state.span.begin, *read_P.tolist()], reach=[0] + [codes] * codes)

    def advance(self, model: Model, states: list[State], hidden: list[list[Tensor]]) -> list[int]:
        first = model.vocabulary.text_size
        flat = torch.cat([branch[1:] for branches in hidden for branch in branches])
        logits = model.logits(flat, first, model.vocabulary.size).unflatten(0, (-1, self.positions()))
        parts = iter(logits)
        for state, branches in zip(states, hidden, strict=True):
            assert isinstance(state, MaskedState)
            self._write(state, state.span.guidance.combine([next(parts) for _ in branches]), first)
        return [0] * len(states)

    def _write(self, state: MaskedState, logits_PV: Tensor, first: int) -> None:
        """Draw all masked codes; keep the surest of them."""
        span, steps = state.span, state.span.steps or self.steps
        if span.sampling.temperature == 0:
            weights_PV, noise = logits_PV.float().softmax(-1), 0.0
            drawn_P = logits_PV.argmax(-1).cpu()
        else:
            weights_PV = warp(logits_PV, span.sampling).softmax(-1)
            drawn_P = race(weights_PV, torch.empty(logits_PV.shape).exponential_(generator=span.rng)).cpu()
            noise = self.choice_temperature * (1 - (state.step + 1) / steps)
        # confidence = log p(drawn) + noise * Gumbel
        gumbel_P = -torch.empty(len(drawn_P)).exponential_(generator=span.rng).log()
        sure_P = weights_PV.cpu().gather(-1, drawn_P[:, None])[:, 0].log() + noise * gumbel_P
        masked_P = state.ids_P < 0
        left = still_masked(state.unknown, int(masked_P.sum()), state.step, steps)
        again = sure_P.masked_fill(~masked_P, math.inf).argsort()[:left]
        state.ids_P = torch.where(masked_P, drawn_P + first, state.ids_P)
        state.ids_P[again] = -1
        state.step += 1
        state.done = left == 0
        state.ids = state.ids_P.tolist() if state.done else []

    def pictures(self, model: Model, states: list[State]) -> Tensor:
        return pictures_of_ids(model, states)


GENERATOR = Masked
