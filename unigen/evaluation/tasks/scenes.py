"""Task `scenes`: does a picture show what its prompt says? GenEval's six tasks on the rendered world, read by the
detector.

    unigen eval scenes --model unigen-tiny --generator next-token [--quick] [--json FILE] [--out FOLDER]
    unigen eval scenes --oracle                       # the oracle baseline alone; no model is needed

Prompts are in the words of the captions, drawn from the world by seed, with 30% held-out combinations (of objects, of
object and colour, of object and count) and a background in 25% of the prompts (50% of single objects). Beside the
model's score stand the baselines: true pictures of the same prompts, their reconstructions by the model's tokenizer,
the training pictures with the nearest captions, the model's pictures under other prompts, and what is found in noise
and blends. Only the true pictures need the emoji font. Does not depend on: engines beyond `generate_batch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import numpy as np
from PIL import Image

from unigen.evaluation import baselines, geneval
from unigen.evaluation.baselines import ImageGroups
from unigen.evaluation.detector import SceneDetections, SceneDetector, load_detector
from unigen.evaluation.report import Report
from unigen.evaluation.runner import EvaluationRun, GenerationTask, report_rows, score_all
from unigen.evaluation.task import Example, Scores, ScoreSummary, bootstrap_mean
from unigen.inference.options import CANDIDATES
from unigen.inference.protocol import OptionValue
from unigen.media.pixels import to_pixels
from unigen.toyworld.captions import Facts, caption
from unigen.toyworld.scenes import (
    BACKGROUNDS,
    MAX_COUNT,
    OBJECT_EMOJI,
    RELATIONS,
    Group,
    SceneRenderer,
    allowed_colors,
    held_out_combinations,
)
from unigen.utils.option_types import COUNT

# ---------------------------------------------------------------- prompts


def geneval_spec(tag: str, facts: Facts) -> geneval.Specification:
    """GenEval's specification of an image.

    Args:
        tag: one of `geneval.TAGS`.
        facts: groups of objects, and their relation.

    Returns:
        The clauses, as `geneval.evaluate` reads them. In "position" the reference (the second group) is clause 0.
    """
    include: list[geneval.Clause] = [{"class": name, "count": count} for name, _, count in facts.groups]
    for clause, (_, color, _) in zip(include, facts.groups, strict=True):
        if color is not None:
            clause["color"] = color
    exclude: list[geneval.Clause] = [
        {"class": name, "count": count + 1} for name, _, count in facts.groups if tag == "counting"
    ]
    if facts.relation is not None:
        include = [include[1], include[0] | {"position": [facts.relation, 0]}]
    return {"tag": tag, "include": include, "exclude": exclude}


def _sample_request(tag: str, rng: np.random.Generator, index: int) -> tuple[tuple[Group, ...], str | None]:
    """The content of one prompt: its groups, and the relation of the first to the second."""
    names = list(OBJECT_EMOJI)
    a, b = (names[int(k)] for k in rng.choice(len(names), 2, replace=False))

    def sample_color(name: str, *excluded: str | None) -> str:
        colors = [color for color in allowed_colors(name) if color not in excluded]
        return colors[int(rng.integers(len(colors)))]

    if tag == "single_object":
        return ((names[index % len(names)], None, 1),), None
    if tag == "counting":
        return ((a, None, int(rng.integers(2, MAX_COUNT + 1))),), None
    if tag == "colors":
        return ((a, sample_color(a), 1),), None
    if tag == "color_attr":
        first = sample_color(a)
        return ((a, first, 1), (b, sample_color(b, first), 1)), None
    relation = RELATIONS[int(rng.integers(4))] if tag == "position" else None
    return ((a, None, 1), (b, None, 1)), relation


def make_prompts(tag: str, count: int, seed: int) -> list[Example]:
    """Different prompts of one of GenEval's tasks; 3 of 10 are held out where the task has combinations.

    Args:
        tag: the task, one of `geneval.TAGS`.
        count: how many.
        seed: the same seed gives the same prompts.

    Returns:
        The examples, with GenEval's clauses in their metadata.

    Raises:
        ValueError: when there are not that many.
    """
    rng = np.random.default_rng((seed, geneval.TAGS.index(tag)))
    shuffle = rng.permutation(len(OBJECT_EMOJI))
    examples: dict[str, Example] = {}
    for k in range(100 * count):
        i = len(examples)
        if i == count:
            break
        held_out = tag != "single_object" and i % 10 in (2, 5, 8)
        groups, relation = _sample_request(
            tag, rng, int(shuffle[i // 2 % len(shuffle)]) if tag == "single_object" else i
        )
        if bool(held_out_combinations(groups)) != held_out:
            continue
        has_background = i % 2 == 1 if tag == "single_object" else i % 4 == 3
        prompts_exhausted = k > 20 * count  # all without a background are used up
        background = (
            list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))] if has_background or prompts_exhausted else None
        )
        facts = Facts(groups, background, relation)
        metadata = {"spec": geneval_spec(tag, facts), "background": background, "heldout": held_out, "groups": groups}
        examples.setdefault(caption(facts), Example(caption(facts), tag, metadata | {"relation": relation}))
    if len(examples) < count:
        raise ValueError(f"there are only {len(examples)} different prompts for {tag}: ask for fewer than {count}")
    return list(examples.values())


# ---------------------------------------------------------------- the task

BASELINES = ("oracle", "reconstructions", "nearest", "shuffled")


@dataclass
class ScenesTask(GenerationTask[Image.Image]):
    """GenEval on the rendered world."""

    prompts_per_tag: int = 100
    """Prompts of each of the six tags."""
    seed: int = 0
    """Of the prompts."""
    detector: SceneDetector = field(default_factory=load_detector)
    """Reads the images."""

    description: ClassVar[str] = (
        "Draw the prompts of GenEval's six tasks in the rendered world, and score the share of pictures in which a "
        "detector finds what was asked for. Baselines are printed beside the model's score."
    )
    output: ClassVar[Literal["image", "text"]] = "image"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """See `EvaluationTask.add_arguments`: sizes, candidates, and which baselines are wanted."""
        add_size_arguments(parser)
        parser.add_argument(
            "--candidates",
            type=CANDIDATES.parse,
            help="candidates for each picture, of which the best-scoring one is kept",
        )
        group = parser.add_argument_group("baselines (without any of these flags: the model and all baselines)")
        group.add_argument("--oracle", action="store_true", help="only true pictures of the prompts; needs no model")
        group.add_argument("--reconstructions", action="store_true", help="only true pictures through the tokenizer")
        group.add_argument("--nearest", action="store_true", help="only training pictures with the nearest captions")
        group.add_argument("--shuffled", action="store_true", help="the model, and its pictures under other prompts")

    @classmethod
    def create(cls, run: EvaluationRun) -> Self:
        """See `EvaluationTask.create`."""
        return cls(PROMPTS_PER_TAG[run.args.quick], run.args.seed)

    def num_outputs(self, run: EvaluationRun) -> int:
        """See `GenerationTask.num_outputs`: as --images says."""
        return int(run.args.images)

    def generation_options(self, run: EvaluationRun, example: Example) -> dict[str, OptionValue]:
        """See `GenerationTask.generation_options`: candidates where --candidates says."""
        return {"candidates": run.args.candidates} if run.args.candidates else {}

    def examples(self) -> list[Example]:
        """See `GenerationTask.examples`: the same number of prompts for each tag."""
        return [example for tag in geneval.TAGS for example in make_prompts(tag, self.prompts_per_tag, self.seed)]

    def detect(self, images: Sequence[Image.Image], batch: int = 128) -> list[SceneDetections]:
        """What the detector finds in each image, resized to the size that it was trained on."""
        config, detections = self.detector.config, []
        for i in range(0, len(images), batch):
            x_BCHW = to_pixels(images[i : i + batch], config.image_size)
            detections += self.detector.detect(x_BCHW, min(config.threshold, config.count_threshold))
        return detections

    def score_detections(self, example: Example, detections: SceneDetections) -> Scores:
        """Score what was found in an image of an example.

        Args:
            example: the example of the output.
            detections: what the detector found.

        Returns:
            "correct", GenEval's verdict; "strict", where there is no surplus object either; "share" of the clauses that
            hold; "background", where the prompt names one.
        """
        config, spec = self.detector.config, example.metadata["spec"]
        threshold = config.count_threshold if spec["tag"] == "counting" else config.threshold
        objects_by_class = geneval.group_by_class(detections.objects, threshold)
        verdict = geneval.evaluate(spec, objects_by_class)
        strict = verdict.correct and not geneval.count_surplus_objects(spec, objects_by_class)
        scores = {"correct": float(verdict.correct), "strict": float(strict), "share": verdict.clause_share}
        if example.metadata["background"] is not None:
            scores["background"] = float(detections.background == example.metadata["background"])
        return scores

    def score_batch(self, examples: Sequence[Example], outputs: Sequence[Image.Image]) -> list[Scores]:
        """See `GenerationTask.score_batch`, and `score_detections` for the names of the scores."""
        pairs = zip(examples, self.detect(outputs), strict=True)
        return [self.score_detections(example, detections) for example, detections in pairs]

    def reward(self, example: Example, output: Image.Image) -> float:
        """In [0, 1]: the mean of strict correctness, the share of clauses that hold and, where asked, the
        background."""
        scores = self.score(example, output)
        return float(np.mean([scores[name] for name in ("strict", "share", "background") if name in scores]))

    def false_positive_rate(self, images: Sequence[Image.Image]) -> float:
        """The share of images in which any object is found, although there is none."""
        threshold = self.detector.config.threshold
        found = [
            any(detection.score > threshold for detection in detections.objects) for detections in self.detect(images)
        ]
        return float(np.mean(found))

    def run(self, run: EvaluationRun) -> Report:
        """See `EvaluationTask.run`: the model's score, and the baselines beside it."""
        return _Comparison(self, run).run_all()


