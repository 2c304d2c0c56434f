"""The command `describe`: `unigen describe out.png -q "how many apples?"`."""

from __future__ import annotations

import argparse
import time

from unigen.commands.arguments import (
    load,
    model_arguments,
    parse_text,
    print_elapsed,
)
from unigen.inference.options import CANDIDATES

HELP = "say what a picture shows, or answer a question about it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen describe`."""
    parser.add_argument("image", help="a picture")
    parser.add_argument("-q", "--question", type=parse_text, help="answer this instead of describing the picture")
    parser.add_argument("--candidates", type=CANDIDATES.parse, help="captions of which to give the best; 1 is fastest")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print a caption of the image, or the answer to a question. Returns the exit code."""
    from unigen.media.images import read_image

    image = read_image(args.image)
    options = {} if args.candidates is None else {"candidates": args.candidates}
    if options and args.question:
        raise ValueError("--candidates is for captions: leave it out, or the question")
    engine = load(args)
    start = time.perf_counter()
    print(engine.describe(image, args.question, **options), flush=True)
    return print_elapsed(args, [], start)
