"""The command `info`: `unigen info --model unigen-tiny`."""

from __future__ import annotations

import argparse
import json

from unigen.commands.arguments import (
    load,
    model_arguments,
)
from unigen.utils.argparser import non_empty

HELP = "show what a model consists of"
STDOUT = {"json": ".json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen info`."""
    parser.add_argument("--json", type=non_empty, metavar="FILE", help="write it as one JSON object too; - is stdout")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the facts of the engine, and write them as JSON where --json says. Returns the exit code."""
    from unigen.media.display import format_value
    from unigen.media.output import check_output, write_text

    path = check_output(args.json, {".json": "JSON"}) if args.json else None
    engine = load(args)
    facts = engine.info()
    for key, value in facts.items():
        print(f"{key:<20} {format_value(value)}")
    if path is not None:
        write_text(path, json.dumps(facts, indent=2, default=str) + "\n")
    return 0
