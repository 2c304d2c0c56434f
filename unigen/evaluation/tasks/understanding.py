"""Task `understanding`: captions with every attribute right, and questions, on true rendered scenes that training
never saw.

    unigen eval understanding --model unigen-tiny [--count 500] [--candidates 16] [--heldout] [--json FILE]

Half of the scenes are plain (combinations of training, seeds of their own), half hold a held-out combination; the two
are reported apart. Captions are read by the parser of the captions; answers must match exactly, after lower case and
without the final stop. Needs the emoji font. Does not depend on engines beyond `generate_batch`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from unigen.config import write_report
from unigen.evaluation.runner import (
    OneLineParser,
    generate_outputs,
    load_engine,
    make_parser,
    parse_args,
    sampling_options,
    write_outputs,
)
from unigen.evaluation.task import Example, bootstrap_mean
from unigen.inference.scoring import CAPTION_PROMPT
from unigen.limits import limit_argument as limited
from unigen.toyworld.captions import Facts, compare_facts, extract_facts, parse_caption
from unigen.toyworld.language import questions
from unigen.toyworld.scenes import Scene, SceneRenderer, sample_scene, spatial_relations

_STREAM = 7_700_000  # keeps these scenes apart from those of any training seed


def relation_table(scene: Scene) -> dict[str, list[str]]:
    """ "a|b" -> where a lies as seen from b by GenEval's rule, for objects that occur once under their name."""
    single = [item for item in scene.items if sum(other_object.name == item.name for other_object in scene.items) == 1]
    return {f"{a.name}|{b.name}": list(spatial_relations(a, b)) for a in single for b in single if a is not b}


def score_caption(text: str, true: Facts, relations: dict[str, list[str]]) -> dict[str, float]:
    """1 or 0 for each attribute, and `correct` when all are right: the same objects, counts and colours, the right
    background (captions state it: a missing one is wrong), and a relation, if stated, that is true."""
    caption_facts = parse_caption(text)
    correct_attributes = compare_facts(caption_facts, true)
    correct_attributes["relation"] = True
    if caption_facts.relation is not None:
        (a, _, m), (b, _, n) = caption_facts.groups[:2]
        correct_attributes["relation"] = m == n == 1 and caption_facts.relation in relations.get(f"{a}|{b}", [])
    marks = {name: float(value) for name, value in correct_attributes.items()}
    return {"correct": float(all(correct_attributes.values())), **marks}


