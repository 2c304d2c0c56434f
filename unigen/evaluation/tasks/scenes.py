"""Task `scenes`: does a picture show what its prompt says? GenEval's six tasks on the rendered world, read by the
detector.

    unigen eval scenes --model unigen-tiny --generator next-token [--quick] [--json FILE] [--out FOLDER]
    unigen eval scenes --oracle                       # only this rung of the ladder; no model is needed

Prompts are in the words of the captions, drawn from the world by seed, with 30% held-out combinations (of objects, of
object and colour, of object and count) and a background in 25% of the prompts (50% of single objects). Beside the
model's score stands the ladder: true pictures of the same prompts, their reconstructions by the model's tokenizer,
the training pictures with the nearest captions, the model's pictures under other prompts, and what is found in noise
and blends. Only the true pictures need the emoji font. Does not depend on engines beyond `generate_batch`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from unigen.config import write_report
from unigen.evaluation import baselines, geneval
from unigen.evaluation.baselines import ImageGroups
from unigen.evaluation.detector import SceneDetections, SceneDetector, load_detector
from unigen.evaluation.runner import (
    OneLineParser,
    generate_outputs,
    load_engine,
    make_parser,
    parse_args,
    sampling_options,
    write_outputs,
)
from unigen.evaluation.task import Example, ScoreSummary, bootstrap_mean
from unigen.limits import limit_argument as limited
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

# ---------------------------------------------------------------- prompts


def geneval_spec(tag: str, said: Facts) -> dict[str, Any]:
    """GenEval's clauses for these facts. In `position` the reference (the second group) is clause 0."""
    include: list[dict[str, Any]] = [{"class": name, "count": count} for name, _, count in said.groups]
    for clause, (_, color, _) in zip(include, said.groups, strict=True):
        if color is not None:
            clause["color"] = color
    exclude = [{"class": name, "count": count + 1} for name, _, count in said.groups if tag == "counting"]
    if said.relation is not None:
        include = [include[1], include[0] | {"position": [said.relation, 0]}]
    return {"tag": tag, "include": include, "exclude": exclude}


def _sample_request(tag: str, rng: np.random.Generator, index: int) -> tuple[tuple[Group, ...], str | None]:
    """What one prompt asks for: its groups, and the relation of the first to the second."""
    names = list(OBJECT_EMOJI)
    a, b = (names[int(k)] for k in rng.choice(len(names), 2, replace=False))

    def tint(name: str, *but: str | None) -> str:
        colors = [color for color in allowed_colors(name) if color not in but]
        return colors[int(rng.integers(len(colors)))]

    if tag == "single_object":
        return ((names[index % len(names)], None, 1),), None
    if tag == "counting":
        return ((a, None, int(rng.integers(2, MAX_COUNT + 1))),), None
    if tag == "colors":
        return ((a, tint(a), 1),), None
    if tag == "color_attr":
        first = tint(a)
        return ((a, first, 1), (b, tint(b, first), 1)), None
    relation = RELATIONS[int(rng.integers(4))] if tag == "position" else None
    return ((a, None, 1), (b, None, 1)), relation


def make_prompts(tag: str, count: int, seed: int) -> list[Example]:
    """`count` different prompts of one of GenEval's tasks, always the same for a seed; 3 of 10 are held out where the
    task has combinations. ValueError when there are not that many."""
    rng = np.random.default_rng((seed, geneval.TAGS.index(tag)))
    shuffle = rng.permutation(len(OBJECT_EMOJI))
    items: dict[str, Example] = {}
    for k in range(100 * count):
        i = len(items)
        if i == count:
            break
        want = tag != "single_object" and i % 10 in (2, 5, 8)
        groups, relation = _sample_request(
            tag, rng, int(shuffle[i // 2 % len(shuffle)]) if tag == "single_object" else i
        )
        if bool(held_out_combinations(groups)) != want:
            continue
        has_background = i % 2 == 1 if tag == "single_object" else i % 4 == 3
        prompts_exhausted = k > 20 * count  # all without a background are used up
        background = (
            list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))] if has_background or prompts_exhausted else None
        )
        facts = Facts(groups, background, relation)
        meta = {"spec": geneval_spec(tag, facts), "background": background, "heldout": want, "groups": groups}
        items.setdefault(caption(facts), Example(caption(facts), tag, meta | {"relation": relation}))
    if len(items) < count:
        raise ValueError(f"there are only {len(items)} different prompts for {tag}: ask for fewer than {count}")
    return list(items.values())


# ---------------------------------------------------------------- the task


