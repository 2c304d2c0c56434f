"""Task `digits`: does a model that draws handwritten digits draw those that it is asked for?

    unigen eval digits --model runs/digits/model [--generator flow] [--images 40] [--json FILE] [--out FOLDER]

A k-nearest-neighbours classifier, fitted on the true digits of the training part as 8x8 grey levels, reads what was
drawn: the share that it takes for the class asked for. Beside it: what it makes of true digits that neither saw, and of
the drawn ones under the next class; and how far the drawn ones are from the nearest training digit, over how far true
digits are that were held out (near 1 is as it should be, far below 1 means copies). It does not depend on how a digit
is drawn."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
from PIL import Image

from unigen.config import write_report
from unigen.data import digits
from unigen.evaluation.runner import (
    OneLineParser,
    generate_outputs,
    load_engine,
    make_parser,
    parse_args,
    sampling_options,
    write_outputs,
)
from unigen.evaluation.task import Example
from unigen.limits import limit_argument as limited
from unigen.utils.extras import require_extra

NUM_NEIGHBORS = 3


class DigitsTask:
    """Ten prompts, the classes. Needs scikit-learn."""

    output: Literal["image", "text"] = "image"

    def __init__(self) -> None:
        require_extra("eval", "sklearn")
        from sklearn.neighbors import KNeighborsClassifier

        images, labels = digits.load(held_out=False)
        self.known = images.reshape(len(images), -1).astype(np.float32)
        self.reader = KNeighborsClassifier(NUM_NEIGHBORS).fit(self.known, labels)

    def items(self) -> list[Example]:
        return [Example(i, name, {"label": i}) for i, name in enumerate(digits.NAMES)]

    def score_batch(self, items: Any, outputs: Any) -> list[dict[str, float]]:
        predictions = self.reader.predict(np.stack([digits.to_digit(picture).ravel() for picture in outputs]))
        return [{"correct": float(r == item.meta["label"])} for item, r in zip(items, predictions, strict=True)]

    def score(self, item: Example, output: Image.Image) -> dict[str, float]:
        return self.score_batch([item], [output])[0]

    def reward(self, item: Example, output: Image.Image) -> float:
        return self.score(item, output)["correct"]

    def relative_nearest_distance(self, vectors: np.ndarray) -> float:
        """The mean distance to the nearest training digit, over that of the held-out digits; 0 for copies."""
        held_out_images, _ = digits.load(held_out=True)
        true = self.reader.kneighbors(held_out_images.reshape(len(held_out_images), -1).astype(np.float32), 1)[0]
        return float(self.reader.kneighbors(vectors, 1)[0].mean() / true.mean())


def arguments() -> OneLineParser:
    parser = make_parser(
        "digits",
        "Draw handwritten digits by class, and score the share that a nearest-neighbour classifier reads right.",
    )
    parser.add_argument("--images", type=limited("n"), default=40, metavar="N", help="pictures a class (default: 40)")
    return parser


def main(args: list[str]) -> int:
    """`unigen eval digits ...`. ValueError for bad input."""
    a = parse_args(arguments(), args)
    start = time.perf_counter()
    task, engine = DigitsTask(), load_engine(a)
    items = task.items()
    images = generate_outputs(engine, task, items, a.images, a.batch, a.seed, **sampling_options(a))
    scores = [task.score_batch([item] * a.images, row) for item, row in zip(items, images, strict=True)]
    by_class = {item.tag: float(np.mean([s["correct"] for s in row])) for item, row in zip(items, scores, strict=True)}
    under_next = [task.score_batch([items[(i + 1) % len(items)]] * a.images, row) for i, row in enumerate(images)]
    true, labels = digits.load(held_out=True)
    figures = {
        "drawn": float(np.mean(list(by_class.values()))),
        "true, held out": float(task.reader.score(true.reshape(len(true), -1), labels)),
        "drawn, under the next class": float(np.mean([s["correct"] for row in under_next for s in row])),
        "distance to training digits": task.relative_nearest_distance(
            np.stack([digits.to_digit(p).ravel() for row in images for p in row])
        ),
    }
    for name, value in figures.items():
        print(f"{name:<30} {value:.3f}")
    print("by class: " + " ".join(f"{name} {value:.2f}" for name, value in by_class.items()))
    if a.out:
        write_outputs(a.out, items, images, scores)
    if a.json:
        write_report(
            a.json,
            command="unigen eval digits " + " ".join(args),
            model=a.model,
            overall=figures["drawn"],
            tasks=by_class,
            rows=[{"name": name, "value": value, "unit": "", "batch": a.batch} for name, value in figures.items()],
            seconds=time.perf_counter() - start,
            images=a.images,
        )
    return 0