def normalize_answer(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


@dataclass
class UnderstandingTask:
    """`count` scenes, one caption and up to `asked` questions each. heldout: do they hold a held-out combination? None:
    every second one."""

    world: SceneRenderer
    count: int = 500
    seed: int = 0
    heldout: bool | None = None
    asked: int = 3
    output: Literal["image", "text"] = "text"

    def items(self) -> list[Example]:
        examples: list[Example] = []
        for i in range(self.count):
            rng = np.random.default_rng((self.seed, _STREAM, i))
            heldout = i % 2 == 1 if self.heldout is None else self.heldout
            scene = sample_scene(rng, self.world.size, heldout=heldout)
            picture = Image.fromarray(self.world.render(scene).image)
            true = extract_facts(scene)
            meta: dict[str, Any] = {"groups": true.groups, "background": true.background, "relation": true.relation}
            meta |= {"heldout": heldout, "relations": relation_table(scene)}
            examples.append(Example([picture, CAPTION_PROMPT], "caption", meta))
            for qa in questions(scene, rng)[: self.asked]:
                examples.append(Example([picture, qa.question], qa.kind, {"answer": qa.answer, "heldout": heldout}))
        return examples

    def score(self, item: Example, output: str) -> dict[str, float]:
        if item.tag != "caption":
            return {"correct": float(normalize_answer(output) == normalize_answer(item.meta["answer"]))}
        true = Facts(tuple(tuple(g) for g in item.meta["groups"]), item.meta["background"], item.meta["relation"])
        return score_caption(output, true, item.meta["relations"])

    def score_batch(self, items: Sequence[Example], outputs: Sequence[str]) -> list[dict[str, float]]:
        return [self.score(item, output) for item, output in zip(items, outputs, strict=True)]

    def reward(self, item: Example, output: str) -> float:
        """In [0, 1]: the share of attributes that are right, or whether the answer is."""
        scores = self.score(item, output)
        return float(np.mean([value for name, value in scores.items() if name != "correct" or item.tag != "caption"]))


def summarise(
    items: Sequence[Example], scores: Sequence[dict[str, float]], seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """{name: (mean, low, high)}: captions and questions of plain and of held-out scenes, each attribute, each kind of
    question."""
    sets: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        task_name = "captions" if item.tag == "caption" else "questions"
        kind = "heldout" if item.meta["heldout"] else "plain"
        sets.setdefault(task_name, []).append(score["correct"])
        sets.setdefault(f"{task_name} {kind}", []).append(score["correct"])
        parts = {k: v for k, v in score.items() if k != "correct"} or {item.tag: score["correct"]}
        for name, value in parts.items():
            sets.setdefault(f"{task_name}: {name}", []).append(value)
    rng = np.random.default_rng(seed)
    figures = {}
    for name in sorted(sets):
        mean = bootstrap_mean([name] * len(sets[name]), [[v] for v in sets[name]], rng)
        figures[name] = (mean.overall, mean.low, mean.high)
    return figures


def arguments() -> OneLineParser:
    parser = make_parser(
        "understanding",
        "Caption rendered scenes and answer questions about them: the share of captions with every attribute right, "
        "and of right answers.",
    )
    parser.add_argument("--count", type=limited("count"), default=500, help="scenes (default: 500)")
    parser.add_argument(
        "--candidates", type=limited("candidates"), help="captions to choose from (default: as `unigen describe`)"
    )
    parser.add_argument("--heldout", action="store_true", help="only scenes with a held-out combination")
    return parser


def main(args: list[str]) -> int:
    """`unigen eval understanding ...`. ValueError for bad input."""
    a = parse_args(arguments(), args)
    start = time.perf_counter()
    engine = load_engine(a)
    task = UnderstandingTask(SceneRenderer(engine.model.image_tokenizer.image_size), a.count, a.seed, a.heldout or None)
    items = task.items()
    options: dict[str, Any] = {"max_tokens": 96} | sampling_options(a)
    captions = {"candidates": engine.model.template.num_candidates if a.candidates is None else a.candidates}
    outputs: list[list[Any]] = [[] for _ in items]
    for is_caption, more in ((True, captions), (False, {})):
        numbers = [k for k, item in enumerate(items) if (item.tag == "caption") == is_caption]
        group_outputs = generate_outputs(
            engine, task, [items[k] for k in numbers], 1, a.batch, a.seed, **options, **more
        )
        for k, output in zip(numbers, group_outputs, strict=True):
            outputs[k] = output
    scores = task.score_batch(items, [row[0] for row in outputs])
    figures = summarise(items, scores, a.seed)
    for name, (mean, low, high) in figures.items():
        print(f"{name:<24} {mean:.3f} [{low:.3f}, {high:.3f}]")
    if a.out:
        write_outputs(a.out, items, outputs, [[s] for s in scores])
    if a.json:
        write_report(
            a.json,
            command="unigen eval understanding " + " ".join(args),
            model=a.model,
            overall=float(np.mean([figures["captions"][0], figures["questions"][0]])),
            tasks={name: mean for name, (mean, _, _) in figures.items()},
            rows=[{"name": n, "value": m, "unit": "share", "batch": a.batch} for n, (m, _, _) in figures.items()],
            seconds=time.perf_counter() - start,
            intervals={name: [low, high] for name, (_, low, high) in figures.items()},
            pictures=a.count,
        )
    return 0