@dataclass
class ScenesTask:
    """GenEval on the rendered world: `count` prompts for each of the six tags."""

    count: int = 100
    seed: int = 0
    detector: SceneDetector = field(default_factory=load_detector)
    output: Literal["image", "text"] = "image"

    def items(self) -> list[Example]:
        return [item for tag in geneval.TAGS for item in make_prompts(tag, self.count, self.seed)]

    def detect(self, pictures: Sequence[Image.Image], batch: int = 128) -> list[SceneDetections]:
        """What the detector finds in each picture, resized to the size that it was trained on."""
        readings: list[SceneDetections] = []
        for i in range(0, len(pictures), batch):
            x_BCHW = to_pixels(pictures[i : i + batch], self.detector.config.image_size)
            readings += self.detector.detect(
                x_BCHW, min(self.detector.config.threshold, self.detector.config.count_threshold)
            )
        return readings

    def judge(self, item: Example, reading: SceneDetections) -> dict[str, float]:
        """correct: GenEval's verdict; strict: and no surplus object; share of the clauses that hold; background,
        where the prompt names one."""
        config, spec = self.detector.config, item.meta["spec"]
        threshold = config.count_threshold if spec["tag"] == "counting" else config.threshold
        readings = geneval.group_by_class(reading.objects, threshold)
        verdict = geneval.evaluate(spec, readings)
        strict = verdict.correct and not geneval.count_surplus_objects(spec, readings)
        scores = {"correct": float(verdict.correct), "strict": float(strict), "share": verdict.share}
        if item.meta["background"] is not None:
            scores["background"] = float(reading.background == item.meta["background"])
        return scores

    def score_batch(self, items: Sequence[Example], outputs: Sequence[Image.Image]) -> list[dict[str, float]]:
        return [self.judge(item, reading) for item, reading in zip(items, self.detect(outputs), strict=True)]

    def score(self, item: Example, output: Image.Image) -> dict[str, float]:
        return self.score_batch([item], [output])[0]

    def reward(self, item: Example, output: Image.Image) -> float:
        """In [0, 1]: the mean of strict correctness, the share of clauses that hold and, where asked, the
        background."""
        scores = self.score(item, output)
        return float(np.mean([scores[name] for name in ("strict", "share", "background") if name in scores]))


@dataclass(frozen=True)
class ScenesResult:
    """Scores of one set of pictures. `heldout` and `seen` split `overall` by what training could show."""

    overall: ScoreSummary
    strict: ScoreSummary
    seen: ScoreSummary | None
    heldout: ScoreSummary | None
    background: float | None
    best_of_n_correct: float


def summarize_scores(
    items: Sequence[Example], scores: Sequence[Sequence[dict[str, float]]], seed: int = 0
) -> ScenesResult:
    """`scores[i]` are those of the pictures of item i. Overall = unweighted mean of the tags, as GenEval's."""

    def mean(name: str, heldout: bool | None = None) -> ScoreSummary | None:
        rows = [
            (item.tag, [s[name] for s in row])
            for item, row in zip(items, scores, strict=True)
            if heldout is None or item.meta["heldout"] == heldout
        ]
        if not rows:
            return None
        return bootstrap_mean([tag for tag, _ in rows], [v for _, v in rows], np.random.default_rng(seed))

    overall, strict = mean("correct"), mean("strict")
    assert overall is not None and strict is not None
    has_background = [s["background"] for row in scores for s in row if "background" in s]
    best = float(np.mean([max(s["correct"] for s in row) for row in scores]))
    return ScenesResult(
        overall,
        strict,
        mean("correct", False),
        mean("correct", True),
        float(np.mean(has_background)) if has_background else None,
        best,
    )


def score_pictures(task: ScenesTask, items: Sequence[Example], pictures: ImageGroups) -> list[list[dict[str, float]]]:
    """Scores grouped as the pictures are."""
    flat = [(item, picture) for item, row in zip(items, pictures, strict=True) for picture in row]
    scores = iter(task.score_batch([item for item, _ in flat], [picture for _, picture in flat]))
    return [[next(scores) for _ in row] for row in pictures]


def false_positive_rate(task: ScenesTask, pictures: Sequence[Image.Image]) -> float:
    """The share of pictures in which any object is found, although there is none."""
    threshold = task.detector.config.threshold
    return float(np.mean([any(o.score > threshold for o in reading.objects) for reading in task.detect(pictures)]))


# ---------------------------------------------------------------- the command

PROMPTS_PER_TAG = {True: 20, False: 100}  # a task: --quick or not
BASELINES = ("oracle", "reconstructions", "nearest", "shuffled")


def arguments() -> OneLineParser:
    parser = make_parser(
        "scenes",
        "Draw the prompts of GenEval's six tasks in the rendered world, and score the share of pictures in which a "
        "detector finds what was asked for. Baselines are printed beside the model's score.",
    )
    parser.add_argument("--quick", action="store_true", help="20 prompts a task instead of 100")
    parser.add_argument("--images", type=limited("n"), default=4, metavar="N", help="pictures a prompt (default: 4)")
    parser.add_argument(
        "--candidates", type=limited("candidates"), help="draw so many for each, keep the best as it reads"
    )
    group = parser.add_argument_group("the ladder (without any of these flags: the model and the whole ladder)")
    group.add_argument("--oracle", action="store_true", help="only true pictures of the prompts; needs no model")
    group.add_argument("--reconstructions", action="store_true", help="only true pictures through the tokenizer")
    group.add_argument("--nearest", action="store_true", help="only training pictures with the nearest captions")
    group.add_argument("--shuffled", action="store_true", help="the model, and its pictures under other prompts")
    return parser


