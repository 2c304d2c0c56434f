"""Objectives of unified models: what the trainer calls to get sums and counts. They know losses, not how to train.

Shapes: B rows, L positions, D width, T targets, V ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan
from unigen.generators.base import Generator
from unigen.generators.next_token import is_causal
from unigen.model.unified import UnifiedModel


class MultiGeneratorLoss(nn.Module):
    """The losses of a model's generators on packed documents, each a sum over its own targets with their count: nats,
    and for a flow squared errors.

    loss = sum_g weights[g] * sum_g / count_g, so that a mixture's few text targets are not drowned by its many codes.
    A generator that writes nothing in a batch has no loss there.

    With `teacher`, a model that text and next-token are not to move from, their losses are no longer - log p of the
    data but sum_v q(v) log (q(v) / p(v)), q the teacher's prediction, as in Learning without Forgetting (Li and Hoiem
    2016, arXiv 1606.09282): a model learns new ways of writing and keeps what comparisons or sharper data had made of
    the old.
    """

    def __init__(
        self,
        generators: Mapping[str, Generator],
        weights: Mapping[str, float] | None = None,
        teacher: UnifiedModel | None = None,
    ) -> None:
        """
        Args:
            generators: those of the model.
            weights: of the ones that learn, by name; None: all of them, each 1.
            teacher: its parameters are frozen.
        """
        super().__init__()
        self.weights = dict.fromkeys(generators, 1.0) if weights is None else dict(weights)
        self.generators = {name: generators[name] for name in self.weights}
        self.teacher = teacher if teacher is None else teacher.requires_grad_(False).eval()

    def forward(self, model: Any, batch: Batch, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        assert isinstance(model, UnifiedModel)
        batch = model.insert_image_ids(batch)
        spans: list[InputSpan] = []
        targets = {}
        for name, generator in self.generators.items():
            generator_spans, targets[name] = generator.prepare(model, batch, rng)
            spans += generator_spans
        hidden_BLD = model.hidden_states(batch, spans)
        losses: dict[str, tuple[Tensor, Tensor | int]] = {}
        with torch.no_grad():
            teacher_hidden_BLD = None if self.teacher is None else self.teacher.causal_hidden_states(batch)
        for name, generator in self.generators.items():
            if teacher_hidden_BLD is not None and self.teacher is not None and is_causal(generator):
                target_BL = generator.target_mask(batch)
                table = generator.vocab_slice(model.vocabulary)
                kl_sum = kl_from_teacher(self.teacher, teacher_hidden_BLD, model, hidden_BLD, target_BL, table)
                losses[name] = kl_sum, target_BL.sum()
            else:
                costs_T = generator.loss(model, batch, hidden_BLD, targets[name])
                losses[name] = costs_T.sum(), len(costs_T)
        losses["metric/tokens"] = ((batch.segments_BL > 0).sum(), 1)
        return losses

    def counts(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor | int]:
        """How many targets each loss has: known from the packed batch, before its images are encoded."""
        return {"metric/tokens": 1} | {name: g.num_targets(batch) for name, g in self.generators.items()}


def kl_from_teacher(
    teacher: UnifiedModel,
    teacher_hidden_BLD: Tensor,
    model: UnifiedModel,
    hidden_BLD: Tensor,
    target_BL: Tensor,
    vocab_slice: slice,
) -> Tensor:
    """Sum of sum_v q(v) (log q(v) - log p(v)) in nats over the ids marked in `target_BL`.

    Args:
        teacher: whose prediction is q.
        teacher_hidden_BLD: its hidden states of the batch.
        model: whose prediction is p.
        hidden_BLD: its hidden states of the batch.
        target_BL: which ids are predicted, each from the position before it.
        vocab_slice: the ids v.
    """
    rows, positions = target_BL.nonzero(as_tuple=True)
    with torch.no_grad():
        log_q_TV = (
            teacher.logits(teacher_hidden_BLD[rows, positions - 1], vocab_slice.start, vocab_slice.stop)
            .float()
            .log_softmax(-1)
        )
    log_p_TV = (
        model.logits(hidden_BLD[rows, positions - 1], vocab_slice.start, vocab_slice.stop).float().log_softmax(-1)
    )
    return nn.functional.kl_div(log_p_TV, log_q_TV, reduction="sum", log_target=True)
