"""The command `chat`: `unigen chat`."""

from __future__ import annotations

import argparse
import sys

from unigen.commands.arguments import (
    generation_options,
    load,
    model_arguments,
    sampling_arguments,
)
from unigen.utils import progress
from unigen.utils.argparser import non_empty

HELP = "chat in text and pictures, in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen chat`."""
    parser.add_argument(
        "--folder", type=non_empty, default="chat", help="where pictures are saved (default: %(default)s)"
    )
    sampling_arguments(parser, "image", "text", "interleaved")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the conversation until /quit or the end of the input. Returns the exit code."""
    from unigen.commands.chat_session import Chat

    engine = load(args)
    with progress.suppress_bars():  # a bar would overwrite the answer
        Chat(args.folder, output=None, **generation_options(args)).run(engine, sys.stdin, sys.stdout)
    return 0