def format_row(name: str, result: ScenesResult) -> str:
    tags = " ".join(f"{result.overall.tags[tag]:.3f}".rjust(len(tag)) for tag in geneval.TAGS)
    return f"{name:<16} {result.overall.overall:.3f} [{result.overall.low:.3f}, {result.overall.high:.3f}]  {tags}"


def report_rows(name: str, result: ScenesResult, batch: int | None = None) -> list[dict[str, Any]]:
    """The report's rows for one set of pictures."""
    values = {
        "": result.overall.overall,
        "low": result.overall.low,
        "high": result.overall.high,
        "strict": result.strict.overall,
        "seen": result.seen and result.seen.overall,
        "heldout": result.heldout and result.heldout.overall,
        "background": result.background,
        "any of a prompt": result.best_of_n_correct,
        **result.overall.tags,
    }
    unit = {"unit": "share", "batch": batch}
    return [{"name": f"{name} {key}".strip(), "value": v} | unit for key, v in values.items() if v is not None]


def main(args: list[str], command: str = "") -> int:
    """`unigen eval scenes ...`: print the table, write the report. ValueError for bad input."""
    a = parse_args(arguments(), args)
    start = time.perf_counter()
    selected_baselines = [rung for rung in BASELINES if getattr(a, rung)]
    rungs = selected_baselines or list(BASELINES)
    with_model = not selected_baselines or "shuffled" in selected_baselines
    task = ScenesTask(PROMPTS_PER_TAG[a.quick], a.seed)
    items = task.items()
    world: SceneRenderer | None = None
    if set(rungs) & {"oracle", "reconstructions", "nearest"}:
        try:
            world = SceneRenderer(task.detector.config.image_size)
        except ValueError as error:
            if selected_baselines:
                raise
            print(f"left out: oracle, reconstructions and nearest training pictures ({error})", file=sys.stderr)
    engine = load_engine(a) if with_model or "reconstructions" in rungs else None

    results: dict[str, ScenesResult] = {}
    print(f"{'':<16} {'overall, 95% interval':<21}  {' '.join(geneval.TAGS)}", flush=True)

    def report(name: str, pictures: ImageGroups) -> list[list[dict[str, float]]]:
        scores = score_pictures(task, items, pictures)
        results[name] = summarize_scores(items, scores, a.seed)
        print(format_row(name, results[name]), flush=True)
        return scores

    images: ImageGroups = []
    if with_model:
        options = sampling_options(a) | ({"candidates": a.candidates} if a.candidates else {})
        images = generate_outputs(engine, task, items, a.images, a.batch, a.seed, **options)
        scores = report("model", images)
        if a.out:
            write_outputs(a.out, items, images, scores)
    true = baselines.oracle_images(items, a.images, a.seed, world) if world else []
    if "oracle" in rungs and world:
        report("oracle", true)
    if "reconstructions" in rungs and world and engine is not None:
        report("reconstructions", baselines.reconstruct_images(engine.model.image_tokenizer, true))
    if "nearest" in rungs and world:
        report("nearest", baselines.nearest_training_images(items, a.images, a.seed, world))
    if "shuffled" in rungs and images:
        report("shuffled", baselines.shuffle_images(items, images, a.seed))

    sample = [row[0] for row in (true or images)]
    noise = baselines.noise_images(200, task.detector.config.image_size, np.random.default_rng(a.seed))
    false_positive_rates = {
        "noise": false_positive_rate(task, noise),
        "blends": false_positive_rate(task, baselines.blend_images(sample)),
    }
    first = next(iter(results))
    rows = [row for name, result in results.items() for row in report_rows(name, result, a.batch)]
    rows += [
        {"name": f"objects found in {name}", "value": v, "unit": "share"} for name, v in false_positive_rates.items()
    ]
    for row in report_rows(first, results[first]):
        if row["name"].split()[-1] in ("strict", "seen", "heldout", "background", "prompt"):
            print(f"{row['name']}: {row['value']:.3f}")
    print(", ".join(f"objects found in {name}: {v:.3f} of the pictures" for name, v in false_positive_rates.items()))
    if a.json:
        overall = results[first].overall
        write_report(
            a.json,
            command=command or "unigen eval scenes " + " ".join(args),
            model=str(a.model) if with_model else first,
            overall=overall.overall,
            tasks=overall.tags,
            rows=rows,
            seconds=time.perf_counter() - start,
            interval=[overall.low, overall.high],
            prompts=overall.prompts,
            images=a.images,
        )
    return 0
