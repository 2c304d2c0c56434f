"""The command `joint`: `unigen joint "two apples" -o out.png`."""

from __future__ import annotations

import argparse
import time

from unigen.commands.arguments import (
    generation_options,
    load,
    model_arguments,
    parse_text,
    print_elapsed,
    sampling_arguments,
)
from unigen.utils.argparser import non_empty

HELP = "generate a picture and its caption together"
STDOUT = {"output": ".png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen joint`."""
    parser.add_argument("text", nargs="?", type=parse_text, help="the caption; left out, it is generated too")
    parser.add_argument("--image", type=non_empty, metavar="FILE", help="a picture; its caption is generated")
    parser.add_argument("-o", "--output", type=non_empty, help="the picture, - is a PNG on stdout (default: out.png)")
    sampling_arguments(parser, "joint", generator="joint")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write a text and its image together, or the text of a given image. Returns the exit code."""
    from unigen.media.images import read_image
    from unigen.media.output import IMAGE_FORMATS, check_output, save_image

    image = read_image(args.image) if args.image else None
    if image is not None and (args.text or args.output or args.piped):
        raise ValueError("the picture is there: leave out its text, which is to be written, and --output")
    path = check_output(args.output or "out.png", IMAGE_FORMATS)
    engine = load(args)
    start = time.perf_counter()
    caption, picture = engine.generate_joint(args.text, image, **generation_options(args))
    print(caption)  # on stderr where the picture goes to stdout
    if image is not None:
        return 0
    save_image(path, picture)
    return print_elapsed(args, [path], start)
