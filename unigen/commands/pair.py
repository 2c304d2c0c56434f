"""The command `pair`.

unigen pair "two apples" -o out.png
"""

from __future__ import annotations

import argparse
import time

from unigen.commands.arguments import (
    load,
    model_arguments,
    report,
    sampling,
    sampling_arguments,
    text,
)
from unigen.utils.argparser import name

HELP = "a picture and its text, written at once"
STDOUT = {"output": ".png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", type=text, help="what the picture shows; left out, it is written too")
    parser.add_argument("--image", type=name, metavar="FILE", help="a picture to which the text is written")
    parser.add_argument("-o", "--output", type=name, help="the picture, - is a PNG on stdout (default: out.png)")
    sampling_arguments(parser, "joint")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from unigen.media.images import read_image
    from unigen.media.output import PICTURES, check_output, save_picture

    image = read_image(args.image) if args.image else None
    if image is not None and (args.text or args.output or args.piped):
        raise ValueError("the picture is there: leave out its text, which is to be written, and --output")
    path = check_output(args.output or "out.png", PICTURES)
    engine = load(args)
    start = time.perf_counter()
    said, picture = engine.pair(args.text, image, **sampling(args))
    print(said)  # on stderr where the picture goes to stdout
    if image is not None:
        return 0
    save_picture(path, picture)
    return report(args, [path], start)