PROMPTS_PER_TAG = {True: 20, False: 100}
"""With --quick or not."""


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how many prompts and images there are."""
    parser.add_argument("--quick", action="store_true", help="20 prompts a task instead of 100")
    parser.add_argument("--images", type=COUNT.parse, default=4, metavar="N", help="pictures a prompt (default: 4)")


@dataclass(frozen=True)
class ScenesResult:
    """Scores of one set of images."""

    overall: ScoreSummary
    """Of "correct"."""
    strict: ScoreSummary
    """Of "strict": no surplus object either."""
    in_distribution: ScoreSummary | None
    """Of prompts whose combinations training could show."""
    held_out: ScoreSummary | None
    """Of the others."""
    background: float | None
    """The share of right backgrounds, where prompts name one."""
    best_of_n_correct: float
    """The share of prompts of which any image is correct."""


def summarize_scores(examples: Sequence[Example], scores: Sequence[Sequence[Scores]], seed: int = 0) -> ScenesResult:
    """The means of all scores.

    Args:
        examples: the examples of the outputs.
        scores: of the images of each example.
        seed: of the intervals.

    Returns:
        The means; overall is the unweighted mean of the tags, as GenEval's.
    """

    def mean(name: str, held_out: bool | None = None) -> ScoreSummary | None:
        rows = [
            (example.tag, [s[name] for s in row])
            for example, row in zip(examples, scores, strict=True)
            if held_out is None or example.metadata["heldout"] == held_out
        ]
        if not rows:
            return None
        return bootstrap_mean([tag for tag, _ in rows], [v for _, v in rows], np.random.default_rng(seed))

    overall, strict = mean("correct"), mean("strict")
    assert overall is not None and strict is not None
    background_scores = [s["background"] for row in scores for s in row if "background" in s]
    best = float(np.mean([max(s["correct"] for s in row) for row in scores]))
    return ScenesResult(
        overall,
        strict,
        mean("correct", False),
        mean("correct", True),
        float(np.mean(background_scores)) if background_scores else None,
        best,
    )


def format_row(name: str, result: ScenesResult) -> str:
    """A row of the printed table.

    Args:
        name: of the row.
        result: scores of one set of images.

    Returns:
        The overall score with its interval, then the score of each tag.
    """
    tags = " ".join(f"{result.overall.tags[tag]:.3f}".rjust(len(tag)) for tag in geneval.TAGS)
    return f"{name:<16} {result.overall.overall:.3f} [{result.overall.low:.3f}, {result.overall.high:.3f}]  {tags}"


def result_rows(name: str, result: ScenesResult, batch: int | None = None) -> list[dict[str, object]]:
    """The report's rows for one set of images.

    Args:
        name: of the set.
        result: its scores.
        batch: how many images were generated at a time.

    Returns:
        One row a figure.
    """
    values = {
        "": result.overall.overall,
        "low": result.overall.low,
        "high": result.overall.high,
        "strict": result.strict.overall,
        "seen": None if result.in_distribution is None else result.in_distribution.overall,
        "heldout": None if result.held_out is None else result.held_out.overall,
        "background": result.background,
        "any of a prompt": result.best_of_n_correct,
        **result.overall.tags,
    }
    unit: dict[str, object] = {"unit": "share", "batch": batch}
    return [{"name": f"{name} {key}".strip(), "value": v} | unit for key, v in values.items() if v is not None]


class _Comparison:
    """The score of the model and of the baselines beside it.

    Args:
        task: scores images.
        run: its arguments select the baselines.
    """

    def __init__(self, task: ScenesTask, run: EvaluationRun) -> None:
        self.task, self.run, self.examples = task, run, task.examples()
        selected = [name for name in BASELINES if getattr(run.args, name)]
        self.is_selection = bool(selected)
        self.names = selected or list(BASELINES)
        self.with_model = not selected or "shuffled" in selected
        self.results: dict[str, ScenesResult] = {}
        self.renderer = self._make_renderer()

    def run_all(self) -> Report:
        """Score the model, then the baselines."""
        task, run, examples = self.task, self.run, self.examples
        if self.with_model or "reconstructions" in self.names:
            _ = run.engine  # is loaded before the table begins
        print(f"{'':<16} {'overall, 95% interval':<21}  {' '.join(geneval.TAGS)}", flush=True)
        images: ImageGroups = []
        if self.with_model:
            images = task.generate_all(run, examples)
            run.write_outputs(examples, images, self._report("model", images))
        true: ImageGroups = []
        if self.renderer is not None:
            true = baselines.oracle_images(examples, run.args.images, run.args.seed, self.renderer)
            self._report_rendered(self.renderer, true)
        if "shuffled" in self.names and images:
            self._report("shuffled", baselines.shuffle_images(examples, images, run.args.seed))
        return self._summarize([row[0] for row in (true or images)])

    def _make_renderer(self) -> SceneRenderer | None:
        """Renderer of true images, None where none is needed or no font is there. ValueError where it is required."""
        if not set(self.names) & {"oracle", "reconstructions", "nearest"}:
            return None
        try:
            return SceneRenderer(self.task.detector.config.image_size)
        except ValueError as error:
            if self.is_selection:
                raise
            print(f"left out: oracle, reconstructions and nearest training pictures ({error})", file=sys.stderr)
        return None

    def _report(self, name: str, images: ImageGroups) -> list[list[Scores]]:
        scores = score_all(self.task, self.examples, images)
        self.results[name] = summarize_scores(self.examples, scores, self.run.args.seed)
        print(format_row(name, self.results[name]), flush=True)
        return scores

    def _report_rendered(self, renderer: SceneRenderer, true: ImageGroups) -> None:
        """The baselines of rendered images."""
        args = self.run.args
        if "oracle" in self.names:
            self._report("oracle", true)
        if "reconstructions" in self.names:
            model = self.run.local_model
            if model is not None:
                self._report("reconstructions", baselines.reconstruct_images(model.image_tokenizer, true))
            elif self.is_selection:
                raise ValueError(f"{self.run.model_name} has no image tokenizer here: leave --reconstructions out")
            else:
                print(f"left out: reconstructions ({self.run.model_name} has no image tokenizer here)", file=sys.stderr)
        if "nearest" in self.names:
            images = baselines.nearest_training_images(self.examples, args.images, args.seed, renderer)
            self._report("nearest", images)

    def _summarize(self, sample: list[Image.Image]) -> Report:
        task, args = self.task, self.run.args
        noise = baselines.noise_images(200, task.detector.config.image_size, np.random.default_rng(args.seed))
        false_positives = {
            "noise": task.false_positive_rate(noise),
            "blends": task.false_positive_rate(baselines.blend_images(sample)),
        }
        first = next(iter(self.results))
        for row in result_rows(first, self.results[first]):
            if str(row["name"]).split()[-1] in ("strict", "seen", "heldout", "background", "prompt"):
                print(f"{row['name']}: {row['value']:.3f}")
        print(", ".join(f"objects found in {name}: {v:.3f} of the pictures" for name, v in false_positives.items()))
        rows = [row for name, result in self.results.items() for row in result_rows(name, result, args.batch)]
        rows += report_rows({f"objects found in {name}": value for name, value in false_positives.items()}, "share")
        overall = self.results[first].overall
        details = {
            "interval": [overall.low, overall.high],
            "prompts": overall.num_prompts,
            "images": args.images,
        }
        return Report(overall.overall, overall.tags, rows, details, None if self.with_model else first)
