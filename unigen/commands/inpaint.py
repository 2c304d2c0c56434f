"""The command `inpaint`: `unigen inpaint out.png "two apples" --box 0,0,32,32`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from unigen.commands.arguments import (
    generation_options,
    load,
    model_arguments,
    parse_box,
    parse_text,
    print_elapsed,
    report_size_change,
    sampling_arguments,
)
from unigen.inference.options import VariationOptions
from unigen.options import add_argument
from unigen.utils.argparser import non_empty

if TYPE_CHECKING:
    from PIL.Image import Image

HELP = "regenerate a part of a picture, or its surroundings"
STDOUT = {"output": ".png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen inpaint`."""
    parser.add_argument("image", help="the picture to inpaint")
    parser.add_argument("prompt", type=parse_text, help="what the whole picture is to show")
    region = parser.add_mutually_exclusive_group(required=True)
    region.add_argument(
        "--mask", type=non_empty, metavar="FILE", help="a picture, white and opaque in the region to regenerate"
    )
    region.add_argument(
        "--box", type=parse_box, metavar="L,T,R,B", help="regenerate inside this box, in pixels of the picture"
    )
    region.add_argument("--around", type=parse_box, metavar="L,T,R,B", help="regenerate outside this box (outpainting)")
    add_argument(region, "variation", VariationOptions.options()["variation"])
    parser.add_argument(
        "-o", "--output", default="out.png", help="the new picture, - is a PNG on stdout (default: %(default)s)"
    )
    default_text = "masked, else another that can keep codes"
    sampling_arguments(parser, "image", "inpaint", generator=default_text, skip=("n", "candidates", "variation"))
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Inpaint the image inside a mask or a box, or outside a box, and write the result. Returns the exit code."""
    import numpy as np

    from unigen.media.images import read_image, read_mask
    from unigen.media.output import IMAGE_FORMATS, check_output, save_image

    path = check_output(args.output, IMAGE_FORMATS)
    image = read_image(args.image)
    if args.mask:
        mask: Image | np.ndarray | None = read_mask(args.mask)
    elif args.variation:
        mask = None
    else:
        left, top, right, bottom = args.box or args.around
        box_mask = np.zeros((image.height, image.width), dtype=bool)
        box_mask[top:bottom, left:right] = True
        mask = box_mask if args.box else ~box_mask
    engine = load(args)
    start = time.perf_counter()
    result = engine.inpaint(image, args.prompt, mask, **generation_options(args))
    save_image(path, result)
    report_size_change(image.size, result)
    if mask is not None and (window := engine.inpaint_window(mask)):
        left, top, right, bottom = window
        square = f"{right - left}x{bottom - top} pixels at {left},{top}"
        print(f"note: this model painted in a square of {square} of your picture; all else stays", file=sys.stderr)
    return print_elapsed(args, [path], start)
