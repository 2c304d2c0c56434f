"""Objectives of unified models: what the trainer calls to get sums and counts. They know losses, not how to train.

Shapes: B rows, L positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unigen.model import UnifiedModel
from unigen.sequence import Batch


class Mixture:
    """The losses of a model's generators on packed documents, each a sum over its own targets (nats) with their count.

    loss = sum_g weights[g] * sum_g / count_g, so that a mixture's few text targets are not drowned by its many codes.
    """

    def __init__(self, generators: tuple[str, ...] = ("next-token", "text"), text_weight: float = 1.0) -> None:
        self.generators = generators
        self.weights = {"text": text_weight}

    def __call__(self, model: Any, batch: Batch, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        assert isinstance(model, UnifiedModel)
        batch = model.fill(batch)
        hidden_BLD = model.hidden(batch)
        losses: dict[str, tuple[Tensor, Tensor | int]] = {
            name: model.generators[name].loss(model, batch, hidden_BLD) for name in self.generators
        }
        losses["metric/tokens"] = ((batch.segments_BL > 0).sum(), 1)
        return losses

    def counts(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor | int]:
        """How many targets each loss has: known from the packed batch, before its images are encoded."""
        image_BL = torch.zeros_like(batch.loss_BL)
        for row, start, stop in batch.spans_N3.tolist():
            image_BL[row, start:stop] = True
        found: dict[str, Tensor | int] = {"metric/tokens": 1}
        for name in self.generators:
            found[name] = (batch.loss_BL & (~image_BL if name == "text" else image_BL)).sum()
        return found
