"""AdamW with the usual parameter groups, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from unigen.config import OptimConfig


def lr_factor(optim: OptimConfig, step: int, progress: float) -> float:
    """Return the factor of the learning rate at a step: a linear warm-up times a decay from 1 to `min_lr_ratio`.

    Args:
        optim: warm-up in steps, shape and end of the decay.
        step: index of the step, from 0 on.
        progress: the share of the run that is done, in [0, 1].

    Returns:
        A factor in (0, 1].
    """
    warmup_factor = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    progress = min(max(progress, 0.0), 1.0)
    if optim.schedule == "constant":
        return warmup_factor
    decay = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return warmup_factor * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * decay)


def adamw(
    model: nn.Module, optim: OptimConfig, parameters: Iterable[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: not on embeddings, norms, biases or other vectors.

    Args:
        model: owns the parameters.
        optim: learning rate, betas, epsilon, weight decay.
        parameters: those that are trained; None: all of the model. Frozen ones are left out.

    Returns:
        A fused optimizer of one or two parameter groups.
    """
    trainable_ids = {id(p) for p in (model.parameters() if parameters is None else parameters) if p.requires_grad}
    decay: dict[int, nn.Parameter] = {}
    no_decay: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if id(p) in trainable_ids:
                is_vector = p.ndim < 2 or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
                (no_decay if is_vector else decay)[id(p)] = p
    for shared_id in no_decay.keys() & decay.keys():  # tied weights count as embeddings
        del decay[shared_id]
    assert trainable_ids == no_decay.keys() | decay.keys(), "an objective's parameters must belong to the model"
    groups = [
        {"params": list(decay.values()), "weight_decay": optim.weight_decay},
        {"params": list(no_decay.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )
