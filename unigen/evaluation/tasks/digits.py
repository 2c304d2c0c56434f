"""Task `digits`: does a class-conditional model of handwritten digits generate the requested ones?

    unigen eval digits --model runs/digits/model [--generator flow] [--images 40] [--json FILE] [--out FOLDER]

A k-nearest-neighbours classifier, fitted on the true digits of the training part as 8x8 grey levels, reads what was
drawn: the share that it takes for the class asked for. Beside it: what it makes of true digits that neither saw, and of
the drawn ones under the next class; and how far the drawn ones are from the nearest training digit, over how far true
digits are that were held out (near 1 is as it should be, far below 1 means copies). Does not depend on: how a digit is
drawn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Self

import numpy as np
from PIL import Image

from unigen.data import digits
from unigen.evaluation.report import Report
from unigen.evaluation.runner import EvaluationRun, GenerationTask, report_rows
from unigen.evaluation.task import Example, Scores
from unigen.utils.extras import require_extra
from unigen.utils.option_types import COUNT

NUM_NEIGHBORS = 3


class DigitsTask(GenerationTask[Image.Image]):
    """Ten prompts, the classes. Needs scikit-learn."""

    description = (
        "Draw handwritten digits by class, and score the share that a nearest-neighbour classifier reads right."
    )
    output = "image"

    def __init__(self) -> None:
        require_extra("eval", "sklearn")
        from sklearn.neighbors import KNeighborsClassifier

        images, labels = digits.load_split(held_out=False)
        training_vectors = images.reshape(len(images), -1).astype(np.float32)
        self.classifier = KNeighborsClassifier(NUM_NEIGHBORS).fit(training_vectors, labels)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """See `EvaluationTask.add_arguments`: how many images of each class."""
        parser.add_argument(
            "--images", type=COUNT.parse, default=40, metavar="N", help="pictures a class (default: 40)"
        )

    @classmethod
    def create(cls, run: EvaluationRun) -> Self:
        """See `EvaluationTask.create`."""
        return cls()

    def num_outputs(self, run: EvaluationRun) -> int:
        """See `GenerationTask.num_outputs`: as --images says."""
        return int(run.args.images)

    def examples(self) -> list[Example]:
        """See `GenerationTask.examples`: one for each class."""
        return [Example(i, name, {"label": i}) for i, name in enumerate(digits.NAMES)]

    def score_batch(self, examples: Sequence[Example], outputs: Sequence[Image.Image]) -> list[Scores]:
        """See `GenerationTask.score_batch`: "correct" is 1 where the classifier predicts the requested class."""
        predictions = self.classifier.predict(np.stack([digits.to_digit(image).ravel() for image in outputs]))
        pairs = zip(examples, predictions, strict=True)
        return [{"correct": float(label == example.metadata["label"])} for example, label in pairs]

    def relative_nearest_distance(self, vectors: np.ndarray) -> float:
        """Mean distance to the nearest training digit, relative to that of held-out digits.

        Args:
            vectors: (N, 64) float32: 8x8 grey levels of generated digits.

        Returns:
            The ratio: 0 for copies, near 1 as it should be.
        """
        held_out_images, _ = digits.load_split(held_out=True)
        held_out_vectors = held_out_images.reshape(len(held_out_images), -1).astype(np.float32)
        true = self.classifier.kneighbors(held_out_vectors, 1)[0]
        return float(self.classifier.kneighbors(vectors, 1)[0].mean() / true.mean())

    def summarize(
        self,
        run: EvaluationRun,
        examples: Sequence[Example],
        outputs: list[list[Image.Image]],
        scores: list[list[Scores]],
    ) -> Report:
        """See `GenerationTask.summarize`."""
        by_class = {
            example.tag: float(np.mean([s["correct"] for s in row]))
            for example, row in zip(examples, scores, strict=True)
        }
        under_next = [
            self.score_batch([examples[(i + 1) % len(examples)]] * len(row), row) for i, row in enumerate(outputs)
        ]
        true, labels = digits.load_split(held_out=True)
        figures = {
            "drawn": float(np.mean(list(by_class.values()))),
            "true, held out": float(self.classifier.score(true.reshape(len(true), -1), labels)),
            "drawn, under the next class": float(np.mean([s["correct"] for row in under_next for s in row])),
            "distance to training digits": self.relative_nearest_distance(
                np.stack([digits.to_digit(image).ravel() for row in outputs for image in row])
            ),
        }
        for name, value in figures.items():
            print(f"{name:<30} {value:.3f}")
        print("by class: " + " ".join(f"{name} {value:.2f}" for name, value in by_class.items()))
        rows = report_rows(figures, "", run.args.batch)
        return Report(figures["drawn"], by_class, rows, {"images": run.args.images})
