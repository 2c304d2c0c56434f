"""The contract of a task: examples, score and reward in one object, which serves evaluation, RL and best-of-n alike.

    examples = task.examples()                          # what to ask for
    scores = task.score(examples[0], image_or_text)     # {"correct": 1.0, ...}, each in [0, 1]
    reward = task.reward(examples[0], image_or_text)    # one float, larger is better

`bootstrap_mean` is the one place that makes a mean out of several outputs of several prompts (prompts are the unit of
chance, tags are averaged without weights: no mean of means by accident). Does not depend on: engines, models, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np

Scores: TypeAlias = dict[str, float]
"""Of one output, by name: "correct" and others, each in [0, 1]."""
OutputT = TypeVar("OutputT")
"""What a task scores: PIL images or strings."""
OutputT_contra = TypeVar("OutputT_contra", contravariant=True)


@dataclass(frozen=True)
class Example:
    """One thing to ask for."""

    prompt: str | int | list[Any]
    """What `engine.generate` takes: a text, a class, a list of texts and images."""
    tag: str
    """The group that it is averaged in."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the score needs to know; JSON can hold it."""


class Task(Protocol[OutputT_contra]):
    """Examples and their score."""

    @property
    def output(self) -> Literal["image", "text"]:
        """What an engine generates for an example."""
        ...

    def examples(self) -> list[Example]:
        """What to ask for; the same each time."""
        ...

    def score(self, example: Example, output: OutputT_contra) -> Scores:
        """The scores of one output."""
        ...

    def score_batch(self, examples: Sequence[Example], outputs: Sequence[OutputT_contra]) -> list[Scores]:
        """The scores of one output for each example."""
        ...

    def reward(self, example: Example, output: OutputT_contra) -> float:
        """One number for an output; larger is better."""
        ...


@dataclass(frozen=True)
class ScoreSummary:
    """A mean with its bootstrap interval."""

    overall: float
    """Unweighted mean over the tags."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""
    tags: dict[str, float]
    """The mean of each tag."""
    num_prompts: int
    """How many prompts were averaged."""


def bootstrap_mean(
    tags: Sequence[str], values: Sequence[Sequence[float]], rng: np.random.Generator, samples: int = 1000
) -> ScoreSummary:
    """The unweighted mean over tags of the mean over each tag's outputs, and its bootstrap 95% interval over prompts.

    Prompts are resampled inside each tag, since outputs of one prompt are not independent. A tag's mean is over all of
    its outputs, as GenEval's is over images.

    Args:
        tags: of each prompt.
        values: the scores of each prompt's outputs.
        rng: draws the resamples.
        samples: how many of them.

    Returns:
        The mean, its interval and the means of the tags.

    Raises:
        ValueError: where there is nothing to average.
    """
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
