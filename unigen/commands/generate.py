"""The command `generate`: `unigen generate "two apples on a blue background" -o out.png`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from unigen.commands.arguments import (
    generation_options,
    load,
    model_arguments,
    parse_text,
    print_elapsed,
    print_paths,
    sampling_arguments,
)
from unigen.utils import progress

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH_SIZE = 16
"""Pictures made at a time."""
HELP = "generate pictures from a sentence"
STDOUT = {"output": ".png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen generate`."""
    parser.add_argument("prompt", nargs="?", type=parse_text, help="what to draw, in words")
    parser.add_argument(
        "--class", dest="label", type=parse_text, help="of a class-conditional model: a number or a name"
    )
    parser.add_argument(
        "-o", "--output", default="out.png", help="the picture, - is a PNG on stdout (default: %(default)s)"
    )
    parser.add_argument("--grid", action="store_true", help="save all pictures as one grid")
    sampling_arguments(parser, "image", skip=())
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generate the images, batch by batch, and write each batch as it is finished. Returns the exit code."""
    from unigen.document import Segment
    from unigen.media.output import IMAGE_FORMATS, check_output, image_grid, numbered_paths, save_image
    from unigen.samplers.seeds import offset_seed

    if args.prompt is None and args.label is None:
        raise ValueError("say what to draw: in words, or by --class for a class-conditional model")
    if args.prompt is not None and args.label is not None:
        raise ValueError("both words and --class are given: a model draws one or the other, so leave one out")
    count = args.n or 1
    if args.piped and count > 1 and not args.grid:
        raise ValueError("only one picture can be written to stdout: add --grid, or give -o a file name")
    prompt = args.prompt if args.label is None else Segment(label=args.label)
    path = check_output(args.output, IMAGE_FORMATS)
    paths = [path] if args.grid else [check_output(one, IMAGE_FORMATS) for one in numbered_paths(path, count)]
    engine = load(args)
    start = time.perf_counter()
    options = {name: value for name, value in generation_options(args).items() if name != "n"}
    seed = options.pop("seed")
    batch = BATCH_SIZE if engine.batched else 1
    images: list[Image] = []
    saved_paths: list[Path] = []
    try:
        with progress.bar(count, "image", silent=count <= batch) as bar:
            for start_index in range(0, count, batch):
                n = min(batch, count - start_index)
                outputs = engine.generate(prompt, output="image", n=n, seed=offset_seed(seed, start_index), **options)
                images += outputs if n > 1 else [outputs]
                bar.clear()
                if not args.grid:  # each batch is saved as it is finished
                    for target, image in zip(paths[start_index : start_index + n], images, strict=True):
                        save_image(target, image)
                        saved_paths.append(target)
                    print_paths(args, paths[start_index : start_index + n])
                    images = []
                bar.update(n)
        if args.grid:
            save_image(path, image_grid(images))
            print_paths(args, paths)
    except KeyboardInterrupt:
        print(f"\nstopped: {len(saved_paths)} of {len(paths)} files were written", file=sys.stderr)
        return 130
    return print_elapsed(args, [], start)
