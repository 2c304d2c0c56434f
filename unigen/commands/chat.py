"""The command `chat`.

unigen chat
"""

from __future__ import annotations

import argparse
import sys

from unigen.commands.arguments import (
    load,
    model_arguments,
    sampling,
    sampling_arguments,
)
from unigen.utils import progress
from unigen.utils.argparser import name

HELP = "talk in text and pictures, in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=name, default="chat", help="where pictures are saved (default: %(default)s)")
    sampling_arguments(parser)
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from unigen.commands.chat_session import Chat

    engine = load(args)
    with progress.hidden():  # a bar would be drawn over the answer
        Chat(args.folder, output=None, **sampling(args)).run(engine, sys.stdin, sys.stdout)
    return 0
