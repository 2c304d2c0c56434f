"""Objectives of unified models, which the Trainer calls for sums and counts. Do not depend on: how models are trained.

Shapes: B rows, L positions, D width, T targets, V ids.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan
from unigen.generators.base import Generator
from unigen.generators.next_token import is_causal
from unigen.model.unified import UnifiedModel


class MultiGeneratorLoss(nn.Module):
    """The losses of a model's generators on packed documents.

        loss = sum_g weights[g] * sum_g / count_g

    Each generator g has a sum over its targets, in nats, or squared errors for a flow, and their count. So the few
    text targets of a mixture are not drowned by its many codes. A generator without targets in a batch has no loss
    there.

    With a teacher the losses of text and next-token are sum_v q(v) log (q(v) / p(v)) instead of - log p of the data,
    with q the teacher's prediction, as in Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282): the model
    learns new generators and keeps what preferences or better data had made of the old ones.
    """

    def __init__(
        self,
        generators: Mapping[str, Generator],
        weights: Mapping[str, float] | None = None,
        teacher: UnifiedModel | None = None,
    ) -> None:
        """
        Args:
            generators: those of the model, by name.
            weights: factor of each loss that is trained, by name; None: all of them, each 1.
            teacher: a model whose predictions of text and next-token are kept; its parameters are frozen. None: the
                data are the targets.
        """
        super().__init__()
        self.weights = dict.fromkeys(generators, 1.0) if weights is None else dict(weights)
        self.generators = {name: generators[name] for name in self.weights}
        self.teacher = teacher if teacher is None else teacher.requires_grad_(False).eval()

    def forward(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Compute the losses of a batch.

        Args:
            model: a `UnifiedModel`.
            batch: packed documents, on the model's device.
            rng: draws masks, noise and times, on the CPU.

        Returns:
            Name -> (sum, count), with "metric/tokens".
        """
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
        """Count the targets of each loss, without running the model and before images are encoded.

        Args:
            batch: packed documents.
            rng: not used.

        Returns:
            Name -> count.
        """
        return {"metric/tokens": 1} | {name: g.num_targets(batch) for name, g in self.generators.items()}


def kl_from_teacher(
    teacher: UnifiedModel,
    teacher_hidden_BLD: Tensor,
    model: UnifiedModel,
    hidden_BLD: Tensor,
    target_BL: Tensor,
    vocab_slice: slice,
) -> Tensor:
    """Sum the divergence from a teacher, sum_v q(v) (log q(v) - log p(v)), over targets.

    Args:
        teacher: the model whose prediction is q.
        teacher_hidden_BLD: its hidden states of the batch.
        model: the model whose prediction is p.
        hidden_BLD: its hidden states of the batch.
        target_BL: which ids are predicted, each from the position before it; bool.
        vocab_slice: the ids v.

    Returns:
        The sum in nats, a scalar.
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
