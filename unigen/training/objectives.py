"""Objectives of unified models: what the trainer calls to get sums and counts. They know losses, not how to train.

Shapes: B rows, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unigen.generators.base import Generator
from unigen.model import UnifiedModel
from unigen.sequence import Batch


class Mixture:
    """The losses of a model's generators on packed documents, each a sum over its own targets with their count: nats,
    and for a flow squared errors.

    loss = sum_g weights[g] * sum_g / count_g, so that a mixture's few text targets are not drowned by its many codes.
    A generator that writes nothing in a batch has no loss there.
    """

    def __init__(self, generators: Mapping[str, Generator], weights: Mapping[str, float] | None = None) -> None:
        """generators: those of the model. weights: of the ones that learn, by name; None: all of them alike."""
        self.weights = dict.fromkeys(generators, 1.0) if weights is None else dict(weights)
        self.generators = {name: generators[name] for name in self.weights}

    def __call__(self, model: Any, batch: Batch, rng: torch.Generator) -> dict[str, tuple[Tensor, Tensor | int]]:
        assert isinstance(model, UnifiedModel)
        batch = model.fill(batch)
        embeds_BLD = model.embed(batch.ids_BL)
        targets = {}
        for name, generator in self.generators.items():
            embeds_BLD, targets[name] = generator.prepare(model, batch, embeds_BLD, rng)
        hidden_BLD = model.hidden(batch, embeds_BLD)
        losses: dict[str, tuple[Tensor, Tensor | int]] = {
            name: generator.loss(model, batch, hidden_BLD, targets[name]) for name, generator in self.generators.items()
        }
        losses["metric/tokens"] = ((batch.segments_BL > 0).sum(), 1)
        return losses

    def counts(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor | int]:
        """How many targets each loss has: known from the packed batch, before its images are encoded."""
        return {"metric/tokens": 1} | {name: g.count(batch) for name, g in self.generators.items()}
