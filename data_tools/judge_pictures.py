"""Have a model draw several pictures for each of many prompts, and a detector say which are right: what `preferences`
of recipes/tiny.py learns from.

    python data_tools/judge_pictures.py MODEL OUT.jsonl --detector FOLDER [--minutes 10] [--images 4] [--guidance 3]
                                        [--prompts 5000] [--seed 1] [--batch 128] [--dtype bfloat16]

The prompts are of the kinds of `unigen eval scenes`, those with several things more often, and none holds a held-out
combination. A picture is right where all that its prompt says holds, the background too, and nothing else is in it.
Give another detector than the shipped one, which judges the evaluation, and another seed than 0, which draws its
prompts; docs/guide.md has the commands that make one. Exit 2 with one line for bad input. Refuses to know
how anything is learnt from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np

import unigen
from unigen.evaluation.detector import load_detector
from unigen.evaluation.task import Item
from unigen.evaluation.tasks.scenes import ScenesTask, prompts
from unigen.output import check_output, one_line_errors, write_atomically

SHARES = {"two_object": 0.25, "counting": 0.2, "colors": 0.1, "position": 0.1, "color_attr": 0.35}


def drawn_prompts(count: int, seed: int) -> list[Item]:
    """About `count` prompts without held-out combinations, in random order. Some come twice: there are not so many of
    all kinds."""
    items: list[Item] = []
    for tag, share in SHARES.items():
        found: list[Item] = []
        while len(found) < count * share:
            more = prompts(tag, 100, seed + len(found))  # few at once, since 3 in 10 are to be held out
            found += [item for item in more if not item.meta["heldout"]]
        items += found[: round(count * share)]
    return [items[k] for k in np.random.default_rng(seed).permutation(len(items))]


def judged(engine: Any, task: ScenesTask, items: list[Item], images: int, seed: int, guidance: float) -> list[Any]:
    """For each prompt its pictures as codes and which are right; picture k of them all is drawn with `seed` + k."""
    asked = [item for item in items for _ in range(images)]
    requests = [engine.request(item.prompt, "image", seed=seed + k, guidance=guidance) for k, item in enumerate(asked)]
    pictures = dict(engine.run(requests))
    scores = task.score_batch(asked, [pictures[k] for k in range(len(asked))])
    right = [s["strict"] == 1 and s.get("background", 1) == 1 for s in scores]
    codes = [request.document.segments[-1].image.tolist() for request in requests]
    cuts = [slice(k, k + images) for k in range(0, len(asked), images)]
    return [{"prompt": asked[cut.start].prompt, "codes": codes[cut], "right": right[cut]} for cut in cuts]


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description="Draw several pictures a prompt and judge them.")
    parser.add_argument("model")
    parser.add_argument("out", help="a .jsonl file: a prompt, its pictures as codes, which are right")
    parser.add_argument("--detector", required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so long (default: 10)")
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--images", type=int, default=4, help="pictures a prompt (default: 4)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="pictures drawn at once (default: 128)")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if min(args.prompts, args.images - 1, args.batch // max(args.images, 1)) < 1 or not args.minutes > 0:
        raise ValueError("give at least 1 prompt, 2 pictures of each, a batch that holds them, and some minutes")
    out = check_output(args.out, {".jsonl": "JSON lines"})
    task = ScenesTask(seed=args.seed, detector=load_detector(args.detector))
    engine = unigen.load(args.model, dtype=args.dtype)
    items = drawn_prompts(args.prompts, args.seed)
    end, each = time.monotonic() + 60 * args.minutes, args.batch // args.images
    groups: list[Any] = []
    with suppress(KeyboardInterrupt):  # what has been drawn is kept
        for start in range(0, len(items), each):
            if time.monotonic() > end:
                break
            seed = args.seed * 1_000_000 + start * args.images
            groups += judged(engine, task, items[start : start + each], args.images, seed, args.guidance)
            right = np.mean([group["right"] for group in groups])
            print(f"\r{len(groups)} prompts, {right:.3f} of the pictures right", end="", flush=True)
    print()
    if not groups:
        raise ValueError("nothing was drawn: give more prompts or minutes")
    lines = "".join(json.dumps(group) + "\n" for group in groups)
    write_atomically(out, lambda file: file.write(lines.encode()))
    print(f"wrote {out}: {len(groups)} prompts with {args.images} pictures each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
