"""Arguments and messages that several commands share: values, the model, how answers are sampled."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigen import loading, options
from unigen.option_groups import collect
from unigen.utils import precision, progress
from unigen.utils.argparser import non_empty
from unigen.utils.numbers import parse_float, parse_int
from unigen.utils.text import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_MODEL = "unigen-tiny"


def float_range(low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[str], float]:
    """The parser of a finite number.

    Args:
        low: smallest value.
        high: largest value.
        open_low: whether `low` itself is refused.

    Returns:
        A function for argparse's `type`: a text to a float in [low, high], or in (low, high].
    """

    def parse(text: str) -> float:
        try:
            value = parse_float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            lower = f"above {low:g}" if open_low else f"of at least {low:g}"
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {lower}{upper}")
        return value

    return parse


def int_range(low: int, high: float = math.inf) -> Callable[[str], int]:
    """The parser of a whole number.

    Args:
        low: smallest value.
        high: largest value.

    Returns:
        A function for argparse's `type`: a text to an int in [low, high].
    """

    def parse(text: str) -> int:
        try:
            value = parse_int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high:,}"
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not a whole number {bounds}")
        return value

    return parse


def parse_box(value: str) -> tuple[int, int, int, int]:
    """Parse a box like "0,0,32,32".

    Args:
        value: four whole numbers with commas between them.

    Returns:
        (left, top, right, bottom) in pixels, right above left and bottom above top.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        left, top, right, bottom = (parse_int(part) for part in value.split(","))
    except ValueError:
        left = right = top = bottom = 0
    if not (0 <= left < right and 0 <= top < bottom):
        raise argparse.ArgumentTypeError(f"{value!r} is not a box like 0,0,32,32: left, top, right, bottom in pixels")
    return left, top, right, bottom


def parse_setting(value: str) -> tuple[str, object]:
    """Parse a setting like "max_model_len=4096".

    Args:
        value: a name and a value with = between them.

    Returns:
        The name, and the value as JSON has it (a number, true, false, ...) or else as text.

    Raises:
        argparse.ArgumentTypeError: where the name or the value is missing.
    """
    name, _, text = value.partition("=")
    if not name.isidentifier() or not text:
        raise argparse.ArgumentTypeError(f"{value!r} is not a setting like max_model_len=4096")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text


def parse_text(value: str) -> str:
    """Parse words of a user.

    Args:
        value: text in UTF-8.

    Returns:
        The text without white space around it.

    Raises:
        argparse.ArgumentTypeError: where it is empty or not in UTF-8.
    """
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; say in words what you want")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # Python's surrogates for bytes that are not UTF-8
        raise argparse.ArgumentTypeError("it is not in UTF-8; set the terminal to UTF-8, or write it anew")
    return value.strip()


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a model, its device and its engine.

    Args:
        parser: of the command.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=non_empty,
        default=DEFAULT_MODEL,
        help="a name, a folder, or owner/name on the hub (default: %(default)s)",
    )
    group.add_argument(
        "--lmm",
        type=non_empty,
        help="a model that reads and writes text, and prompts for the image model (--model)",
    )
    group.add_argument(
        "--engine",
        choices=loading.BACKENDS,
        default="local",
        help="what runs the language model (default: %(default)s)",
    )
    group.add_argument(
        "--vllm",
        type=parse_setting,
        action="append",
        metavar="NAME=VALUE",
        help="argument of vLLM's engine; may be repeated",
    )
    group.add_argument(
        "--connector",
        type=non_empty,
        help="a folder: a pipeline (--model) is conditioned on the hidden states of the --lmm",
    )
    group.add_argument("--adapter", action=options.RenamedAction, const="--connector")
    precision.add_arguments(group)


def sampling_arguments(
    parser: argparse.ArgumentParser,
    *outputs: str,
    generator: str = options.DEFAULT_GENERATOR,
    skip: Sequence[str] = ("n", "candidates"),
) -> None:
    """Add the options of the outputs. The engine sets those that a user leaves out.

    Args:
        parser: of the command.
        outputs: kinds of output, as of `OptionGroup.outputs`.
        generator: name of the usual generator, for the help text.
        skip: names of options that the command does not take.
    """
    defaults = {"n": 1, "seed": 0, "generator": f"{generator}; see unigen info"}
    options.add_arguments(parser, options.groups_for(collect(), *outputs), skip=skip, defaults=defaults)


def load_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `unigen.load`.

    Args:
        args: arguments of the command, with those of `model_arguments`.

    Returns:
        Keywords for `unigen.load`.

    Raises:
        ValueError: where --connector stands without --lmm.
    """
    if args.connector and not args.lmm:
        raise ValueError("a connector joins two models: give the one that reads, too, by --lmm")
    composed = {"lmm": args.lmm, "image_model": args.model, "connector": args.connector}
    keywords = (composed if args.lmm else {"name": args.model}) | precision.load_options(args)
    if args.vllm or args.engine != "local":
        keywords |= {"engine": args.engine, "vllm": dict(args.vllm or [])}
    return keywords


def load(args: argparse.Namespace) -> Any:
    """Load the model that the arguments name, with a status line on stderr.

    Args:
        args: arguments of the command, with those of `model_arguments`.

    Returns:
        The engine.

    Raises:
        ValueError: as `unigen.load`.
    """
    with progress.status(f"loading {' and '.join(filter(None, [args.lmm, args.model]))}"):
        return loading.load(**load_arguments(args))


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the generation that are set on the command line, and the seed (0 by default)."""
    return {"seed": 0} | options.given_arguments(args, collect())


def report_size_change(requested_size: tuple[int, int], image: Image) -> None:
    """Print a note on stderr where the image that comes back has another size than the one that went in.

    Args:
        requested_size: width and height in pixels of the input image.
        image: the image that comes back.
    """
    if image.size != requested_size:
        input_size, output_size = ("x".join(map(str, size)) for size in (requested_size, image.size))
        print(
            f"note: your picture of {input_size} pixels comes back as {output_size}, as this model draws",
            file=sys.stderr,
        )


def print_paths(args: argparse.Namespace, paths: list[Path]) -> None:
    """Print the paths of written files, a line each; nothing where the file goes to stdout itself."""
    for path in [] if args.piped else paths:
        print(path, flush=True)


def print_elapsed(args: argparse.Namespace, paths: list[Path], start: float) -> int:
    """Print the paths of written files, and on stderr the seconds since `start`.

    Args:
        args: arguments of the command.
        paths: the files.
        start: `time.perf_counter()` at the beginning.

    Returns:
        The exit code 0.
    """
    print_paths(args, paths)
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0
