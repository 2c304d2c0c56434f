"""Have a model answer each of many prompts several times, and say which answers are right: what `preferences` of
recipes/tiny.py learns from.

    python data_tools/judge_answers.py pictures MODEL OUT.jsonl --detector FOLDER [--minutes 10] [--answers 4]
                                       [--generator next-token] [--guidance 3] [--temperature 0.8]
                                       [--prompts 5000] [--seed 1] [--batch 128] [--dtype bfloat16]
    python data_tools/judge_answers.py captions MODEL OUT.jsonl [the same, without what is of pictures]

pictures: the prompts are of the kinds of `unigen eval scenes`, those with several things more often. A picture is right
where all that its prompt says holds, the background too, and nothing else is in it. Give another detector than the
shipped one, which judges the evaluation; docs/guide.md has the commands that make one. Those of a flow are kept as
they look, those of next-scale by its own codes: read again, nine in ten would be others.
captions: of rendered scenes, at temperature 1; right by the rules of `unigen eval understanding`. The true caption
is one more answer.
No prompt or scene holds a held-out combination, and those of seed 0 are refused, which the evaluations use.
Exit 2 with one line for bad input. Does not depend on how anything is learnt from the answers.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np

from unigen.document import Document, Segment
from unigen.evaluation.detector import load_detector
from unigen.evaluation.task import Example
from unigen.evaluation.tasks.scenes import ScenesTask, make_prompts
from unigen.evaluation.tasks.understanding import UnderstandingTask
from unigen.loading import load_local
from unigen.media.output import check_output, one_line_errors, write_atomically
from unigen.samplers.guidance import GUIDANCE_SCALE
from unigen.samplers.options import TEMPERATURE, CodeSampling
from unigen.toyworld.captions import Facts, caption
from unigen.toyworld.world import SceneRenderer, find_font
from unigen.utils import precision
from unigen.utils.argparser import OneLineParser
from unigen.utils.disk import check_input
from unigen.utils.option_types import number_argument

DETECTOR_COMMANDS = (
    "unigen train recipes/scene_detector.py seed=2 run_dir=runs/judge && "
    "python recipes/scene_detector.py runs/judge/model runs/judge/calibrated"
)
"""The commands that make a detector to judge by."""
MINUTES = number_argument(0, 100_000, is_integer=False, above=True)
TAG_SHARES = {"two_object": 0.25, "counting": 0.2, "colors": 0.1, "position": 0.1, "color_attr": 0.35}


def sample_prompts(count: int, seed: int) -> list[Example]:
    """About `count` prompts without held-out combinations, in random order. Some come twice: there are not so many of
    all kinds."""
    items: list[Example] = []
    for tag, share in TAG_SHARES.items():
        tag_items: list[Example] = []
        while len(tag_items) < count * share:
            new_items = make_prompts(tag, 100, seed + len(tag_items))  # few at once, since 3 in 10 are to be held out
            tag_items += [item for item in new_items if not item.metadata["heldout"]]
        items += tag_items[: round(count * share)]
    return [items[k] for k in np.random.default_rng(seed).permutation(len(items))]


def judge_images(
    engine: Any, task: ScenesTask, items: list[Example], answers: int, seed: int, **options: Any
) -> list[Any]:
    """A line of the judged file for each prompt; picture k of them all is drawn with `seed` + k."""
    repeated_items = [item for item in items for _ in range(answers)]
    requests = [
        engine.build_request(item.prompt, "image", seed=seed + k, **options) for k, item in enumerate(repeated_items)
    ]
    images = dict(engine.run_requests(requests))
    scores = task.score_batch(repeated_items, [images[k] for k in range(len(repeated_items))])
    correct = [s["strict"] == 1 and s.get("background", 1) == 1 for s in scores]
    request_segments = [request.document.segments for request in requests]
    given_answers = [
        segments[-1] if request.native_codes[-1] is None else Segment(image=request.native_codes[-1], role="assistant")
        for request, segments in zip(requests, request_segments, strict=True)
    ]
    slices = [slice(k, k + answers) for k in range(0, len(repeated_items), answers)]
    generator = {"generator": options["generator"]}
    return [
        judged_record(request_segments[part.start][:-1], given_answers[part], correct[part]) | generator
        for part in slices
    ]


def judge_captions(engine: Any, task: UnderstandingTask, answers: int, seed: int) -> list[Any]:
    """A line of the judged file for each scene of the task: the true caption, and those that the model gives it."""
    items = task.examples()
    documents = [
        engine.model.encode_document(Document.of(item.prompt)) for item in items
    ]  # each picture is encoded once
    repeated_items = [document for document in documents for _ in range(answers)]
    seeds = [seed + k for k in range(len(repeated_items))]
    captions = engine.generate_batch(repeated_items, seeds, "text", temperature=1.0, max_tokens=96)
    scores = task.score_batch([item for item in items for _ in range(answers)], captions)
    lines = []
    for i, (item, document) in enumerate(zip(items, documents, strict=True)):
        cut = slice(i * answers, (i + 1) * answers)
        groups = tuple(tuple(group) for group in item.metadata["groups"])
        true = caption(Facts(groups, item.metadata["background"], item.metadata["relation"]))
        answer_segments = [Segment(text=text, role="assistant") for text in (true, *captions[cut])]
        correct = [True, *(score["correct"] == 1 for score in scores[cut])]
        lines.append(judged_record(document.segments, answer_segments, correct))
    return lines


def judged_record(prompt: list[Segment], answers: list[Segment], correct: list[bool]) -> dict[str, Any]:
    return {"prompt": Document(prompt).to_json(), "answers": [a.to_json() for a in answers], "correct": correct}


@one_line_errors
def main() -> int:
    parser = OneLineParser(description="Answer each prompt several times and judge the answers.")
    parser.add_argument("kind", choices=["pictures", "captions"])
    parser.add_argument("model")
    parser.add_argument("out", help="a .jsonl file: a prompt, its answers, which are right")
    parser.add_argument("--detector", metavar="FOLDER", help="the judge of pictures")
    parser.add_argument(
        "--minutes",
        type=MINUTES,
        default=10.0,
        help="stop after so long (default: 10)",
    )
    parser.add_argument("--prompts", type=number_argument(1, 1_000_000), default=5000)
    parser.add_argument("--answers", type=number_argument(2, 1_000), default=4, help="to each prompt (default: 4)")
    parser.add_argument("--generator", help="that draws the pictures (default: next-token)")
    parser.add_argument("--guidance", type=GUIDANCE_SCALE.parse, help="of pictures (default: 3)")
    parser.add_argument("--temperature", type=TEMPERATURE.parse, help="of pictures that are codes (default: 0.8)")
    parser.add_argument(
        "--seed", type=number_argument(1, 2**40), default=1, help="0 is that of the evaluations (default: 1)"
    )
    parser.add_argument(
        "--batch", type=number_argument(2, 10_000), default=128, help="answers given at once (default: 128)"
    )
    parser.add_argument("--dtype", choices=precision.DTYPES, help="default: bfloat16 where it is fast, else float32")
    args = parser.parse_args()
    if args.batch < args.answers:
        raise ValueError(f"--batch {args.batch} does not hold the {args.answers} answers to one prompt: give more")
    if (args.kind == "pictures") != bool(args.detector):
        raise ValueError("a detector judges pictures and nothing else: give --detector FOLDER for them alone")
    answers = {"guidance": args.guidance, "temperature": args.temperature, "generator": args.generator}
    answers = {name: value for name, value in answers.items() if value is not None}
    if answers and args.kind == "captions":
        raise ValueError(f"{', '.join(answers)} is of pictures: leave it out for captions")
    out = check_output(args.out, {".jsonl": "JSON lines"})
    find_font()
    if args.detector:
        check_input(args.detector, DETECTOR_COMMANDS, "--detector")
    detector = load_detector(args.detector) if args.detector else None
    engine = load_local(args.model, dtype=args.dtype or precision.fast_dtype())
    world = SceneRenderer(engine.model.image_tokenizer.image_size)
    items = sample_prompts(args.prompts, args.seed) if detector else []
    scenes = ScenesTask(seed=args.seed, detector=detector) if detector else None
    options: dict[str, Any] = {"generator": "next-token", "guidance": 3.0} | answers
    if options["generator"] not in engine.model.template.begin_ids:
        supported_names = ", ".join(engine.model.template.begin_ids)
        raise ValueError(f"{args.model} does not draw by {options['generator']}: give one of {supported_names}")
    if CodeSampling in engine.model.generators.options(options["generator"]):
        options = {"temperature": 0.8, "top_k": 0, "top_p": 1.0} | options
    end, each = time.monotonic() + 60 * args.minutes, args.batch // args.answers
    lines: list[Any] = []
    with suppress(KeyboardInterrupt):  # what has been answered is kept
        for start in range(0, len(items) if scenes else args.prompts, each):
            if time.monotonic() > end:
                break
            seed = args.seed * 1_000_000 + start * args.answers
            if scenes:
                lines += judge_images(engine, scenes, items[start : start + each], args.answers, seed, **options)
            else:
                task = UnderstandingTask(
                    world, min(each, args.prompts - start), seed, held_out=False, questions_per_scene=0
                )
                lines += judge_captions(engine, task, args.answers, seed)
            correct = np.mean([mark for each_line in lines for mark in each_line["correct"][-args.answers :]])
            print(f"\r{len(lines)} prompts, {correct:.3f} of the answers right", end="", flush=True)
    print()
    if not lines:
        raise ValueError("nothing was answered: give more prompts or minutes")
    text = "".join(json.dumps(each_line) + "\n" for each_line in lines)
    write_atomically(out, lambda file: file.write(text.encode()))
    print(f"wrote {out}: {len(lines)} prompts with {args.answers} answers each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
