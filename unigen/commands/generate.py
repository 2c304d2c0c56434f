"""The command `generate`.

unigen generate "two apples on a blue background" -o out.png
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from unigen.commands.arguments import (
    load,
    model_arguments,
    report,
    sampling,
    sampling_arguments,
    show_written,
    text,
)
from unigen.limits import argument as limited
from unigen.utils import progress

BATCH = 16
"""Pictures made at a time."""
HELP = "draw pictures from a sentence"
STDOUT = {"output": ".png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", type=text, help="what to draw, in words")
    parser.add_argument("--class", dest="label", type=text, help="of a model that draws classes: a number or a name")
    parser.add_argument(
        "-o", "--output", default="out.png", help="the picture, - is a PNG on stdout (default: %(default)s)"
    )
    parser.add_argument("-n", type=limited("n"), default=1, help="how many: out-0.png, out-1.png, ... (default: 1)")
    parser.add_argument("--grid", action="store_true", help="all of them in one picture")
    parser.add_argument(
        "--candidates",
        type=limited("candidates"),
        help="draw so many for each, and keep the one that reads best",
    )
    sampling_arguments(parser)
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from unigen.document import Segment
    from unigen.media.output import PICTURES, check_output, grid, numbered, save_picture
    from unigen.samplers.seeds import later_seed

    if args.prompt is None and args.label is None:
        raise ValueError("say what to draw: in words, or by --class for a model that draws classes")
    if args.prompt is not None and args.label is not None:
        raise ValueError("both words and --class are given: a model draws one or the other, so leave one out")
    if args.piped and args.n > 1 and not args.grid:
        raise ValueError("only one picture can be written to stdout: add --grid, or give -o a file name")
    asked = args.prompt if args.label is None else Segment(label=args.label)
    path = check_output(args.output, PICTURES)
    paths = [path] if args.grid else [check_output(one, PICTURES) for one in numbered(path, args.n)]
    engine = load(args)
    start = time.perf_counter()
    options = sampling(args) | ({} if args.candidates is None else {"candidates": args.candidates})
    seed = options.pop("seed")
    batch = 1 if getattr(engine, "one_by_one", False) else BATCH
    images: list[Any] = []
    written: list[Path] = []
    try:
        with progress.bar(args.n, "image", silent=args.n <= batch) as bar:
            for first in range(0, args.n, batch):
                n = min(batch, args.n - first)
                made = engine.generate(asked, output="image", n=n, seed=later_seed(seed, first), **options)
                images += made if n > 1 else [made]
                bar.clear()
                if not args.grid:  # each batch is saved as it is finished
                    for target, image in zip(paths[first : first + n], images, strict=True):
                        save_picture(target, image)
                        written.append(target)
                    show_written(args, paths[first : first + n])
                    images = []
                bar.update(n)
        if args.grid:
            save_picture(path, grid(images))
            show_written(args, paths)
    except KeyboardInterrupt:
        print(f"\nstopped: {len(written)} of {len(paths)} files were written", file=sys.stderr)
        return 130
    return report(args, [], start)
