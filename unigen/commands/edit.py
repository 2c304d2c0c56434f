"""The command `edit`: `unigen edit out.png "replace the sunflower with a rose"`."""

from __future__ import annotations

import argparse
import time

from unigen.commands.arguments import (
    generation_options,
    load,
    model_arguments,
    parse_text,
    print_elapsed,
    report_size_change,
    sampling_arguments,
)

HELP = "change a picture by an instruction"
STDOUT = {"output": ".png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen edit`."""
    parser.add_argument("image", help="the picture to change")
    parser.add_argument("instruction", type=parse_text, help='such as "replace the sunflower with a rose"')
    parser.add_argument(
        "-o", "--output", default="out.png", help="the new picture, - is a PNG on stdout (default: %(default)s)"
    )
    sampling_arguments(parser, "image", "edit")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Edit the image and write the result. Returns the exit code."""
    from unigen.media.images import read_image
    from unigen.media.output import IMAGE_FORMATS, check_output, save_image

    path = check_output(args.output, IMAGE_FORMATS)
    image = read_image(args.image)
    engine = load(args)
    start = time.perf_counter()
    edited = engine.edit(image, args.instruction, **generation_options(args))
    save_image(path, edited)
    report_size_change(image.size, edited)
    return print_elapsed(args, [path], start)
