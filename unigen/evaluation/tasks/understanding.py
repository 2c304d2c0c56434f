"""Task `understanding`: captions with every attribute right, and questions, on true rendered scenes that training
never saw.

    unigen eval understanding --model unigen-tiny [--count 500] [--candidates 16] [--heldout] [--json FILE]

Half of the scenes are plain (combinations of training, seeds of their own), half hold a held-out combination; the two
are reported apart. Captions are read by the parser of the captions; answers must match exactly, after lower case and
without the final stop. Needs the emoji font. Does not depend on engines beyond `generate_batch`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
from PIL import Image

from unigen.evaluation.report import Report
from unigen.evaluation.runner import EvaluationRun, GenerationTask, report_rows
from unigen.evaluation.task import Example, Scores, bootstrap_mean
from unigen.inference.options import CANDIDATES
from unigen.inference.scoring import CAPTION_PROMPT
from unigen.toyworld.captions import Facts, compare_facts, extract_facts, parse_caption
from unigen.toyworld.language import questions
from unigen.toyworld.scenes import Scene, SceneRenderer, sample_scene, spatial_relations
from unigen.utils.option_types import number_argument

DEFAULT_IMAGE_SIZE = 64
"""Pixels along a side of scenes for an engine that reads images of any size."""
MAX_TOKENS = 96
"""Of a caption or an answer."""
_STREAM = 7_700_000  # keeps these scenes apart from those of any training seed


def relation_table(scene: Scene) -> dict[str, list[str]]:
    """How objects that occur once under their name lie to each other.

    Args:
        scene: the scene.

    Returns:
        "a|b" -> names of the relations of a to b by GenEval's rule.
    """
    single = [
        item for item in scene.objects if sum(other_object.name == item.name for other_object in scene.objects) == 1
    ]
    return {f"{a.name}|{b.name}": list(spatial_relations(a, b)) for a in single for b in single if a is not b}


def score_caption(text: str, target: Facts, relations: dict[str, list[str]]) -> Scores:
    """Score each attribute of a caption: the same objects, counts and colours, the right background (captions state it:
    a missing one is wrong), and a relation, if stated, that is true.

    Args:
        text: the caption.
        target: the scene's facts.
        relations: `relation_table` of the scene.

    Returns:
        1 or 0 for each attribute, and "correct" where all are right.
    """
    caption_facts = parse_caption(text)
    correct_attributes = compare_facts(caption_facts, target)
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
class UnderstandingTask(GenerationTask[str]):
    """Rendered scenes, one caption and some questions each."""

    renderer: SceneRenderer
    """Draws the scenes."""
    count: int = 500
    """Scenes."""
    seed: int = 0
    """Of the scenes and the questions."""
    held_out: bool | None = None
    """Whether they hold a held-out combination; None: every second one."""
    questions_per_scene: int = 3
    """Questions of a scene, at most."""
    candidates: int | None = None
    """Captions of which the best is taken; None is as the model's template says."""

    description: ClassVar[str] = (
        "Caption rendered scenes and answer questions about them: the share of captions with every attribute right, "
        "and of right answers."
    )
    output: ClassVar[Literal["image", "text"]] = "text"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """See `EvaluationTask.add_arguments`: how many scenes, which of them, and candidates."""
        parser.add_argument("--count", type=number_argument(1, 100_000), default=500, help="scenes (default: 500)")
        parser.add_argument(
            "--candidates",
            type=CANDIDATES.parse,
            help="captions to choose from (default: as `unigen describe`)",
        )
        parser.add_argument("--heldout", action="store_true", help="only scenes with a held-out combination")

    @classmethod
    def create(cls, run: EvaluationRun) -> Self:
        """See `EvaluationTask.create`."""
        model, args = run.local_model, run.args
        size = DEFAULT_IMAGE_SIZE if model is None else model.image_tokenizer.image_size
        return cls(SceneRenderer(size), args.count, args.seed, args.heldout or None, candidates=args.candidates)

    def examples(self) -> list[Example]:
        """See `GenerationTask.examples`: a caption and up to `questions_per_scene` questions of each scene."""
        examples: list[Example] = []
        for i in range(self.count):
            rng = np.random.default_rng((self.seed, _STREAM, i))
            held_out = i % 2 == 1 if self.held_out is None else self.held_out
            scene = sample_scene(rng, self.renderer.size, held_out=held_out)
            image = Image.fromarray(self.renderer.render(scene).image)
            facts = extract_facts(scene)
            metadata: dict[str, object] = {
                "groups": facts.groups,
                "background": facts.background,
                "relation": facts.relation,
                "heldout": held_out,
                "relations": relation_table(scene),
            }
            examples.append(Example([image, CAPTION_PROMPT], "caption", metadata))
            for qa in questions(scene, rng)[: self.questions_per_scene]:
                examples.append(Example([image, qa.question], qa.kind, {"answer": qa.answer, "heldout": held_out}))
        return examples

    def generation_options(self, run: EvaluationRun, example: Example) -> dict[str, object]:
        """See `GenerationTask.generation_options`: several candidates for captions, one for answers."""
        candidates = 1
        if example.tag == "caption":
            model = run.local_model
            candidates = self.candidates or (1 if model is None else model.template.num_candidates)
        return {"max_tokens": MAX_TOKENS, **({"candidates": candidates} if candidates > 1 else {})}

    def score_batch(self, examples: Sequence[Example], outputs: Sequence[str]) -> list[Scores]:
        """See `GenerationTask.score_batch`: "correct", and for captions each attribute."""
        return [self._score(example, output) for example, output in zip(examples, outputs, strict=True)]

    def _score(self, example: Example, output: str) -> Scores:
        metadata = example.metadata
        if example.tag != "caption":
            return {"correct": float(normalize_answer(output) == normalize_answer(metadata["answer"]))}
        target = Facts(tuple(tuple(g) for g in metadata["groups"]), metadata["background"], metadata["relation"])
        return score_caption(output, target, metadata["relations"])

    def reward(self, example: Example, output: str) -> float:
        """See `GenerationTask.reward`: the share of attributes that are right, or whether the answer is."""
        scores = self.score(example, output)
        values = [value for name, value in scores.items() if name != "correct" or example.tag != "caption"]
        return float(np.mean(values))

    def summarize(
        self, run: EvaluationRun, examples: Sequence[Example], outputs: list[list[str]], scores: list[list[Scores]]
    ) -> Report:
        """See `GenerationTask.summarize`."""
        figures = summarize_scores(examples, [row[0] for row in scores], self.seed)
        for name, (mean, low, high) in figures.items():
            print(f"{name:<24} {mean:.3f} [{low:.3f}, {high:.3f}]")
        means = {name: mean for name, (mean, _, _) in figures.items()}
        intervals = {name: [low, high] for name, (_, low, high) in figures.items()}
        return Report(
            float(np.mean([means["captions"], means["questions"]])),
            means,
            report_rows(means, "share", run.args.batch),
            {"intervals": intervals, "pictures": self.count},
        )


def summarize_scores(
    examples: Sequence[Example], scores: Sequence[Scores], seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Means of captions and questions of plain and of held-out scenes, of each attribute, each kind of question.

    Args:
        examples: the examples of the outputs.
        scores: of the output of each.
        seed: of the intervals.

    Returns:
        Mean, low and high by name.
    """
    sets: dict[str, list[float]] = {}
    for example, score in zip(examples, scores, strict=True):
        task_name = "captions" if example.tag == "caption" else "questions"
        kind = "heldout" if example.metadata["heldout"] else "plain"
        sets.setdefault(task_name, []).append(score["correct"])
        sets.setdefault(f"{task_name} {kind}", []).append(score["correct"])
        parts = {k: v for k, v in score.items() if k != "correct"} or {example.tag: score["correct"]}
        for name, value in parts.items():
            sets.setdefault(f"{task_name}: {name}", []).append(value)
    rng = np.random.default_rng(seed)
    figures = {}
    for name in sorted(sets):
        mean = bootstrap_mean([name] * len(sets[name]), [[v] for v in sets[name]], rng)
        figures[name] = (mean.overall, mean.low, mean.high)
    return figures
