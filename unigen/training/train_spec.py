"""What a recipe gives the Trainer: a model, a data set, an objective, and functions that write outputs.

Nothing is trained here. Does not depend on: losses, models, data formats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)
LossModelT = TypeVar("LossModelT", bound=nn.Module, contravariant=True)
Sample: TypeAlias = Any
"""One item of a data set. The Trainer does not read its contents."""
CollatedBatch: TypeAlias = Any
"""A micro-batch as `collate` makes it of samples and an objective reads it."""
LossSums: TypeAlias = dict[str, tuple[Tensor, Tensor | int]]
"""Name -> (sum, count) of one micro-batch."""


class Objective(Protocol[LossModelT]):
    """A loss: sums and counts by name.

    The loss of a step is sum over names of weights[name] * sum / count, over all its micro-batches and processes. Names
    that begin with "metric/" are logged only; "metric/tokens" gives tokens/s. An objective that is an nn.Module is
    moved to the device. Optional attributes:

    - `weights`: factor of each loss by name, 1 where it is missing.
    - `counts(batch, rng) -> {name: count}`: the counts without running the model, which saves a forward pass with
      accumulation_steps > 1.
    - `step`: an int, set to the index of the step before each.
    """

    def __call__(self, model: LossModelT, batch: CollatedBatch, rng: torch.Generator, /) -> LossSums:
        """Losses of one micro-batch.

        Args:
            model: in training mode.
            batch: on the model's device.
            rng: on the CPU, seeded by (seed, step, slot).

        Returns:
            Name -> (sum, count).
        """


@dataclass
class TrainSpec(Generic[ModelT]):
    """What a recipe's `build(cfg)` returns."""

    model: ModelT
    """The model to be trained. Parameters that take no gradient are neither trained nor averaged."""
    dataset: Any
    """Map-style: `dataset[index]` is a pure function of the index. Without `__len__` it is endless and read in
    order."""
    collate: Callable[[list[Sample]], CollatedBatch] | None = None
    """Makes a batch of samples; None: torch's default."""
    objective: Objective[ModelT] | None = None
    """The loss; None where `objectives` are given."""
    write_samples: Callable[[ModelT, int, Path], None] | None = None
    """`write_samples(model, step, folder)` writes pictures, with the averaged weights in eval mode."""
    save_model: Callable[[ModelT, Path], None] | None = None
    """`save_model(model, folder)` writes the finished model, with the averaged weights in eval mode."""
    make_optimizer: Callable[[ModelT, Any], torch.optim.Optimizer] | None = None
    """`make_optimizer(model, cfg)`; None: `optim.adamw`."""
    objectives: Sequence[tuple[Objective[ModelT], Iterable[nn.Parameter] | torch.optim.Optimizer]] = ()
    """Instead of `objective`, several that step in turn on the same batch, as a generator and a critic do: each with
    the parameters of the model that it may change, or its own optimizer over them."""


def to_device(batch: CollatedBatch, device: torch.device) -> CollatedBatch:
    """Move the tensors of a batch, through dicts, lists, tuples, dataclasses and whatever has a method `to`.

    Args:
        batch: as `collate` makes it.
        device: of the model.

    Returns:
        A batch of the same structure; a value of any other type is returned as it is.
    """
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    return batch
