"""The contract of a task: documents + score + reward in one object, which serves evaluation, RL and best-of-n alike.

It does not depend on engines, models and files. A task is a module in `unigen/evaluation/tasks`; there is no other
list.

    items = task.items()                              # what to ask
    scores = task.score(items[0], picture_or_text)    # {"correct": 1.0, ...}, each in [0, 1]
    reward = task.reward(items[0], picture_or_text)   # one float, larger is better

`bootstrap_mean` is the one place that makes a mean out of several outputs of several prompts (prompts are the unit
of chance, tags are averaged without weights: no mean of means by accident)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class Example:
    """One thing to ask. `prompt` is what `engine.generate` takes (a text, a class, a list of texts and images);
    `tag` is the group that it is averaged in; `meta` (JSON-able) holds what the score needs to know."""

    prompt: str | int | list[Any]
    tag: str
    meta: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """`output` is what the engine shall write for an item: an image or a text."""

    output: Literal["image", "text"]

    def items(self) -> list[Example]: ...

    def score(self, item: Example, output: Any) -> dict[str, float]: ...

    def score_batch(self, items: Sequence[Example], outputs: Sequence[Any]) -> list[dict[str, float]]: ...

    def reward(self, item: Example, output: Any) -> float: ...


@dataclass(frozen=True)
class ScoreSummary:
    """A mean with its bootstrap interval [low, high]; `tags` holds each group's own mean."""

    overall: float
    low: float
    high: float
    tags: dict[str, float]
    prompts: int


def bootstrap_mean(
    tags: Sequence[str], values: Sequence[Sequence[float]], rng: np.random.Generator, samples: int = 1000
) -> ScoreSummary:
    """Unweighted mean over tags of the mean over each tag's outputs, and its bootstrap 95% interval over prompts.

    `values[i]` are the outputs' scores of prompt i, `tags[i]` its tag. Prompts are resampled inside each tag (outputs
    of one prompt are not independent). A tag's mean is over all of its outputs, as GenEval's is over images. Raises
    ValueError when there is nothing to average."""
    if not values or len(tags) != len(values) or not all(len(v) for v in values):
        raise ValueError("nothing to average: every prompt needs a tag and at least one scored output")
    sums = np.array([float(np.sum(v)) for v in values])
    counts = np.array([len(v) for v in values], dtype=float)
    names = list(dict.fromkeys(tags))
    label = np.array([names.index(t) for t in tags])
    means, draws = {}, []
    for k, name in enumerate(names):
        index = np.flatnonzero(label == k)
        means[name] = float(sums[index].sum() / counts[index].sum())
        picks = index[rng.integers(0, len(index), (samples, len(index)))]
        draws.append(sums[picks].sum(1) / counts[picks].sum(1))
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    return ScoreSummary(float(np.mean(list(means.values()))), float(low), float(high), means, len(values))
